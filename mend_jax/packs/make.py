"""Demonstrations to packs: sets of them are distilled together, and what was made once is kept under a hash of its content."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.data.bos import NONE
from mend_jax.data.tokenize import fingerprint as text_fingerprint
from mend_jax.interchange.trained import trained_fingerprint
from mend_jax.models import folders
from mend_jax.packs.pack import FORMAT, SUFFIX, Pack, fingerprint_of, load_pack, tokenizer_fingerprint
from mend_jax.prefixes.context import is_pair
from mend_jax.prefixes.kind import Kind, Reading

Pairs = Sequence[tuple[str, str]]
TOGETHER = 8  # sets of demonstrations in one call of the distiller
READ_AS = 2  # a number that changes with what a set of demonstrations becomes: packs of older programs are made again


def make_packs(
    llm,
    model: Kind,
    sets: Sequence[Pairs],
    path: str | Path,
    keep: bool = False,
    llm_named: str = "",
    progress: Callable[[int], None] | None = None,
) -> list[Pack]:
    """A pack of each set of demonstrations.

    Args:
        llm: from `load_llm`, the LLM that will read the vectors.
        model: from `load_distiller` or `load_prefix`, for this LLM.
        sets: (x, y) pairs of texts. Of each set the first that fit the distiller's window are read, the others dropped; of a
            distiller of chunks those are dropped that are longer than a chunk. Each x is cut as in training.
        path: where `model` was read from.
        keep: whether the packs hold their demonstrations too.
        llm_named: what the packs call the LLM, so that it is found again: a path or a name; "": `llm.path`, as `load_llm` was given it.
        progress: called with the number of packs finished since the last call.
    Raises:
        UserError: a model that reads no demonstrations or has no tokenizer, sets that are none, or one of which no demonstration
            fits.
    """
    made = packs_of(llm, model, sets, facts_of(llm, model, path, llm_named), keep, progress)
    for number, pack in enumerate(made, 1):
        if isinstance(pack, UserError):
            raise UserError(f"Set {number} of {len(made)}: {pack}") if len(made) > 1 else pack
    return made


def facts_of(llm, model: Kind, path: str | Path, llm_named: str = "") -> dict:
    """What all packs of a model say of it and of the LLM; arguments and errors are those of `make_packs`. Reads all weights' files."""
    require_reader(model, path)
    return {
        "llm": llm_named or str(llm.path),
        "llm_fingerprint": llm.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(llm.tokenizer),
        "distiller": str(path),
        "distiller_fingerprint": trained_fingerprint(path),
        "kind": model.name,
        "template": model.template,
        "shorter": model.shorter,
        "bos": model.bos or NONE,
    }


def packs_of(
    llm, model: Kind, sets: Sequence[Pairs], facts: dict, keep: bool = False, progress=None
) -> list[Pack | UserError]:
    """`make_packs` with its `facts_of`; in the place of a pack that cannot be made stands the reason."""
    _check_sets(sets)
    found: list = [_reading(model, pairs, llm) for pairs in sets]
    order = [i for i, one in enumerate(found) if isinstance(one, Reading)]
    order.sort(key=lambda i: found[i].tokens)  # of like lengths together
    if progress is not None and len(order) < len(sets):
        progress(len(sets) - len(order))
    for start in range(0, len(order), TOGETHER):
        batch = order[start : start + TOGETHER]
        for i, vectors in zip(batch, model.vectors_of([found[i].context for i in batch]), strict=True):
            _, _, read, dropped = found[i]
            kept = tuple(tuple(sets[i][number]) for number in read) if keep else None
            about = {"num_demonstrations": len(read), "dropped": dropped, "demonstrations": kept}
            found[i] = Pack(vectors, **facts, **about, made_of=fingerprint_of(sets[i]))
        if progress is not None:
            progress(len(batch))
    return found


def require_reader(model: Kind, path) -> None:
    """Raises UserError if `model`, read from `path`, cannot make packs."""
    if not model.reads_demos or model.tokenizer is None:
        why = "has no tokenizer" if model.reads_demos else "reads no demonstrations"
        raise UserError(f"{path} holds {model.title}, which {why}: packs are made by a distiller with its tokenizer.")


class PackCache:
    """Packs under a hash of all that decides them; `folder` may be None, which keeps none."""

    def __init__(self, folder: Path | None, llm: str, distiller: str | Path, *settings):
        self.folder, self.names = folder, {"llm": llm, "distiller": str(distiller)}  # what they are called now
        self.facts = FORMAT, READ_AS, folders.fingerprint(llm), trained_fingerprint(distiller), *settings

    def path(self, pairs: Pairs) -> Path | None:
        """Where the pack of these demonstrations is kept."""
        if self.folder is None:
            return None
        return (
            self.folder
            / f"{text_fingerprint(*self.facts, len(pairs), *(text for pair in pairs for text in pair))}{SUFFIX}"
        )

    def read(self, pairs: Pairs) -> Pack | None:
        """The pack of these demonstrations, if it was made before; a damaged file is none."""
        path = self.path(pairs)
        if path is None or not path.exists():
            return None
        try:
            return dataclasses.replace(load_pack(path), **self.names)
        except UserError:
            return None

    def write(self, pairs: Pairs, pack: Pack) -> None:
        """Keeps a pack. A cache that cannot be written, such as one on a full disk, keeps nothing."""
        path = self.path(pairs)
        if path is None:
            return
        try:
            pack.save(path)
        except UserError:
            return


def _check_sets(sets: Sequence[Pairs]) -> None:
    for pairs in sets:
        wrong = [pair for pair in pairs if not is_pair(pair)] if isinstance(pairs, tuple | list) else [pairs]
        if wrong:
            raise UserError(
                f"A demonstration is {wrong[0]!r:.80}: give a list of sets, [demos], each of them a list of (input, output) texts."
            )


def _reading(model: Kind, pairs: Pairs, llm) -> Reading | UserError:
    try:
        return model.read_pairs(pairs, llm)
    except UserError as error:
        return error
