"""JAX's cache of compiled programs: what a kill cut short there is removed.

JAX writes an entry in place, and never over one that is there: an entry that a kill left incomplete would bring a warning
of two lines, and be compiled anew, at every later start.
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
    """While it lasts, damaged entries that JAX meets are removed, so that it writes them again, and one sentence says so."""
    before = warnings.showwarning

    def show(message, *where, **more):
        found = DAMAGED.match(str(message))
        if found and _remove(found[1]):
            name = re.sub("^(jit|pmap)_", "", found[1])
            print(f"The compile cache held a damaged entry of {name}: it is compiled and kept again.", file=sys.stderr)
        else:
            before(message, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _remove(program: str) -> int:
    """Removes all entries of a program (JAX does not say which is damaged); returns how many."""
    import jax  # it is there: who warns is JAX

    folder, count = jax.config.jax_compilation_cache_dir, 0
    for path in Path(folder).glob(f"{program}-*-cache") if folder else ():
        with contextlib.suppress(OSError):
            path.unlink()
            count += 1
    return count
