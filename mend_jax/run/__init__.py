"""A training run: what it is built of, where it lives, how it is saved and resumed."""
