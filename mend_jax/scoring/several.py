"""Scores of items that follow several prefixes, in as few passes as fit: one item a row, the row after its item's own prefix.

scoring/options.py says how an item is laid out, and has the passes for many items after one prefix, whose shapes fit these items
alone. Here items come in any number and from anyone, so that rows and columns are padded to few sizes: each shape is compiled.
"""

from collections.abc import Sequence

import jax
import numpy as np

from mend_jax.prefixes.context import bucket, bucket_rows
from mend_jax.scoring.options import Pass, Row, finish, most_rows, start


def score_several(llm, cache, of: Sequence[int], rows: Sequence[Row], batch_size: int) -> list[np.ndarray]:
    """The mean log-probability per token of the options of each item, float64.

    Args:
        llm: from `load_llm`.
        cache: the one prefix of all items, or several (`LLM.prefix_caches`).
        of: the number of each item's prefix.
        rows: the items, from `lay_out`, which fit the LLM's window behind their prefixes (`check_rows`).
        batch_size: items in one pass, at most.
    """
    scores: list[np.ndarray] = [np.zeros(0)] * len(rows)
    order, waiting = sorted(range(len(rows)), key=lambda i: -len(rows[i].inputs) - len(rows[i].tokens)), []
    while order:
        inputs, columns = (bucket(max(len(rows[i][part]) for i in order)) for part in (0, 1))
        read = 0 if llm.start_token is None else cache.columns + inputs  # by an encoder, each token of which sees all
        most = min(batch_size, most_rows(llm, cache.columns + inputs, max(columns, read)))
        batch, order = order[:most], order[most:]
        count = bucket_rows(len(batch))
        one = Pass([[i] for i in batch], count, inputs, columns)
        passed = start(llm, llm.params, after(cache, [of[i] for i in batch], count), rows, one, states_padded=bucket)
        waiting.append((batch, [rows[i] for i in batch], passed))
    for one in waiting:
        finish(one, scores)
    return scores


def after(cache, of: Sequence[int], count: int):
    """What each of `count` rows reads first: the one prefix of all, or of several the one with its number in `of`."""
    if cache.length.ndim == 0:
        return cache
    return _take(cache, np.asarray([*of, *[0] * (count - len(of))], np.int32))


@jax.jit
def _take(cache, rows):
    return cache.take(rows)
