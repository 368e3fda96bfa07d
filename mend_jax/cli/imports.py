"""Imports of libraries that import more than is used of them."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_pytorch() -> Iterator[None]:
    """Within it, a library that can do without PyTorch does not find it. One that was imported before stays."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # Python's way to say that there is no such module
    try:
        yield
    finally:
        del sys.modules["torch"]
