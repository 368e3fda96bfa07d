"""What both kinds of frozen LLM share: their fields, the token embedding and the head.

Axes: B batch, Q query tokens, T any sequence, D width, V vocabulary.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from mend_jax.models import int8
from mend_jax.models.families import Config
from mend_jax.models.folders import fingerprint
from mend_jax.prefixes.prefix import Prefix


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenLLM:
    """A frozen LLM. Its methods are pure functions of the `params` passed to them (usually `llm.params`)."""

    config: Config
    params: Any  # {"embed": {"tokens" (V,D), ...}, ...}, in `dtype` or int8
    tokenizer: Any  # a transformers tokenizer, or None if the folder has none
    path: str  # what it was read by, as it was given: a folder, a file, a name
    dtype: str
    attention: str = "xla"
    remat: bool = False
    bos: int | None = None  # the token that stands before every prefix (data/bos.py)
    folder: str = ""  # where it lies on this machine, for reading alone; "": at `path`

    @property
    def fingerprint(self) -> str:
        """That of its files (models/folders.py)."""
        return fingerprint(self.folder or self.path)

    @property
    def before(self) -> int:
        """Positions before every prefix."""
        return 0 if self.bos is None else 1

    @property
    def window(self) -> int:
        """Positions the LLM can read at once, of a prefix and what stands behind it."""
        return self.config.window - self.before

    def begin(self, params, prefix: Prefix) -> Prefix:
        """The prefix as it is read: behind the BOS, where there is one."""
        if self.bos is None:
            return prefix
        first = self.embed(params, jnp.full((len(prefix.length), 1), self.bos))
        return Prefix(jnp.concatenate([first, prefix.embeds.astype(first.dtype)], 1), prefix.length + 1)

    def embed(self, params, tokens):
        """(B,T) int32 -> (B,T,D) in `dtype`, without positions."""
        return int8.rows(int8.table(params["embed"], "tokens"), tokens, self.dtype, self.config.embed_scale)

    def head(self, params):
        """(V,D), or an int8 `Table`: a state's logits are its products with these rows."""
        return int8.table(params["embed"], "tokens" if self.config.tied_head else "head")

    def logits(self, params, states):
        """(B,Q,D) -> logits (B,Q,V) float32. They are large: call it on chunks, and only where a loss or a score needs them."""
        return int8.logits(self.head(params), states)
