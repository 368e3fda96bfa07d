"""A large file in pieces, each complete or not there: for what may only travel in small files. `cat NAME.part*` joins them."""

from pathlib import Path

from mend_jax.run.files import whole_file

BLOCK = 1 << 20  # bytes copied at a time


def split(file: Path, target: Path, count: int) -> list[Path]:
    """Writes `file` in `count` pieces of about one size, <target>.part1of3 and so on; returns them.

    Pieces of `target` that are not of these are removed.
    """
    total = file.stat().st_size
    pieces = [target.with_name(f"{target.name}.part{i}of{count}") for i in range(1, count + 1)]
    for old in set(target.parent.glob(f"{target.name}.part*of*")) - set(pieces):
        old.unlink()
    with open(file, "rb") as whole:
        for i, piece in enumerate(pieces, 1):
            with whole_file(piece) as temporary, open(temporary, "wb") as part:
                _copy(whole, part, total * i // count - whole.tell())
    return pieces


def _copy(source, target, size: int) -> None:
    while size > 0:
        block = source.read(min(BLOCK, size))
        target.write(block)
        size -= len(block)
