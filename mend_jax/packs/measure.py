"""How far a pack can be trusted: on held-out queries, the LLM's predictions after its vectors against those after the demonstrations.

Axes: R rows (queries with an answer), Q their tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from mend_jax.cli.errors import UserError, at_place
from mend_jax.data.batches import pad
from mend_jax.data.query import Query, query_tokens
from mend_jax.losses import Weights
from mend_jax.models.programs import program
from mend_jax.packs.pack import Pack
from mend_jax.packs.queries import query_item
from mend_jax.prefixes.context import bucket
from mend_jax.prefixes.demonstrations import demonstrations_prefix
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.distributed import to_host
from mend_jax.scoring.options import cache_prefix, check_items, score_items
from mend_jax.step import query_losses

KL = Weights(kd=1.0, pred=0.0, clm=0.0)


class Asked(NamedTuple):
    """A held-out query."""

    x: str
    options: list[str]
    y: str | None  # the right answer, where it is known
    where: str = ""  # its file and line, for errors


class Fidelity(NamedTuple):
    """What was measured; the names of the methods are "pack", "demonstrations", "nothing" and "first N", a pack's first N vectors."""

    kl: dict[
        str, float
    ]  # KL(demonstrations || method) in nats per token of a query and its answer; the mean over queries
    agreement: dict[str, float]  # share of the queries on which a method chooses as the demonstrations do
    accuracy: dict[str, float | None]  # share of right answers, where they are known
    positions: dict[str, int]  # of the LLM
    queries: int

    def recovered(self, name: str = "pack") -> float:
        """1 - KL(method) / KL(nothing): the share of what the demonstrations change."""
        return 1 - self.kl[name] / self.kl["nothing"] if self.kl["nothing"] else 0.0


def fidelity(
    llm,
    pack: Pack,
    demos: Sequence[tuple[str, str]],
    asked: Sequence[Asked],
    lengths: Sequence[int] = (),
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Fidelity:
    """A pack's fidelity to the demonstrations that it was made of.

    Args:
        llm: from `load_llm`, the pack's.
        pack: for this LLM.
        demos: the demonstrations, which the LLM itself reads for comparison.
        asked: queries that are no demonstrations, each with its options. The KL is measured on x and the right answer or, where it
            is not known, the answer that the demonstrations lead to.
        lengths: of `pack.shorter`: they are measured too.
        batch_size: rows in one pass of the LLM.
        progress: called with the number of passes over all queries finished since the last call: `passes(lengths)` in all.
    Raises:
        UserError: no query, or one that with its prefix is longer than the LLM's window.
    """
    if not asked:
        raise UserError("There are no queries: give at least one that is no demonstration.")
    done = progress or (lambda _: None)
    prefixes = {
        "demonstrations": demonstrations_prefix(llm, demos, pack.template),
        "pack": pack.prefix,
        **{f"first {count}": pack.first(count).prefix for count in lengths},
        "nothing": no_prefix(1, llm.config.width),
    }
    tokens = partial(query_tokens, llm)
    items = [query_item(llm, pack.template, one.x, one.options) for one in asked]
    _require_room(llm, pack, prefixes, asked, items)
    chosen = {}
    for name, prefix in prefixes.items():
        scores = score_items(llm, cache_prefix(llm, prefix), items, batch_size)
        chosen[name] = [one.options[int(values.argmax())] for one, values in zip(asked, scores, strict=True)]
        done(1)
    answers = [one.y or said for one, said in zip(asked, chosen["demonstrations"], strict=True)]
    rows = [(item.x_tokens, tokens(y, "output", pack.template.output)) for item, y in zip(items, answers, strict=True)]
    taught = prefixes.pop("demonstrations")
    kl = {"demonstrations": 0.0}
    for name, prefix in prefixes.items():
        kl[name] = _kl(llm, taught, prefix, rows, batch_size)
        done(1)
    known = [one.y for one in asked if one.y is not None]
    return Fidelity(
        kl=kl,
        agreement={name: _share(said, chosen["demonstrations"]) for name, said in chosen.items()},
        accuracy={
            name: _share([s for s, one in zip(said, asked, strict=True) if one.y is not None], known) if known else None
            for name, said in chosen.items()
        },
        positions={name: int(to_host(p.length)[0]) for name, p in {**prefixes, "demonstrations": taught}.items()},
        queries=len(asked),
    )


def _require_room(llm, pack: Pack, prefixes: dict[str, Prefix], asked: Sequence[Asked], items) -> None:
    """Raises the UserErrors of queries that do not fit behind the longest prefix, with file and line, before anything is computed."""
    longest = max(int(to_host(prefix.length)[0]) for prefix in prefixes.values())
    for one, item in zip(asked, items, strict=True):
        right = [] if one.y is None else [query_tokens(llm, one.y, "output", pack.template.output)]
        answers = SimpleNamespace(x_tokens=item.x_tokens, options_tokens=[*item.options_tokens, *right])
        with at_place(one.where):
            check_items(llm, longest, [answers])


def passes(lengths: Sequence[int] = ()) -> int:
    """The passes over all queries of a measurement."""
    return 5 + 2 * len(lengths)


def shortest(measured: Fidelity, lengths: Sequence[int], tolerance: float) -> int | None:
    """The least of the `lengths` that recovers what the whole pack recovers but for a share, `tolerance`; None if none does."""
    enough = measured.recovered() - tolerance * abs(measured.recovered())
    return min((count for count in lengths if measured.recovered(f"first {count}") >= enough), default=None)


def _share(said: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)


def _kl(llm, taught: Prefix, prefix: Prefix, rows, batch_size: int) -> float:
    """The mean over rows of KL(taught || prefix) per token of x and y; of an encoder–decoder, which predicts y, of y."""
    order, total = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1])), 0.0
    separate = llm.start_token is not None
    for start in range(0, len(order), batch_size):
        batch = [rows[i] for i in order[start : start + batch_size]]
        columns = bucket(max(len(x) + len(y) for x, y in batch))
        tokens, length = pad([np.concatenate(row) for row in batch], columns)
        limits = (columns, columns) if separate else (None, None)
        query = Query(tokens, length, np.asarray([len(x) for x, _ in batch], np.int32), *limits)
        total += len(batch) * float(_mean_kl(llm, llm.params, taught, prefix, query))
    return total / len(rows)


@program
def _mean_kl(llm, params, taught, prefix, query):
    student, teacher = (llm.states(params, one, query) for one in (prefix, taught))
    shift = 1 if llm.start_token is None else 0
    return query_losses(student, teacher, llm.head(params), llm.targets(query), KL, chunk=512, shift=shift)[1]["kd"]
