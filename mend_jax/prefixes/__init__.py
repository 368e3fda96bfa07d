"""What stands before a query: `Prefix`, and one file for each kind of it."""
