"""The one exception that a user's mistake ends in."""


class UserError(Exception):
    """One sentence: what is wrong, where, what to do. The commands print it without a trace and exit with 2."""
