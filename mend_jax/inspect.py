"""What is in a pack.

python -m mend_jax.inspect --pack=reviews.pack.safetensors
"""

from mend_jax.cli.command_line import run
from mend_jax.cli.text import columns
from mend_jax.packs.pack import Pack, load_pack


def inspect(pack: str, demos: bool = False) -> None:
    """Prints what a pack says about itself.

    Args:
        pack: the file.
        demos: print its demonstrations too, where it keeps them.
    """
    found = load_pack(pack)
    facts = found.metadata()
    kept = facts.pop("demonstrations", None)
    facts["demonstrations"] = "not kept" if kept is None else "kept (--demos prints them)"
    facts["dropped"] = _left_out(found)
    facts["width"] = found.vectors.shape[1]
    facts["rms"] = f"{(found.vectors.astype(float) ** 2).mean() ** 0.5:.4g}"
    print(columns([[name, str(value)] for name, value in facts.items()], left=2))
    if demos:
        for x, y in found.demonstrations or ():
            print(f"{x!r} -> {y!r}")


def _left_out(pack: Pack) -> str:
    """The demonstrations that did not fit, as people count them: the file's own numbers are from 0."""
    return f"number {', '.join(str(number + 1) for number in pack.dropped)}" if pack.dropped else "none"


if __name__ == "__main__":
    run(inspect)
