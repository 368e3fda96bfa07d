"""Removes damaged entries from JAX's cache of compiled programs.

JAX writes an entry in place and never overwrites one: an entry that a kill left incomplete would cause a warning of two
lines, and a new compilation, at every later start.
"""

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Within it, damaged entries that JAX finds are removed, so that JAX writes them again, and a message says so."""
    before = warnings.showwarning

    def show(message, *where, **more):
        found = DAMAGED.match(str(message))
        if found and _remove(found[1]):
            name = re.sub("^(jit|pmap)_", "", found[1])
            print(
                f"The compile cache held a damaged entry of {name}: it is compiled and stored again.", file=sys.stderr
            )
        else:
            before(message, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _remove(program: str) -> int:
    """Removes all entries of a program (JAX does not say which is damaged); returns how many."""
    import jax  # already imported: the warning is JAX's

    folder, count = jax.config.jax_compilation_cache_dir, 0
    for path in Path(folder).glob(f"{program}-*-cache") if folder else ():
        with contextlib.suppress(OSError):
            path.unlink()
            count += 1
    return count
