"""Scores of answer options: mean log-probability per token, all options in one pass after a shared prefix.

Axes: R rows (items of one pass), X tokens of the encoder, T a row's tokens (input x, then the options), U states that
predict something, K targets of one state, P prefix, D width, V vocabulary.

A row holds x once and behind it every option, each continuing x's positions and seeing the prefix, x and itself
(`LLM.cached_states`). An option's last token is predicted but never read. The last state of x predicts the first
token of every option. Of an encoder–decoder the encoder reads x, and the row holds the options alone, each behind the
start token, whose state predicts the first token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data.query import query_tokens
from mend_jax.prefixes.context import bucket
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.distributed import to_host
from mend_jax.run.sharding import mesh_of, rows_on

ATTENTION_BYTES = 2**30  # of one layer's float32 attention scores: longer rows go through the LLM in smaller batches


class Row(NamedTuple):
    """One item laid out for one pass."""

    inputs: np.ndarray  # (X,) what an encoder reads: x; empty for a decoder-only LLM
    tokens: np.ndarray  # (T,) x (or nothing), then each option but its last token
    positions: np.ndarray  # (T,) from the end of the prefix
    segments: np.ndarray  # (T,) 0 for x, j for option j from 1
    sources: np.ndarray  # (U,) columns whose states predict
    targets: np.ndarray  # (U,K) the tokens they predict
    options: np.ndarray  # (U,K) the option a target belongs to, -1: none
    lengths: np.ndarray  # tokens of each option


def score_options(llm, prefix: Prefix, query, options, separator: str = " ") -> list[float]:
    """How well each option continues the prefix and the query (paper, section 4.1; MetaICL's protocol).

    Args:
        llm: of `load_llm`.
        prefix: with one row: `no_prefix(1, width)`, `demonstrations_prefix`, `distiller.distill`, ...
        query: the input x: token ids, or a text where the LLM has a tokenizer.
        options: the answers, likewise: lists of token ids, or texts.
        separator: stands before the query and every option of texts, as in training; that of a distiller is
            `distiller.separator`.
    Returns:
        The mean log-probability (natural logarithm) per token of each option: float32 arithmetic, 0 is certain.
    Raises:
        UserError: an empty query, no option or an empty one, texts without a tokenizer, several rows in the prefix, a
            prefix of another width, or more tokens than the LLM's window.
    """
    if isinstance(options, str) or not hasattr(options, "__len__"):
        raise UserError(f"The options are a list of texts or of lists of token ids, not {options!r}.")
    if len(options) == 0:
        raise UserError("There are no options to score: give at least one.")
    x = query_tokens(llm, query, "query", separator)
    row = lay_out(x, [query_tokens(llm, option, "option", separator) for option in options], llm.start_token)
    return [float(score) for score in score_rows(llm, cache_prefix(llm, prefix), [row], 1)[0]]


def score_items(
    llm,
    cache,
    items: Sequence[Any],
    batch_size: int,
    params=None,
    chunk: int = 512,
    progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Option scores of many items after one prefix, in the items' order.

    Items of similar length share a pass; its shape is one of few, so that little is compiled and little is padding.

    Args:
        llm: of `load_llm`.
        cache: of `cache_prefix`.
        items: each with `.x_tokens` and `.options_tokens`.
        batch_size: items in one pass of the LLM; long ones go in smaller batches.
        params: of the LLM; None is `llm.params`.
        chunk: states whose (chunk, V) float32 logits exist at one time.
        progress: called with the number of items that were finished.
    Returns:
        For each item the mean log-probability per token of its options, float64.
    Raises:
        UserError: an empty input, no option or an empty one, or an item longer than the LLM's window allows.
    """
    rows = [lay_out(item.x_tokens, item.options_tokens, llm.start_token) for item in items]
    return score_rows(llm, cache, rows, batch_size, params, chunk, progress)


def check_items(llm, prefix_length: int, items) -> None:
    """Raises the UserErrors that `score_items` would after a prefix of this length, without reading anything."""
    _check_rows(llm, prefix_length, [lay_out(item.x_tokens, item.options_tokens) for item in items])


def cache_prefix(llm, prefix: Prefix, params=None):
    """Keys and values of a prefix of one row (see `LLM.prefix_cache`), compiled once per padded length."""
    rows, _, width = prefix.embeds.shape
    if rows != 1:
        raise UserError(f"The prefix has {rows} rows, options are scored after one: distil one context at a time.")
    if width != llm.config.width:
        raise UserError(
            f"The prefix has width {width}, the LLM reads {llm.config.width}: take the LLM it was made for."
        )
    length = int(to_host(prefix.length)[0])
    if length > llm.window:
        raise UserError(
            f"The prefix has {length} positions, the LLM reads at most {llm.window}"
            f"{llm.config.window_reason}: give fewer demonstrations."
        )
    return _cache(llm, llm.params if params is None else params, prefix)


def lay_out(x: Sequence[int], options: Sequence[Sequence[int]], start_token: int | None = None) -> Row:
    """The row of an input and its options (see the top of this file); `start_token` is the LLM's."""
    if len(x) == 0:
        raise UserError("An input is empty: every item needs at least one token before its options.")
    if len(options) == 0 or min(len(option) for option in options) == 0:
        raise UserError("An item has no option, or an empty one: every option needs at least one token.")
    if start_token is not None:
        return _lay_out_apart(x, options, start_token)
    tokens, positions, segments = [list(x)], [np.arange(len(x))], [np.zeros(len(x))]
    first = [option[0] for option in options]
    sources, later, owner, column = [len(x) - 1], [], [], len(x)
    for j, option in enumerate(options):
        read = len(option) - 1
        tokens.append(list(option[:-1]))
        positions.append(len(x) + np.arange(read))
        segments.append(np.full(read, j + 1))
        sources.extend(range(column, column + read))
        later.extend(option[1:])
        owner.extend([j] * read)
        column += read
    targets = np.zeros((len(sources), len(options)), np.int32)
    owners = np.full_like(targets, -1)
    targets[0], owners[0] = first, np.arange(len(options))
    targets[1:, 0], owners[1:, 0] = later, owner
    joined = (np.concatenate(parts).astype(np.int32) for parts in (tokens, positions, segments))
    lengths = np.asarray([len(o) for o in options])
    return Row(np.zeros(0, np.int32), *joined, np.asarray(sources, np.int32), targets, owners, lengths)


def _lay_out_apart(x, options, start_token: int) -> Row:
    """The row of an encoder–decoder: every column predicts one token of its own option."""
    lengths = np.asarray([len(option) for option in options])
    owner = np.repeat(np.arange(len(options)), lengths)
    tokens = np.concatenate([[start_token, *option[:-1]] for option in options]).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])
    targets, owners = np.zeros((2, len(tokens), len(options)), np.int32)
    targets[:, 0], owners[:] = np.concatenate([np.asarray(option) for option in options]), -1
    owners[:, 0] = owner
    columns = np.arange(len(tokens), dtype=np.int32)
    return Row(np.asarray(x, np.int32), tokens, positions, owner + 1, columns, targets, owners, lengths)


def score_rows(
    llm, cache, rows: Sequence[Row], batch_size: int, params=None, chunk=512, progress=None
) -> list[np.ndarray]:
    """`score_items` for rows that are laid out."""
    params = llm.params if params is None else params
    _check_rows(llm, int(to_host(cache.length)), rows)
    scores: list[np.ndarray] = [np.zeros(0)] * len(rows)
    waiting = None  # the device computes a batch while the host lays out the next and reads the last
    for batch, count, *columns in _batches(llm, cache, rows, batch_size):
        picked = [rows[i] for i in batch]
        started = (batch, picked, _start(llm, params, cache, picked, count, *columns, chunk))
        if waiting is not None:
            _finish(waiting, scores, progress)
        waiting = started
    if waiting is not None:
        _finish(waiting, scores, progress)
    return scores


def _batches(llm, cache, rows, batch_size):
    """(indices of rows, padded number of rows, X and T), longest first, so that the partial batch is the shortest."""
    P, order = cache.columns, sorted(range(len(rows)), key=lambda i: -len(rows[i].inputs) - len(rows[i].tokens))
    most = min(batch_size, 1 << (len(rows) - 1).bit_length()) if rows else batch_size
    while order:
        inputs, columns = (max(len(rows[i][part]) for i in order[:most]) for part in (0, 1))
        X, T = bucket(inputs) if inputs else 0, bucket(columns)
        one = 4 * llm.config.heads * max(T * (P + X + T), (P + X) ** 2 if X else 0)
        count = max(1, min(most, 1 << (max(1, ATTENTION_BYTES // one).bit_length() - 1)))
        yield order[:count], count, X, T
        order = order[count:]


def _start(llm, params, cache, rows, count, input_columns, columns, chunk):
    """Dispatches one pass: a list of (log-probabilities (C,K) on the device, how many of them count)."""
    tokens, positions = np.zeros((2, count, columns), np.int32)
    inputs, input_length = np.zeros((count, input_columns), np.int32), np.zeros(count, np.int32)
    segments = np.full((count, columns), -1, np.int32)
    for i, row in enumerate(rows):
        used = len(row.tokens)
        tokens[i, :used], positions[i, :used], segments[i, :used] = row.tokens, row.positions, row.segments
        inputs[i, : len(row.inputs)], input_length[i] = row.inputs, len(row.inputs)
    with rows_on(mesh_of(params), count):
        if llm.start_token is None:
            states = _states(llm, params, cache, tokens, positions, segments)
        else:
            states = _states(llm, params, cache, inputs, input_length, tokens, segments)
    where = np.concatenate([np.full(len(row.sources), i, np.int32) for i, row in enumerate(rows)])
    source = np.concatenate([row.sources for row in rows])
    K = 1 << (max(row.targets.shape[1] for row in rows) - 1).bit_length()
    targets = np.concatenate([np.pad(row.targets, ((0, 0), (0, K - row.targets.shape[1]))) for row in rows])
    parts = []
    for start in range(0, len(source), chunk):
        stop = min(start + chunk, len(source))
        padding = min(chunk, bucket(stop - start)) - (stop - start)
        part = [np.pad(a[start:stop], ((0, padding), *((0, 0),) * (a.ndim - 1))) for a in (where, source, targets)]
        parts.append((_log_probs(llm, params, states, *part), stop - start))
    return parts


def _finish(waiting, scores, progress) -> None:
    """Waits for a pass and writes its rows' scores in place."""
    batch, rows, parts = waiting
    log_probs = np.concatenate([to_host(values)[:count] for values, count in parts]).astype(np.float64)
    start = 0
    for i, row in zip(batch, rows, strict=True):
        values = log_probs[start : start + len(row.sources), : row.options.shape[1]]
        start += len(row.sources)
        counted = row.options >= 0
        sums = np.bincount(row.options[counted], values[counted], minlength=len(row.lengths))
        scores[i] = sums / row.lengths
    if progress is not None:
        progress(len(batch))


def _check_rows(llm, prefix_length: int, rows) -> None:
    for row in rows:
        needed = prefix_length + int(row.positions.max()) + 1
        if needed > llm.window:
            raise UserError(
                f"A query with its longest option needs {needed} positions, {prefix_length} of them the prefix; the LLM"
                f" reads at most {llm.window}{llm.config.window_reason}: shorten the input, or make the prefix shorter (prefix.length, or fewer"
                " demonstrations)."
            )
        parts = (row.tokens, row.targets, row.inputs)
        largest, least = max(int(a.max(initial=0)) for a in parts), min(int(a.min(initial=0)) for a in parts)
        wrong = least if least < 0 else largest
        if least < 0 or largest >= llm.config.vocab_size:
            raise UserError(
                f"A query holds token {wrong}, the LLM in {llm.path} has {llm.config.vocab_size}: use the LLM's own"
                " tokenizer."
            )


# The LLM is a static argument (it hashes by identity) and its params a traced one: each shape is compiled once.
@partial(jax.jit, static_argnums=0)
def _cache(llm, params, prefix):
    return llm.prefix_cache(params, prefix)


@partial(jax.jit, static_argnums=0)
def _states(llm, params, cache, *rows):
    return llm.cached_states(params, cache, *rows)


@partial(jax.jit, static_argnums=0)
def _log_probs(llm, params, states, rows, columns, targets):
    """Log-probabilities (C,K) of the targets of C states of (R,T,D)."""
    logits = llm.logits(params, states[rows, columns][None])[0].astype(jnp.float32)
    return jnp.take_along_axis(logits, targets, 1) - jax.nn.logsumexp(logits, axis=1, keepdims=True)
