"""The one exception for user errors."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """A user error, in one sentence: what is wrong, where, what to do. Commands print it without a trace and exit with 2."""


@contextlib.contextmanager
def at_place(where: str) -> Iterator[None]:
    """Puts a place, such as a file and its line, before the UserErrors that are raised within; "" is none."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None
