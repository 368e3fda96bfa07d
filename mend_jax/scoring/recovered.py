"""How much of what the demonstrations tell the LLM a prefix recovers: 1 - KL(prefix) / KL(nothing).

KL(prefix) is L_distill on held-out queries: how far the LLM's predictions after the prefix are from those after the demonstrations
themselves; KL(nothing) is the same without any prefix. 1 is as good as the demonstrations, 0 no better than nothing, and below 0
the prefix misleads.

Axes: B batch, R queries of a row, N demonstration tokens, Q query tokens.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mend_jax.data.batches import Batch, pad, pad_queries
from mend_jax.data.evaluation import EvalTask
from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import LLM
from mend_jax.prefixes import KINDS, Kind
from mend_jax.prefixes.context import bucket
from mend_jax.scoring.tasks import make_contexts


def make_recovered(of_prefix: Callable, of_nothing: Callable) -> Callable:
    """recovered(params, kd=None) -> list of T float, of two functions of params: the held-out batches' KLs, of T kinds of tokens
    each, list of lists of float.

    Without a prefix nothing depends on what is trained, so `of_nothing` is called once. `kd`: those of the prefix, if they are
    known.
    """
    known = []

    def recovered(params, kd=None) -> list[float]:
        if not known:
            known[:] = _sums(of_nothing(params))
        sums = _sums(kd or of_prefix(params))
        return [1 - mine / nothing if nothing else 0.0 for mine, nothing in zip(sums, known, strict=True)]

    return recovered


def _sums(batches) -> list[float]:
    return [math.fsum(kind) for kind in zip(*batches, strict=True)]


def dev_batches(
    config, llm: LLM, model: Kind, tasks: Sequence[EvalTask], share: tuple[int, int] = (0, 1)
) -> list[Batch]:
    """Dev items with their right answers as batches of train.batch_size rows, all of one shape. As in training, up to
    data.queries of a task's items share a row, whose context is read once.

    Args:
        config: a whole run's config; about data.validation_items items are taken, the first of each task and seed.
        llm: the LLM, which is the teacher.
        model: what makes the prefix.
        tasks: of `dev_tasks`.
        share: (i, n): this process gets part i of n of every batch.
    """
    each = max(1, config.data.validation_items // len(tasks))
    queries = min(each, config.data.queries, *(len(task.items) for task in tasks))
    rows = [row for task in tasks for row in _rows(config, llm, model, task, each, queries)]
    size = config.train.batch_size
    rows = rows * -(-size // len(rows)) if len(rows) < size else rows[: len(rows) // size * size]
    contexts, shown, asked = zip(*rows, strict=True)
    x, y = zip(*(item for items in asked for item in items), strict=True)
    columns = [
        bucket(max(map(len, part))) for part in (contexts, shown, [*map(np.concatenate, zip(x, y, strict=True))])
    ]
    if model.reads_demos:
        columns[0] = model.columns(max(map(len, contexts)), config.data.demo_buckets)
    separate = llm.start_token is not None
    limits = (max(map(len, x)), bucket(max(map(len, y)))) if separate else (None, None)
    part, (index, count) = size // share[1], share
    return [
        _batch(rows[start + index * part : start + (index + 1) * part], columns, limits)
        for start in range(0, len(rows) // size * size, count * part)
    ]


def _rows(config, llm, model, task, count, queries):
    """(what the prefix is made of, what the teacher reads, (x, y) of so many queries) of a task's first `count` items, as far as
    they fill rows."""
    reader = model if model.reads_demos else KINDS["demonstrations"].beside(llm)
    context, shown = make_contexts(config, llm, reader, task, taught=True)
    if not model.reads_demos:
        context = np.zeros(0, np.int32)
    asked = [(item.x_tokens, item.options_tokens[item.label]) for item in task.items[:count]]
    whole = len(asked) // queries * queries
    return [(context, shown, asked[start : start + queries]) for start in range(0, whole, queries)]


def _batch(rows, columns, limits) -> Batch:
    contexts, shown, asked = zip(*rows, strict=True)
    demos, length = pad(contexts, columns[0])
    teacher, teacher_length = pad(shown, columns[1])
    queries = [[(np.concatenate(pair), len(pair[0])) for pair in items] for items in asked]
    query = Query(*pad_queries(queries, columns[2]), *limits)
    return Batch(demos, length, query, None, teacher_demos=teacher, teacher_demos_length=teacher_length)
