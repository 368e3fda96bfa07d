"""What fits: the sizes that rows are padded to, the tokens a context may have, and whether a run's lengths fit the windows."""

import logging

from mend_jax.cli.errors import UserError
from mend_jax.data import sampling
from mend_jax.data.templates import chosen

MIN_TEXT_TOKENS = 32  # pretraining: shorter texts teach nothing about distilling
TRIES = 100  # random choices for a row until one fits
KEPT = 1 << 14  # rows remembered between planning a window and making its batches


def check_windows(config, llm, backbone=None, vectors: int | None = None) -> None:
    """Raises UserError if the lengths of a run's config cannot fit the windows, before anything is loaded or read.

    Args:
        config: the config of a whole run.
        llm, backbone: settings of the LLM and of the distiller's backbone (None: there is no distiller), each with a `window`.
        vectors: the most positions that the prefix takes in the LLM; None: prefix.length.
    """
    data, stage = config.data, config.stage
    vectors = config.prefix.length if vectors is None else vectors
    windows = llm.window, 2**31 if backbone is None else backbone.window
    if stage == "lm":
        check_sequence_length(data.sequence_length, llm.window)
        return
    behind = _beside("after", vectors, config.prefix.length)
    room = llm.window - vectors
    if room < 2:
        raise UserError(
            f"The LLM's window of {llm.window} tokens has no room for a query {behind}: lower prefix.length."
        )
    [budget] = largest_budgets(config, windows, two_readings=False)  # two readings have no more room
    _, continued = sampling.split_text(data.max_text_tokens, data.beta, data.max_text_tokens)
    if stage == "pretrain" and continued > room:
        fitting = (n for n in range(data.max_text_tokens, MIN_TEXT_TOKENS - 1, -1))
        most = next((n for n in fitting if sampling.split_text(n, data.beta, n)[1] <= room), None)
        lower = "lower prefix.length" if most is None else f"lower data.max_text_tokens to {most}, or prefix.length"
        raise UserError(
            f"A text of data.max_text_tokens = {data.max_text_tokens} has a continuation of {continued} tokens, which does not "
            f"fit the LLM's window of {llm.window} {behind}: {lower}."
        )
    least = 1 + bool(chosen(data.template).between)  # tokens behind a cut input: no tokenizer is there yet
    if stage == "finetune" and data.max_input_tokens + least > room:
        raise UserError(
            f"An input of data.max_input_tokens = {data.max_input_tokens} and its output do not fit the LLM's window of "
            f"{llm.window} {behind}: lower data.max_input_tokens to less than {room - least + 1}, or prefix.length."
        )
    if data.max_demo_tokens > budget:
        logging.warning(
            "data.max_demo_tokens is %d, but the models have room for %d at most: demonstrations that do not fit are left out",
            data.max_demo_tokens, budget,
        )  # fmt: skip


def buckets(configured, largest: int) -> tuple[int, ...]:
    """The configured sizes below `largest`, then `largest` itself: every length up to it has a bucket."""
    return (*sorted({size for size in configured if size < largest}), largest)


def budgets(config, windows, query: int, two_readings: bool) -> tuple[int, ...]:
    """The most context tokens beside a query of `query` tokens: (that both models can read,), or (the LLM's, the distiller's).

    The distiller reads a context and prefix.length placeholders, however many positions the prefix takes in the LLM.
    """
    data, placeholders = config.data, config.prefix.length
    if not two_readings:
        return (sampling.demo_budget(data.max_demo_tokens, windows[0], query, windows[1], placeholders),)
    return min(data.max_demo_tokens, windows[0] - query), min(data.max_demo_tokens, windows[1] - placeholders)


def largest_budgets(config, windows, two_readings: bool) -> tuple[int, ...]:
    """The most tokens a context can have beside any query, as `budgets`. Raises UserError if there is no room for any."""
    found = budgets(config, windows, 1, two_readings)
    if min(found) < 1:
        raise UserError(
            f"The distiller's window of {windows[1]} tokens has no room for demonstrations beside "
            f"config.prefix.length = {config.prefix.length} vectors: lower that length or use another backbone."
        )
    if config.data.release_truncation:
        return tuple(min(budget, sampling.RELEASE_DISTILLER_TOKENS) for budget in found)
    return found


def check_sequence_length(length: int, window: int) -> None:
    if length > window:
        raise UserError(
            f"config.data.sequence_length is {length}, but the LLM's window is {window} tokens: lower the length to at most {window}."
        )


def check_window(what: str, query: int, vectors: int, length: int, window: int) -> None:
    """Raises UserError if a query and a prefix of `vectors` positions do not fit; `length` is prefix.length."""
    if query + vectors > window:
        raise UserError(
            f"{what} of {query} tokens does not fit the LLM's window of {window} "
            f"{_beside('beside', vectors, length, 'config.prefix.length')}: lower config.data.max_text_tokens, raise config.data.beta or lower the length."
        )


def _beside(where: str, vectors: int, length: int, field: str = "prefix.length") -> str:
    if vectors == length:
        return f"{where} {field} = {length} vectors"
    return f"{where} a prefix of {vectors} vectors ({field} = {length})"
