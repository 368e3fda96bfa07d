"""A training run: its parts, its layout over devices, and how it is saved and resumed."""
