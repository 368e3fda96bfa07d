"""Turns the caller's demonstrations, texts or token ids, into padded tokens, which every kind of prefix reads.

Axes: B contexts, N demonstration tokens.
"""

import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data.query import token_ids
from mend_jax.data.templates import SPACE, Template
from mend_jax.models.families import Config


def demo_tokens(
    demos, tokenizer, config: Config, window: int, reader: str, template: Template = SPACE, max_input_tokens: int = 0
):
    """Right-padded int32 tokens (B,N) and lengths (B,) of one context, of several, or of (x, y) string pairs, whose inputs are cut
    as by `pair_ids`."""
    if isinstance(demos, dict | set) or not hasattr(demos, "__len__"):
        raise UserError(f"Demonstrations must be a list, not {demos!r}: give token ids, or [(input, output), ...].")
    if len(demos) == 0:
        raise UserError("There are no demonstrations: give at least one.")
    if isinstance(demos, str) or isinstance(demos[0], str):
        what = "a text" if isinstance(demos, str) else "a list of texts"
        raise UserError(f"Text demonstrations must be a list of (input, output) pairs, not {what}: give [(x, y), ...].")
    if isinstance(demos[0], tuple | list) and len(demos[0]) and isinstance(demos[0][0], str):
        demos = [pair_tokens(demos, tokenizer, template, max_input_tokens)]
    elif not hasattr(demos[0], "__len__") or np.ndim(demos[0]) == 0:
        demos = [demos]
    demos = [token_ids(row, "a context of demonstrations", "pairs of texts") for row in demos]
    for row in demos:
        if len(row) == 0:
            raise UserError("A context of demonstrations is empty: every context needs at least one token.")
        wrong = next((int(token) for token in row if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"The demonstrations hold token {wrong}, but the {reader} knows {config.vocab_size} tokens: use the {reader}'s"
                " own tokenizer."
            )
    longest = max(len(row) for row in demos)
    if longest > window:
        raise UserError(
            f"The demonstrations have {longest} tokens, the {reader} reads at most {window}:"
            " give fewer or shorter ones."
        )
    tokens = np.zeros((len(demos), longest), np.int32)
    for row, ids in zip(tokens, demos, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in demos], jnp.int32)


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length`; above 16 at most a third is padding."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def bucket_rows(rows: int) -> int:
    """The padded number of rows of what comes in any number: a power of two, because each is compiled."""
    return 1 << (rows - 1).bit_length()


def pad_columns(tokens, window: int):
    """(B,N) tokens with N padded to its bucket, or to the window if that is smaller."""
    return jnp.pad(tokens, ((0, 0), (0, min(window, bucket(tokens.shape[1])) - tokens.shape[1])))


def is_pair(value) -> bool:
    """Whether it is an (x, y) of texts; a mapping is none, whose keys would be read."""
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def pair_tokens(pairs, tokenizer, template: Template = SPACE, max_input_tokens: int = 0) -> list[int]:
    """The context of (x, y) string pairs, as token ids: `pair_ids`, one after another."""
    return [token for pair in pair_ids(pairs, tokenizer, template, max_input_tokens) for part in pair for token in part]


def pair_ids(
    pairs, tokenizer, template: Template = SPACE, max_input_tokens: int = 0
) -> list[tuple[list[int], list[int]]]:
    """The token ids of (x, y) string pairs: the template's pieces of each, tokenised alone, as in training.

    An x, with the text before it, is cut at `max_input_tokens` (0: never); the text between stands whole behind the cut.
    Raises UserError for anything but pairs of texts, or without a tokenizer.
    """
    if tokenizer is None:
        raise UserError("Text demonstrations need a tokenizer: give token ids, or a folder with tokenizer files.")
    wrong = next((pair for pair in pairs if not is_pair(pair)), None)
    if wrong is not None:
        raise UserError(f"A demonstration must be a pair of texts, (input, output), not {wrong!r:.80}.")
    if not pairs:
        return []
    ids = iter(tokenizer([t for pair in pairs for t in template.example(*pair)], add_special_tokens=False)["input_ids"])
    found = []
    for _ in pairs:
        x = next(ids)[: max_input_tokens or None]
        found.append((x + (next(ids) if template.between else []), next(ids)))
    return found
