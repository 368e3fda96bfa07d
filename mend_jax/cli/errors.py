"""The one exception for user errors."""


class UserError(Exception):
    """A user error, in one sentence: what is wrong, where, what to do. Commands print it without a trace and exit with 2."""
