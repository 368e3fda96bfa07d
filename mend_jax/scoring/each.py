"""Option scores of items that each have their own prefix: prefixes and items in batches, one item in a row of a pass.

Axes: B prefixes and items at a time, P prefix.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mend_jax.models.programs import program
from mend_jax.prefixes.context import bucket
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.distributed import to_host
from mend_jax.run.sharding import mesh_of, row_parts
from mend_jax.scoring import costs
from mend_jax.scoring.options import CHUNK, Pass, check_rows, finish, lay_out, start

CACHE_BYTES = 2**32  # about what the keys and values of the prefixes at one time may take
PREFIX = 1024  # positions of a prefix for this estimate, at most


def prefixes_at_once(llm, batch_size: int, count: int, params) -> int:
    """B for `count` items: at most `batch_size` and what memory allows."""
    one = costs.cache_bytes(llm.config, min(llm.window, PREFIX), jnp.dtype(llm.dtype).itemsize)
    ways = row_parts(mesh_of(params))
    most = max(1, min(batch_size, CACHE_BYTES // one, count))
    return most + -most % ways


def cache_prefixes(llm, prefix: Prefix, params=None):
    """Keys and values of B prefixes, one for each row that is read after them."""
    return _caches(llm, llm.params if params is None else params, prefix)


def pass_size(llm, items: Sequence[Any]) -> tuple[int, int]:
    """(padded tokens of an encoder–decoder's input, padded tokens of a row) that hold the longest of the items."""
    rows = [lay_out(item.x_tokens, item.options_tokens, llm.start_token) for item in items]
    inputs = 0 if llm.start_token is None else bucket(max(len(row.inputs) for row in rows))
    return inputs, bucket(max(len(row.tokens) for row in rows))


def score_each(
    llm, cache, items: Sequence[Any], size: tuple[int, int], params=None, chunk=CHUNK, progress=None
) -> list[np.ndarray]:
    """Option scores of at most B items, each after its own prefix.

    Args:
        llm: from `load_llm`.
        cache: from `cache_prefixes`; rows of the cache beyond the items are not used.
        items: each with `.x_tokens` and `.options_tokens`.
        size: `pass_size` of all items that will be scored: passes have one shape.
        params, chunk, progress: as in `score_items`.
    Returns:
        For each item the mean log-probability per token of its options, float64.
    Raises:
        UserError: as `score_items`.
    """
    params = llm.params if params is None else params
    lengths = to_host(cache.length)
    rows = [lay_out(item.x_tokens, item.options_tokens, llm.start_token) for item in items]
    for row, length in zip(rows, lengths, strict=False):
        check_rows(llm, int(length) - llm.before, [row])
    batch = Pass([[i] for i in range(len(rows))], len(lengths), *size)
    scores: list[np.ndarray] = [np.zeros(0)] * len(rows)
    parts = start(llm, params, cache, rows, batch, chunk)
    finish((list(range(len(rows))), rows, parts), scores, progress)
    return scores


@program
def _caches(llm, params, prefix):
    return llm.prefix_caches(params, prefix)
