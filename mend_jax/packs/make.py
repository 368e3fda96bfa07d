"""Demonstrations to packs: sets of them are distilled together, and what was made once is kept under a hash of its content.

Axes: B sets of demonstrations, N demonstration tokens, L vectors, D width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data.bos import NONE
from mend_jax.data.tokenize import fingerprint as text_fingerprint
from mend_jax.interchange.trained import trained_fingerprint
from mend_jax.models import folders
from mend_jax.packs.pack import FORMAT, SUFFIX, Pack, load_pack, tokenizer_fingerprint
from mend_jax.prefixes.kind import Kind
from mend_jax.prefixes.prefix import room_for_vectors
from mend_jax.run.distributed import to_host

Pairs = Sequence[tuple[str, str]]
TOGETHER = 8  # sets of demonstrations in one call of the distiller
SIZES = (128, 256, 384, 512, 768, 1024, 1536, 2048)  # padded lengths of contexts: few, because each is compiled


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
        sets: (x, y) pairs of texts. Of each set the first that fit the distiller's window are read, the others dropped.
        path: where `model` was read from.
        keep: whether the packs hold their demonstrations too.
        llm_named: what the packs call the LLM, so that it is found again: a path or a name; "": `llm.path`, as `load_llm` was given it.
        progress: called with the number of packs finished since the last call.
    Raises:
        UserError: a model that reads no demonstrations or has no tokenizer, sets that are none, or one whose first
            demonstration does not fit.
    """
    return packs_of(llm, model, sets, facts_of(llm, model, path, llm_named), keep, progress)


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


def packs_of(llm, model: Kind, sets: Sequence[Pairs], facts: dict, keep: bool = False, progress=None) -> list[Pack]:
    """`make_packs` with its `facts_of`."""
    _check_sets(sets)
    room, contexts = room_for_vectors(llm), []
    for pairs in sets:
        tokens = [_tokens(model, pair) for pair in pairs]
        count = model.fitting([len(x) + len(y) for x, y in tokens], llm)
        if count == 0:
            raise UserError(
                f"A demonstration ({pairs[0][0][:40]!r} ...) has {sum(map(len, tokens[0]))} tokens, more than the distiller reads at"
                " once: shorten it, or leave it out."
            )
        contexts.append((count, model.lay_out(tokens[:count], room)))
    packs: list[Pack | None] = [None] * len(sets)
    order = sorted(range(len(sets)), key=lambda i: len(contexts[i][1]))  # of like lengths together
    for start in range(0, len(order), TOGETHER):
        batch = order[start : start + TOGETHER]
        for i, vectors in zip(batch, _distil(model, [contexts[i][1] for i in batch]), strict=True):
            count = contexts[i][0]
            read = tuple((x, y) for x, y in sets[i][:count]) if keep else None
            rest = tuple(range(count, len(sets[i])))
            packs[i] = Pack(vectors, **facts, num_demonstrations=count, dropped=rest, demonstrations=read)
        if progress is not None:
            progress(len(batch))
    return packs


def require_reader(model: Kind, path) -> None:
    """Raises UserError if `model`, read from `path`, cannot make packs."""
    if not model.reads_demos or model.tokenizer is None:
        why = "has no tokenizer" if model.reads_demos else "reads no demonstrations"
        raise UserError(f"{path} holds {model.title}, which {why}: packs are made by a distiller with its tokenizer.")


class PackCache:
    """Packs under a hash of all that decides them; `folder` may be None, which keeps none."""

    def __init__(self, folder: Path | None, llm: str, distiller: str | Path, *settings):
        self.folder, self.names = folder, {"llm": llm, "distiller": str(distiller)}  # what they are called now
        self.facts = FORMAT, folders.fingerprint(llm), trained_fingerprint(distiller), *settings

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
            path.parent.mkdir(parents=True, exist_ok=True)
            pack.save(path)
        except OSError:
            return


def _check_sets(sets: Sequence[Pairs]) -> None:
    for pair in (pair for pairs in sets for pair in pairs):
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(
                f"A demonstration is {pair!r}: give a list of sets, [demos], each of them a list of (input, output) texts."
            )


def _tokens(model: Kind, pair) -> tuple[list[int], list[int]]:
    """(x, y) in the distiller's tokens, the template's texts around them."""
    x, y = pair
    pieces = (model.template.query(x), model.template.output(y))
    read = (model.tokenizer(part, add_special_tokens=False)["input_ids"] for part in pieces)
    return tuple([token for ids in part for token in ids] for part in read)


def _distil(model: Kind, contexts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The vectors (L,D) float32 of each context, by one call."""
    columns = model.columns(max(map(len, contexts)), SIZES)
    rows = np.zeros((1 << (len(contexts) - 1).bit_length(), columns), np.int32)
    for row, context in zip(rows, contexts, strict=False):
        row[: len(context)] = context
    length = np.asarray([len(context) for context in contexts] + [1] * (len(rows) - len(contexts)), np.int32)
    made = _apply(model, model.params, rows, length)
    vectors, counts = to_host(made.embeds).astype(np.float32), to_host(made.length)
    return [vectors[i, : counts[i]] for i in range(len(contexts))]


@partial(jax.jit, static_argnums=0)
def _apply(model, params, demos, length):
    return model.apply(params, demos, length)
