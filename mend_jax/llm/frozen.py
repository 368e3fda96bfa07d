"""What both kinds of frozen LLM share: their fields, the token embedding and the head.

Axes: B batch, Q query tokens, T any sequence, D width, V vocabulary.
"""

import dataclasses
from typing import Any

from mend_jax.models import int8
from mend_jax.models.families import Config


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenLLM:
    """A frozen LLM. Its methods are pure functions of the `params` passed to them (usually `llm.params`)."""

    config: Config
    params: Any  # {"embed": {"tokens" (V,D), ...}, ...}, in `dtype` or int8
    tokenizer: Any  # a transformers tokenizer, or None if the folder has none
    path: str  # the folder it was read from
    dtype: str
    attention: str = "xla"
    remat: bool = False

    @property
    def window(self) -> int:
        """The number of positions that the LLM can read at once."""
        return self.config.window

    def embed(self, params, tokens):
        """(B,T) int32 -> embeddings (B,T,D) in `dtype`, without positions."""
        return int8.rows(int8.table(params["embed"], "tokens"), tokens, self.dtype)

    def head(self, params):
        """(V,D), or an int8 `Table`: a state's logits are its products with these rows."""
        return int8.table(params["embed"], "tokens" if self.config.tied_head else "head")

    def logits(self, params, states):
        """(B,Q,D) -> logits (B,Q,V) float32. They are large: call it on chunks, and only where a loss or a score needs them."""
        return int8.logits(self.head(params), states)
