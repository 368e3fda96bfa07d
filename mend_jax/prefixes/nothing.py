"""Zero-shot: nothing precedes the query."""

import dataclasses

import jax.numpy as jnp

from mend_jax.prefixes.kind import Kind
from mend_jax.prefixes.prefix import Prefix


def no_prefix(batch_size: int, width: int) -> Prefix:
    """An empty prefix, for zero-shot: Prefix((batch_size, 0, width) float32, zeros (batch_size,) int32).

    Args:
        batch_size: rows; `score_options` takes one.
        width: that of the LLM's embeddings, `llm.config.width`.
    """
    return Prefix(jnp.zeros((batch_size, 0, width)), jnp.zeros((batch_size,), jnp.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class Nothing(Kind):
    """No prefix at all."""

    name, title, method = "nothing", "zero-shot", "zero_shot"

    params = None
    llm_width: int

    @classmethod
    def beside(cls, llm) -> "Nothing":
        return cls(llm.config.width)

    def apply(self, params, demos, length) -> Prefix:
        return no_prefix(demos.shape[0], self.llm_width)
