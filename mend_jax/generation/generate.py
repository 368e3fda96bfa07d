"""Answers in the LLM's own words: tokens after a shared prefix and a query, one after another.

The prefix is read once, then each query of a batch, then a token of every answer at a time; keys and values are kept
(`LLM.prefill`, `LLM.decode_next`). Tokens are made several in one call of the device; between calls the texts are looked through
for stop strings. A row's draws are a function of (seed, its number, the token's place), whatever else is in its batch.

Axes: B rows of a batch, X tokens of a query, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data.query import query_tokens
from mend_jax.data.templates import Template
from mend_jax.generation.sampling import choose
from mend_jax.models.programs import program
from mend_jax.prefixes.context import bucket, bucket_rows
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.distributed import to_host
from mend_jax.scoring.options import cache_prefix, prefix_and_template, require_batch_size

STEPS = 16  # tokens of every answer between two looks at the texts
END, STOP, LENGTH = "end", "stop", "length"  # why an answer is over: the LLM ended it, a stop string, max_tokens


class Answer(NamedTuple):
    """What the LLM answered to one query."""

    # Without the stop string, also where max_tokens cut it, and what the template puts before an answer; "" where the LLM has
    # no tokenizer.
    text: str
    tokens: list[int]  # all that were made, without the one that ends a text
    finish: str  # END, STOP or LENGTH


class Wanted(NamedTuple):
    """What answers are asked for."""

    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int
    answer: str  # what the template puts before an answer


def generate_text(
    llm,
    prefix: Prefix,
    queries,
    max_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    template: str | Template | None = None,
    batch_size: int = 8,
    params=None,
    progress: Callable[[int], None] | None = None,
) -> Answer | list[Answer]:
    """The LLM's answers to queries after a prefix.

    Args:
        llm: from `load_llm`.
        prefix: a prefix with one row: `demonstrations_prefix`, `distiller.distill`, ...; or a pack.
        queries: inputs x, each a text or token ids; or a single text.
        max_tokens: of an answer, at most.
        temperature: 0: the likeliest token each time; else tokens are drawn from the LLM's predictions at this temperature.
        top_p: in (0, 1]: only the likeliest tokens are drawn whose probabilities add up to it.
        stop: texts before which an answer ends; None: those that the template puts before the next example and before a
            second answer, if they have more than spaces. An answer also ends where the LLM ends its text (the tokenizer's EOS);
            one that `max_tokens` ends is without the part of a stop that it may end with.
        seed: of the draws.
        template: the texts around the query, as in `score_options`; None with a pack: the pack's own.
        batch_size: queries that are answered together.
        params: the LLM's; None means `llm.params`.
        progress: called with the number of queries answered since the last call.
    Returns:
        An `Answer` for each query; for a single text one `Answer`.
    Raises:
        UserError: an empty query, a number out of its range, texts or stop strings without a tokenizer, a prefix of several rows or of another
            width, or a query that leaves the LLM's window no room for `max_tokens`.
    """
    (prefix, around), single = prefix_and_template(prefix, template), isinstance(queries, str)
    if stop is None:
        stop = around.stops if llm.tokenizer is not None else ()
    stop = tuple(filter(None, (stop,) if isinstance(stop, str) else stop))
    wanted = Wanted(max_tokens, temperature, top_p, stop, seed, around.answer)
    require_batch_size(batch_size)
    require_wanted(llm, wanted)
    length = int(to_host(prefix.length)[0])
    rows = [read_query(llm, query, around, length, wanted) for query in ([queries] if single else queries)]
    params = llm.params if params is None else params
    cache, answers = cache_prefix(llm, prefix, params), [Answer("", [], LENGTH)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # queries of like lengths together
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        made = answer_rows(llm, params, cache, [rows[i] for i in batch], batch, [wanted] * len(batch))
        for i, answer in zip(batch, made, strict=True):
            answers[i] = answer
        if progress is not None:
            progress(len(batch))
    return answers[0] if single else answers


def end_tokens(llm) -> tuple[int, ...]:
    """The tokens with which the LLM ends a text; none where its tokenizer names none."""
    end = getattr(llm.tokenizer, "eos_token_id", None)
    return () if end is None else (int(end),)


def read_query(llm, query, around: Template, prefix_length: int, wanted: Wanted) -> list[int]:
    """The tokens of a query in its template, which with its prefix and its answer fits the LLM's window.

    Raises the UserErrors of `generate_text`.
    """
    require_wanted(llm, wanted)
    row = query_tokens(llm, query, "query", around.query)
    _check_row(llm, prefix_length, row, wanted.max_tokens)
    return row


def require_wanted(llm, wanted: Wanted) -> None:
    """Raises UserError for numbers out of their range, or stop strings without a tokenizer."""
    for name, value, holds, range_ in (
        ("max_tokens", wanted.max_tokens, wanted.max_tokens >= 1, "at least 1"),
        ("temperature", wanted.temperature, 0 <= wanted.temperature < float("inf"), "0 or more"),
        ("top_p", wanted.top_p, 0 < wanted.top_p <= 1, "above 0 and at most 1"),
        ("seed", wanted.seed, -(2**31) <= wanted.seed < 2**31, "a whole number of 32 bits"),
    ):
        if not holds:
            raise UserError(f"{name} is {value}: it must be {range_}.")
    if wanted.stop and llm.tokenizer is None:
        raise UserError(f"Stop strings need a tokenizer, but the LLM in {llm.path} has none: give stop=().")


def _check_row(llm, prefix_length: int, row: Sequence[int], max_tokens: int) -> None:
    if len(row) == 0:
        raise UserError("A query is empty: it needs at least one token.")
    if not 0 <= min(row) <= max(row) < llm.config.vocab_size:
        wrong = min(row) if min(row) < 0 else max(row)
        raise UserError(
            f"A query holds token {wrong}, but the LLM in {llm.path} knows {llm.config.vocab_size} tokens: use the LLM's own tokenizer."
        )
    needed = prefix_length + len(row) + max_tokens
    if needed > llm.window:
        raise UserError(
            f"A query of {len(row)} tokens and an answer of {max_tokens} need {needed} positions, {prefix_length} of them the prefix; the"
            f" LLM reads at most {llm.window}: shorten the query, ask for fewer tokens (max_tokens), or make the prefix shorter."
        )


def answer_rows(llm, params, cache, rows, numbers, wanted: Sequence[Wanted], room: int = 0) -> list[Answer]:
    """The answers to one batch of queries.

    Args:
        cache: the one prefix of all of them, or one for each of `bucket_rows(len(rows))` rows.
        rows: their tokens, from `read_query`.
        numbers: the place of each among the queries of its seed: its draws depend on the two.
        wanted: what is asked for each; the temperature is 0 for all or for none.
        room: tokens of an answer that there is room for at least: each number is compiled.
    """
    B, most = bucket_rows(len(rows)), max(room, *(one.max_tokens for one in wanted))
    steps = min(STEPS, most)
    inputs = np.zeros((B, bucket(max(map(len, rows)))), np.int32)
    for target, row in zip(inputs, rows, strict=False):
        target[: len(row)] = row
    length = np.asarray([len(row) for row in rows] + [1] * (B - len(rows)), np.int32)
    kept, states = _prefill(llm, params, cache, inputs, length, -(-most // steps) * steps)
    seeds, numbers, temperature, top_p = _of_rows(B, numbers, wanted)
    keys = _keys(seeds, numbers)
    ends = np.asarray(end_tokens(llm) or (-1,), np.int32)
    made, over = np.zeros((B, 0), np.int32), np.arange(B) >= len(rows)
    found: list[Answer | None] = [None] * len(rows)
    draws = (temperature, top_p) if temperature.any() else None
    while not over.all():
        kept, states, tokens = _decode(llm, params, kept, states, keys, made.shape[1], draws, steps)
        made = np.concatenate([made, to_host(tokens)], 1)
        for b in np.flatnonzero(~over):
            found[b] = _finished(llm.tokenizer, made[b], ends, wanted[b])
            over[b] = found[b] is not None
    return found


def _of_rows(count: int, numbers, wanted: Sequence[Wanted]):
    """Seeds (B,), numbers (B,) int32, temperatures (B,1) and top_p (B,1) float32 of `count` rows, the last of them padding."""
    padding = [wanted[0]] * (count - len(wanted))
    wanted, numbers = [*wanted, *padding], [*numbers, *[0] * len(padding)]
    ints = (np.asarray(values, np.int32) for values in ([one.seed for one in wanted], numbers))
    floats = (
        np.asarray(values, np.float32)[:, None]
        for values in zip(*((one.temperature, one.top_p) for one in wanted), strict=True)
    )
    return *ints, *floats


def _finished(tokenizer, made: np.ndarray, ends, wanted: Wanted) -> Answer | None:
    """The answer of the tokens made so far, if it is over."""
    at = np.flatnonzero(np.isin(made[: wanted.max_tokens], ends))
    over = END if len(at) else LENGTH if len(made) >= wanted.max_tokens else None
    tokens = made[: at[0] if len(at) else wanted.max_tokens].tolist()
    if tokenizer is None:
        return None if over is None else Answer("", tokens, over)
    text = tokenizer.decode(tokens, skip_special_tokens=True).removeprefix(wanted.answer)
    where = [place for place in (text.find(stop) for stop in wanted.stop) if place >= 0]
    if where:
        return Answer(text[: min(where)], tokens, STOP)
    if over == LENGTH:
        text = _without_begun_stop(text, wanted.stop)
    return None if over is None else Answer(text, tokens, over)


def _without_begun_stop(text: str, stops: Sequence[str]) -> str:
    """A text without the first half of a stop string, which one more token might have completed."""
    begun = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return text[: len(text) - max(begun, default=0)]


@program(static=(5,))
def _prefill(llm, params, cache, inputs, length, room):
    return llm.prefill(params, cache, inputs, length, room)


@jax.jit
def _keys(seeds, numbers):
    """A key for each row."""
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)


@program(static=(7,), donate=(2,))
def _decode(llm, params, kept, states, keys, done, draws, steps):
    """`steps` tokens more of each answer, which has `done`: (kept, states (B,D), tokens (B,steps)).

    `draws` is None, for the likeliest token each time, or (temperature (B,1), top_p (B,1)).
    """

    def step(carry, at):
        kept, states = carry
        logits = llm.logits(params, states[:, None])[:, 0]
        if draws is None:
            token = jnp.argmax(logits, axis=1).astype(jnp.int32)
        else:
            token = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, at), *draws)
        return llm.decode_next(params, kept, token), token

    (kept, states), tokens = jax.lax.scan(step, (kept, states), done + jnp.arange(steps))
    return kept, states, tokens.T
