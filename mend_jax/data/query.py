"""What the LLM is asked: the tokens that follow a prefix.

Axes: B batch, Q query tokens. Every row is right-padded and carries a length.
"""

from collections.abc import Callable

import jax
import numpy as np
from flax import struct

from mend_jax.cli.errors import UserError


@struct.dataclass
class Query:
    """The test input x and its output y = tokens[target_start:length]."""

    tokens: jax.Array  # (B,Q) int32
    length: jax.Array  # (B,) int32
    target_start: jax.Array  # (B,) int32
    # Upper bounds of the rows' lengths of x and y; None: unknown. Static, so that an encoder–decoder skips empty columns.
    input_columns: int | None = struct.field(pytree_node=False, default=None)
    target_columns: int | None = struct.field(pytree_node=False, default=None)
    counted: jax.Array | None = None  # (B,Q) bool, the tokens that L_CLM covers (loss.clm_tokens); None: all


def query_tokens(llm, text_or_ids, what: str, pieces: Callable[[str], list[str]]) -> list[int]:
    """The LLM's tokens of a text, in the `pieces` that its template makes of it (`Template.query`, `Template.output`); none for an
    empty text; token ids are returned as they are.

    Raises UserError, which names the input by `what`, if it is neither, or if it is a text and the LLM has no tokenizer.
    """
    if not isinstance(text_or_ids, str):
        return token_ids(text_or_ids, f"the {what}")
    if llm.tokenizer is None:
        raise UserError(f"A {what} as text needs a tokenizer, but the LLM in {llm.path} has none: give token ids.")
    read = [llm.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces(text_or_ids) if text_or_ids]
    return [token for ids in read for token in ids]


def token_ids(values, what: str, texts: str = "a text") -> list[int]:
    """One row of whole numbers as a list. Raises UserError for anything else; the message names the input by `what` and
    says that `texts` are accepted too."""
    try:
        ids = np.asarray(values)
    except ValueError:  # rows of different lengths
        ids = np.zeros((0, 0))
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise UserError(
            f"{what[0].upper()}{what[1:]} must be {texts} or a list of token ids (whole numbers), not {_shown(values)}."
        )
    return ids.tolist()


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
