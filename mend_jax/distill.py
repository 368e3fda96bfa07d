"""Demonstrations to packs: vectors in files of their own, which the frozen LLM reads in the place of the demonstrations.

    python -m mend_jax.distill --distiller=runs/mine/mend/finetune --demos=reviews.jsonl --out=reviews.pack.safetensors
    python -m mend_jax.distill --distiller=exported --llm=gpt2-large --demos=folder/ --out=packs/

A file of demonstrations has lines {"input": ..., "output": ...}, as MetaICL's files have, or is a JSON list of such objects
(FILE.json); each file becomes one pack. Several files (with commas between) or a folder of *.jsonl and *.json become a folder of
packs, even where the folder holds one file. docs/packs.md says what is in a pack and how to use it.
"""

from pathlib import Path
from typing import Literal

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import UserError, at_place
from mend_jax.cli.progress import Progress
from mend_jax.cli.settings import CHOICES
from mend_jax.cli.text import shown, size
from mend_jax.interchange.trained import llm_for, load_both
from mend_jax.packs.demonstrations import demonstration_files, names_folder, pack_name, read_demonstrations
from mend_jax.packs.make import TOGETHER, PackCache, facts_of, packs_of
from mend_jax.packs.pack import SUFFIX, Pack
from mend_jax.packs.queries import require_writable


def distill(
    distiller: str,
    demos: str,
    out: str,
    llm: str = "",
    dtype: Literal[*CHOICES["llm.dtype"]] = "float32",
    vectors: int = 0,
    keep_demos: bool = False,
    cache: str = "~/.cache/mend_jax/packs",
) -> list[Path]:
    """Writes the packs of files of demonstrations; returns their paths.

    Args:
        distiller: a training workdir, an exported folder, or the name of one in this package: smollm2-135m-instruct.
        demos: a file of demonstrations, several with commas between, or a folder of *.jsonl and *.json.
        out: the pack to write, also in the place of an older file; of several files, or of a folder, the folder for their packs.
        llm: the LLM that will read the vectors: a folder, hub name or GGUF file. A training workdir knows its own.
        dtype: of the distiller's arithmetic.
        vectors: the number of vectors, one of those that the distiller was trained with (prefix.nested); 0: the largest.
        keep_demos: keep the demonstrations in the pack too, for people to read and to check its fidelity.
        cache: a folder that keeps packs by their content, so that they are made once; "" keeps none.
    """
    files = demonstration_files(demos)
    targets = _targets(files, out, several=len(files) > 1 or names_folder(demos))
    llm = llm_for(distiller, llm)
    sets = [read_demonstrations(file) for file in files]
    known = PackCache(
        Path(cache).expanduser() if cache else None, llm, distiller, dtype, keep_demos, *([vectors] if vectors else [])
    )
    for target in targets:
        require_writable(target)
    packs = [known.read(pairs) for pairs in sets]
    missing = [i for i, pack in enumerate(packs) if pack is None]
    if missing:
        _make(packs, missing, sets, known, distiller, llm, dtype, vectors, keep_demos)
    for i, (target, pack) in enumerate(zip(targets, packs, strict=True)):
        if isinstance(pack, Pack):
            before = ", in the place of an older file" if target.exists() else ""
            with at_place("--out"):
                pack.save(target)
            print(f"{shown(str(target))}: {in_words(pack)}{'' if i in missing else ', made before'}{before}")
    _refuse(files, packs)
    return targets


def _make(packs, missing, sets, known: PackCache, distiller, llm: str, dtype: str, vectors: int, keep: bool) -> None:
    """Makes the missing packs and puts them into `packs`, or the reason why there is none; each batch is kept as soon as it is made."""
    loaded, model = load_both(distiller, llm, dtype, vectors=vectors)
    facts = facts_of(loaded, model, distiller, llm)
    with Progress(len(missing), "pack") as bar:
        for start in range(0, len(missing), TOGETHER):
            batch = missing[start : start + TOGETHER]
            made = packs_of(loaded, model, [sets[i] for i in batch], facts, keep, bar.update)
            for i, pack in zip(batch, made, strict=True):
                packs[i] = pack
                if isinstance(pack, Pack):
                    known.write(sets[i], pack)


def _refuse(files: list[Path], packs: list) -> None:
    """Raises UserError, which names them, for the files that became no pack: all others have been written."""
    failed = [(file, pack) for file, pack in zip(files, packs, strict=True) if isinstance(pack, UserError)]
    if failed:
        (first, error), *rest = failed
        others = (
            f" ({len(rest)} more of the files cannot be read either: {few([str(file) for file, _ in rest])})"
            * bool(rest)
        )
        raise UserError(f"{first}: {str(error).rstrip('.')}{others}.")


def _targets(files: list[Path], out: str, several: bool) -> list[Path]:
    """Where each pack is written; of `several`, or of those of a folder, which may be one today and two tomorrow, in the folder
    `out`. Raises UserError if `out` is not the right kind of name."""
    target = Path(out).expanduser()
    if not several and not target.is_dir():
        if target.suffix != ".safetensors":
            raise UserError(f"--out={out} must end in .safetensors, for example {target.name}{SUFFIX}.")
        return [target]
    if target.is_file() or target.suffix == ".safetensors":
        what = f"there are {len(files)} packs to write" if len(files) > 1 else "the packs of a folder become a folder"
        raise UserError(f"--out={out} is a file, but {what}: name a folder.")
    return [target / pack_name(file) for file in files]


def few(texts: list[str], most: int = 8) -> str:
    """The first of several texts, and how many more there are."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def in_words(pack: Pack) -> str:
    """A pack in one line."""
    count, dropped = pack.num_demonstrations, len(pack.dropped)
    numbers = few([str(number + 1) for number in pack.dropped])
    rest = f" ({dropped} more did not fit: number {numbers})" if dropped else ""
    return f"{pack.num_vectors} vectors of {count} demonstration{'s' * (count != 1)}{rest}, {size(pack.vectors.nbytes)}"


if __name__ == "__main__":
    run(distill, keeps=True)  # a folder's finished packs are in --cache
