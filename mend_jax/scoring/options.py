"""Scores of answer options: mean log-probability per token, all options in one pass after a shared prefix.

Axes: R rows of one pass, X tokens of the encoder, T a row's tokens, U states that predict a target, K targets of one
state, P prefix, D width, V vocabulary.

An item is laid out as x followed by all options; each option continues x's positions and attends to the prefix, x and itself
(`LLM.cached_states`). The tokens that all options begin with are read once, after x. An option's last token is predicted but
never read. The last state that all options share predicts the next token of each of them. A row of a pass holds as many items
as fit, one after another, so that there is little padding, and all passes over a task have one shape. In an encoder–decoder
the encoder reads x and the row holds only the options, each after the start token, whose state predicts the first token.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError, at_place
from mend_jax.data.query import query_tokens
from mend_jax.data.templates import Template, chosen
from mend_jax.models.programs import program
from mend_jax.prefixes.context import bucket
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.distributed import to_host
from mend_jax.run.sharding import mesh_of, row_parts, sharding_rows_on

ATTENTION_BYTES = (
    2**30
)  # limit of one layer's float32 attention scores: longer rows go through the LLM in smaller batches
CPU_TOKENS = (
    1152  # tokens of one pass: enough for full speed, few enough that a layer's states stay in the processor's cache
)
CHUNK = 512  # states whose float32 logits exist at one time
ROW = 128  # tokens of a row that holds several items: one block of attention


class Row(NamedTuple):
    """One item laid out for a pass."""

    inputs: np.ndarray  # (X,) x, for an encoder; empty for a decoder-only LLM
    tokens: (
        np.ndarray
    )  # (T,) x, the options' common beginning (may be empty), then the rest of each without its last token
    positions: np.ndarray  # (T,) counted from the end of the prefix
    segments: np.ndarray  # (T,) 0 for tokens that all options share, j for option j, counted from 1
    sources: np.ndarray  # (U,) columns whose states predict a target
    targets: np.ndarray  # (U,K) the tokens they predict
    options: np.ndarray  # (U,K) the option a target belongs to, -1: none
    lengths: np.ndarray  # tokens of each option


class Pass(NamedTuple):
    """What the LLM reads in one pass."""

    rows: list[list[int]]  # the items of each row, one after another; at most `count` rows
    count: int  # R, padded
    inputs: int  # X, padded
    columns: int  # T, padded


def score_options(
    llm,
    prefix: Prefix,
    query,
    options,
    template: str | Template | None = None,
    *,
    separator: str | None = None,
    batch_size: int = 32,
) -> list[float] | list[list[float]]:
    """Scores how well each option continues the prefix and the query (paper, section 4.1; MetaICL's protocol).

    Args:
        llm: from `load_llm`.
        prefix: a prefix with one row: `no_prefix(1, width)`, `demonstrations_prefix`, `distiller.distill`, ...; or a pack.
        query: the input x: token ids, or a text if the LLM has a tokenizer; or a list of such inputs.
        options: the answers, to each of several queries the same: lists of token ids or, likewise, texts.
        template: the texts around a text query and before every text option, as in training: "space" (None), "newline", "qa"
            or "question" (docs/protocol.md), or a distiller's, `distiller.template`. None with a pack: the pack's own.
        separator: " " for "space" or "\n" for "newline", in the place of `template`.
        batch_size: of several queries: rows in one pass of the LLM, as in `score_items`.
    Returns:
        The mean log-probability (natural logarithm) per token of each option: float32 arithmetic, 0 is certain. Of several
        queries such a list for each.
    Raises:
        UserError: an empty query, no option or an empty one, texts without a tokenizer, an unknown template, several rows in
            the prefix, a prefix of another width, or more tokens than the LLM's window; of several queries it names the place
            of the wrong one, from 1.
    """
    if isinstance(options, str) or not hasattr(options, "__len__"):
        raise UserError(f"The options must be a list of texts or of lists of token ids, not {options!r}.")
    if len(options) == 0:
        raise UserError("There are no options to score: give at least one.")
    prefix, around = prefix_and_template(prefix, template, separator)
    answers = [query_tokens(llm, option, "option", around.output) for option in options]
    several, cache, rows = _are_several(query), cache_prefix(llm, prefix), []
    length = int(to_host(prefix.length)[0])
    for number, one in enumerate(query if several else [query], 1):
        with at_place(f"Query {number}" if several else ""):
            rows.append(lay_out(query_tokens(llm, one, "query", around.query), answers, llm.start_token))
            check_rows(llm, length, rows[-1:])
    scores = [found.tolist() for found in score_rows(llm, cache, rows, batch_size if several else 1)]
    return scores if several else scores[0]


def _are_several(query) -> bool:
    """Whether a caller's query is a list of queries: of texts, or of lists of token ids."""
    if not isinstance(query, list | tuple) and np.ndim(query) == 0:  # a text, or what `query_tokens` refuses
        return False
    return len(query) > 0 and (isinstance(query[0], str | list | tuple) or np.ndim(query[0]) == 1)


def prefix_and_template(given, template=None, separator=None) -> tuple[Prefix, Template]:
    """The prefix of a `Prefix` or a pack (packs/pack.py), and the template that a caller means; a pack has its own."""
    if isinstance(given, Prefix):
        return given, chosen(template, separator)
    if not isinstance(getattr(given, "prefix", None), Prefix):
        raise UserError(
            f"A prefix or a pack is needed, not {type(given).__name__}: distiller.distill(demos) makes a prefix."
        )
    return given.prefix, chosen(given.template if template is None and separator is None else template, separator)


def score_items(
    llm,
    cache,
    items: Sequence[Any],
    batch_size: int,
    params=None,
    chunk: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Option scores of many items after one prefix, in the items' order.

    Short items share a row, and all passes have one shape, so that there is little to compile and little padding.

    Args:
        llm: from `load_llm`.
        cache: from `cache_prefix`.
        items: each with `.x_tokens` and `.options_tokens`.
        batch_size: rows in one pass of the LLM, each as long as the longest item; several short items share a row. Passes
            with long rows have fewer of them.
        params: the LLM's; None means `llm.params`.
        chunk: states whose (chunk, V) float32 logits exist at one time.
        progress: called with the number of items finished since the last call.
    Returns:
        For each item the mean log-probability per token of its options, float64.
    Raises:
        UserError: an empty input, no option or an empty one, or an item longer than the LLM's window allows.
    """
    rows = [lay_out(item.x_tokens, item.options_tokens, llm.start_token) for item in items]
    return score_rows(llm, cache, rows, batch_size, params, chunk, progress)


def check_items(llm, prefix_length: int, items) -> None:
    """Raises the UserErrors that `score_items` would raise after a prefix of this length, without running the LLM."""
    rows = [lay_out(item.x_tokens, item.options_tokens, llm.start_token) for item in items]
    check_rows(llm, prefix_length, rows)


def cache_prefix(llm, prefix: Prefix, params=None):
    """Keys and values of a prefix of one row (see `LLM.prefix_cache`), compiled once per padded length."""
    rows, _, width = prefix.embeds.shape
    if rows != 1:
        raise UserError(f"The prefix has {rows} rows, but options are scored after one: distil one context at a time.")
    if width != llm.config.width:
        raise UserError(
            f"The prefix has width {width}, but the LLM's is {llm.config.width}: use the LLM that the prefix was made for."
        )
    length = int(to_host(prefix.length)[0])
    if length > llm.window:
        raise UserError(
            f"The prefix has {length} positions, the LLM reads at most {llm.window}: give fewer demonstrations."
        )
    return _cache(llm, llm.params if params is None else params, prefix)


def lay_out(x: Sequence[int], options: Sequence[Sequence[int]], start_token: int | None = None) -> Row:
    """The row of an input and its options (see the top of this file); `start_token` is the LLM's."""
    if len(x) == 0:
        raise UserError("An input is empty: every item needs at least one token before its options.")
    if len(options) == 0 or min(len(option) for option in options) == 0:
        raise UserError("An item has no option, or an empty one: every option needs at least one token.")
    if start_token is not None:
        return _lay_out_separate(x, options, start_token)
    shared = _shared(options)
    x, rest, first = [*x, *options[0][:shared]], [option[shared:] for option in options], len(x) - 1
    tokens, positions, segments = [x], [np.arange(len(x))], [np.zeros(len(x))]
    sources, later, owner, column = list(range(first, len(x))), [], [], len(x)
    for j, option in enumerate(rest):
        read = max(0, len(option) - 1)
        tokens.append(list(option[:read]))
        positions.append(len(x) + np.arange(read))
        segments.append(np.full(read, j + 1))
        sources.extend(range(column, column + read))
        later.extend(option[1:])
        owner.extend([j] * read)
        column += read
    targets = np.zeros((len(sources), len(options)), np.int32)
    owners = np.full_like(targets, -1)
    targets[:shared], owners[:shared] = np.asarray(x[first + 1 :], np.int32)[:, None], np.arange(len(options))
    for j, option in enumerate(rest):
        if len(option):
            targets[shared, j], owners[shared, j] = option[0], j
    targets[shared + 1 :, 0], owners[shared + 1 :, 0] = later, owner
    joined = (np.concatenate(parts).astype(np.int32) for parts in (tokens, positions, segments))
    lengths = np.asarray([len(o) for o in options])
    return Row(np.zeros(0, np.int32), *joined, np.asarray(sources, np.int32), targets, owners, lengths)


def _shared(options) -> int:
    """The number of tokens that all options begin with and that are read: an option's last token is not."""
    most = min(min(map(len, options)), max(map(len, options)) - 1)
    return next((i for i in range(most) if any(option[i] != options[0][i] for option in options)), most)


def _lay_out_separate(x, options, start_token: int) -> Row:
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
    llm, cache, rows: Sequence[Row], batch_size: int, params=None, chunk=CHUNK, progress=None
) -> list[np.ndarray]:
    """`score_items` for rows that are already laid out."""
    params = llm.params if params is None else params
    check_rows(llm, int(to_host(cache.length)) - llm.before, rows)
    scores: list[np.ndarray] = [np.zeros(0)] * len(rows)
    waiting = None  # the device computes a pass while the host lays out the next and reads the last
    require_batch_size(batch_size)
    for batch in plan(llm, cache, rows, batch_size, mesh_of(params)):
        items = [i for row in batch.rows for i in row]
        started = (items, [rows[i] for i in items], start(llm, params, cache, rows, batch, chunk))
        if waiting is not None:
            finish(waiting, scores, progress)
        waiting = started
    if waiting is not None:
        finish(waiting, scores, progress)
    return scores


def require_batch_size(batch_size: int) -> None:
    """Raises UserError for a number of rows that is none."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1.")


def plan(llm, cache, rows: Sequence[Row], batch_size: int, mesh=None) -> list[Pass]:
    """The passes over all items, long items first. The passes of a decoder-only LLM have one shape."""
    if llm.start_token is not None:
        return list(_plan_separate(llm, cache, rows, batch_size))
    if not rows:
        return []
    lengths, ways, P = [len(row.tokens) for row in rows], row_parts(mesh), cache.columns
    found = []
    for columns in row_columns(max(lengths), -(-sum(lengths) // ways)):
        bins = fill(lengths, columns)
        count = row_count(len(bins), min(most_rows(llm, P, columns), batch_size), ways)
        # A token's other products cost about as much as attention to this many more keys.
        cost = len(bins) + -len(bins) % count, 3 * llm.config.width + P + columns / 2
        found.append((cost[0] * columns * cost[1], columns, count, bins))
    _, columns, count, bins = min(found, key=lambda one: one[0])
    return [Pass(bins[start : start + count], count, 0, columns) for start in range(0, len(bins), count)]


def most_rows(llm, prefix: int, columns: int) -> int:
    """How many rows of so many columns go through a decoder-only LLM at once, after a prefix of `prefix` columns."""
    most = ATTENTION_BYTES // (4 * llm.config.heads * columns * (prefix + columns))
    return max(1, min(most, CPU_TOKENS // columns) if jax.default_backend() == "cpu" else most)


def row_columns(longest: int, total: int) -> list[int]:
    """The few row lengths to choose from: longer rows leave fewer columns empty, but more of a token's row is masked.

    Each device reads `total` tokens.
    """
    if longest <= ROW:
        least = max(bucket(longest), min(ROW, bucket(total)))
        return [least, *(columns for columns in (160, 192, 256, 384) if least >= ROW and columns <= total)]
    step = max(8, 1 << (longest.bit_length() - 6))  # at most 1/32 of a row is padding
    least = longest + -longest % step
    return [least, *(columns for columns in (least * 5 // 4, least * 3 // 2, 2 * least) if columns <= total)]


def row_count(needed: int, most: int, ways: int) -> int:
    """Rows per pass for `needed` rows, at most about `most`: of the numbers that leave the fewest rows empty, the largest."""
    counts = range(min(most, needed), max(1, most // 2) - 1, -1) if needed > most // 2 else [needed]
    count = min(counts, key=lambda count: needed + -needed % count)
    return count + -count % ways if ways <= most else count


def fill(lengths: Sequence[int], columns: int) -> list[list[int]]:
    """The indices of the items in each row of `columns` tokens: longest first, each in the first row that has room for it."""
    rows, room, first = [], [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((j for j in range(first, len(rows)) if room[j] >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(columns)
        rows[place].append(i)
        room[place] -= lengths[i]
        while first < len(rows) and room[first] < 1:
            first += 1
    return rows


def _plan_separate(llm, cache, rows, batch_size):
    """The passes of an encoder–decoder: one item per row, a power of two of rows, and lengths padded to buckets."""
    P, order = cache.columns, sorted(range(len(rows)), key=lambda i: -len(rows[i].inputs) - len(rows[i].tokens))
    most = min(batch_size, 1 << (len(rows) - 1).bit_length()) if rows else batch_size
    while order:
        X, T = (bucket(max(len(rows[i][part]) for i in order[:most])) for part in (0, 1))
        one = 4 * llm.config.heads * max(T * (P + X + T), (P + X) ** 2)
        count = max(1, min(most, 1 << (max(1, ATTENTION_BYTES // one).bit_length() - 1)))
        yield Pass([[i] for i in order[:count]], count, X, T)
        order = order[count:]


def _states_padded(count: int) -> int:
    """The padded number of states that go through the head together: one of few sizes, because each is compiled."""
    return bucket(count) if count <= 64 else count + -count % 32


def start(llm, params, cache, rows, batch: Pass, chunk=CHUNK, states_padded=_states_padded):
    """Dispatches one pass; returns a list of (log-probabilities (C,K) on the device, how many of the C rows count).

    `cache` holds the one prefix of all rows of the pass, or one for each; `states_padded` pads the number of states.
    """
    tokens, positions = np.zeros((2, batch.count, batch.columns), np.int32)
    inputs, input_length = np.zeros((batch.count, batch.inputs), np.int32), np.zeros(batch.count, np.int32)
    segments, items = np.full((2, batch.count, batch.columns), -1, np.int32)
    where, source, picked = [], [], [rows[i] for row in batch.rows for i in row]
    for r, held in enumerate(batch.rows):
        start = 0
        for i in held:
            row, here = rows[i], slice(start, start + len(rows[i].tokens))
            tokens[r, here], positions[r, here], segments[r, here] = row.tokens, row.positions, row.segments
            items[r, here] = i
            inputs[r, : len(row.inputs)], input_length[r] = row.inputs, len(row.inputs)
            where.append(np.full(len(row.sources), r, np.int32))
            source.append(row.sources + start)
            start = here.stop
    with sharding_rows_on(mesh_of(params), batch.count):
        if llm.start_token is None:
            states = _states(llm, params, cache, tokens, positions, segments, items)
        else:
            states = _states(llm, params, cache, inputs, input_length, tokens, segments)
    where, source = np.concatenate(where), np.concatenate(source)
    K = 1 << (max(row.targets.shape[1] for row in picked) - 1).bit_length()
    targets = np.concatenate([np.pad(row.targets, ((0, 0), (0, K - row.targets.shape[1]))) for row in picked])
    parts = []
    for start in range(0, len(source), chunk):
        stop = min(start + chunk, len(source))
        padding = min(chunk, states_padded(stop - start)) - (stop - start)
        part = [np.pad(a[start:stop], ((0, padding), *((0, 0),) * (a.ndim - 1))) for a in (where, source, targets)]
        parts.append((_log_probs(llm, params, states, *part), stop - start))
    return parts


def finish(waiting, scores, progress=None) -> None:
    """Waits for a pass, (its items, their rows, what `start` returned), and writes its items' scores in place."""
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


def check_rows(llm, prefix_length: int, rows: Sequence[Row]) -> None:
    """Raises UserError for a row that, after a prefix of this length, is longer than the LLM's window, or that holds tokens which
    the LLM does not know."""
    for row in rows:
        needed = prefix_length + int(row.positions.max()) + 1
        if needed > llm.window:
            raise UserError(
                f"A query with its longest option needs {needed} positions, {prefix_length} of them the prefix; the LLM"
                f" reads at most {llm.window}: shorten the input, or make the prefix shorter (prefix.length, or fewer"
                " demonstrations)."
            )
        parts = (row.tokens, row.targets, row.inputs)
        largest, least = max(int(a.max(initial=0)) for a in parts), min(int(a.min(initial=0)) for a in parts)
        wrong = least if least < 0 else largest
        if least < 0 or largest >= llm.config.vocab_size:
            raise UserError(
                f"A query holds token {wrong}, but the LLM in {llm.path} knows {llm.config.vocab_size} tokens: use the LLM's"
                " own tokenizer."
            )


@program
def _cache(llm, params, prefix):
    return llm.prefix_cache(params, prefix)


@program
def _states(llm, params, cache, *rows):
    return llm.cached_states(params, cache, *rows)


@program
def _log_probs(llm, params, states, rows, columns, targets):
    """Log-probabilities (C,K) of the targets of C states of (R,T,D)."""
    logits = llm.logits(params, states[rows, columns][None])[0].astype(jnp.float32)
    return jnp.take_along_axis(logits, targets, 1) - jax.nn.logsumexp(logits, axis=1, keepdims=True)
