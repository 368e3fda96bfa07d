"""What is asked of the LLM: the tokens that stand behind a prefix.

Axes: B batch, Q query tokens. Every row is right-padded and carries a length.
"""

import jax
from flax import struct


@struct.dataclass
class Query:
    """The test input x and its output y = tokens[target_start:length]."""

    tokens: jax.Array  # (B,Q) int32
    length: jax.Array  # (B,) int32
    target_start: jax.Array  # (B,) int32
    # No row's x, no row's y is longer; None: not known. Static: an encoder–decoder reads no columns that hold none.
    input_columns: int | None = struct.field(pytree_node=False, default=None)
    target_columns: int | None = struct.field(pytree_node=False, default=None)
