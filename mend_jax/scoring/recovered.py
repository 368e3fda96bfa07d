"""How much of what the demonstrations tell the LLM a prefix recovers: 1 - KL(prefix) / KL(nothing).

KL(prefix) is L_distill on held-out queries: how far the LLM's predictions after the prefix are from those after the demonstrations
themselves; KL(nothing) is the same without any prefix. 1 is as good as the demonstrations, 0 no better than nothing, and below 0
the prefix misleads.

Axes: B batch, N demonstration tokens, Q query tokens.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mend_jax.data.batches import Batch, pad
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
    """Dev items with their right answers as batches of train.batch_size rows, all of one shape.

    Args:
        config: a whole run's config; about data.validation_items items are taken, the first of each task and seed.
        llm: the LLM, which is the teacher.
        model: what makes the prefix.
        tasks: of `dev_tasks`.
        share: (i, n): this process gets part i of n of every batch.
    """
    each = max(1, config.data.validation_items // len(tasks))
    rows = [row for task in tasks for row in _rows(config, llm, model, task, each)]
    size = config.train.batch_size
    rows = rows * -(-size // len(rows)) if len(rows) < size else rows[: len(rows) // size * size]
    contexts, shown, x, y = zip(*rows, strict=True)
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


def _rows(config, llm, model, task, count):
    """(what the prefix is made of, what the teacher reads, x, y) of a task's first items."""
    reader = model if model.reads_demos else KINDS["demonstrations"].beside(llm)
    context, shown = make_contexts(config, llm, reader, task, taught=True)
    if not model.reads_demos:
        context = np.zeros(0, np.int32)
    return [(context, shown, item.x_tokens, item.options_tokens[item.label]) for item in task.items[:count]]


def _batch(rows, columns, limits) -> Batch:
    contexts, shown, x, y = zip(*rows, strict=True)
    demos, length = pad(contexts, columns[0])
    teacher, teacher_length = pad(shown, columns[1])
    tokens, query_length = pad([np.concatenate(pair) for pair in zip(x, y, strict=True)], columns[2])
    query = Query(tokens, query_length, np.asarray([len(a) for a in x], np.int32), *limits)
    return Batch(demos, length, query, None, teacher_demos=teacher, teacher_demos_length=teacher_length)
