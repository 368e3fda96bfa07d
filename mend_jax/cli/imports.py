"""PyTorch, which several libraries import wherever it is installed: two seconds of every start, for nothing."""

import contextlib
import sys
from collections.abc import Iterator

NAME = "torch"


@contextlib.contextmanager
def without_pytorch() -> Iterator[None]:
    """Within it, a library that can do without PyTorch does not find it. One that was imported before stays."""
    if NAME in sys.modules:
        yield
        return
    hide_pytorch()
    try:
        yield
    finally:
        _show()


def hide_pytorch() -> None:
    """For the rest of the process, which is a command: what needs PyTorch calls `pytorch`."""
    sys.modules.setdefault(NAME, None)  # Python's way to say that there is no such module


def pytorch():
    """The module. Raises ImportError where it is not installed."""
    _show()
    import torch

    return torch


def _show() -> None:
    if sys.modules.get(NAME, NAME) is None:
        del sys.modules[NAME]
