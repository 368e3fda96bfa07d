"""What rows and batches need to know about the models that read them."""

import dataclasses
from typing import Any

from mend_jax.data.sampling import Packing


@dataclasses.dataclass(frozen=True)
class Readers:
    """The LLM and the model that makes its prefix."""

    tokenizer: Any  # the LLM's, a Hugging Face fast tokenizer
    window: int = 1024  # the LLM's, in tokens
    distiller_window: int | None = None  # of the distiller's backbone; None: nothing reads a context as a whole
    distiller_tokenizer: Any = (
        None  # the distiller's if it differs from the LLM's (`other_tokenizer`): both then tokenise the contexts
    )
    separate_targets: bool = (
        False  # whether the LLM reads x and y separately (an encoder–decoder): a query then has the columns of each
    )
    reads_demos: bool = True  # whether the prefix is made of demonstrations
    vectors: int | None = None  # the most positions that the prefix takes in the LLM; None: prefix.length
    packing: Packing | None = None  # the layout of contexts that are read in chunks

    @property
    def windows(self) -> tuple[int, int]:
        return self.window, self.distiller_window or 2**31

    def positions(self, config) -> int:
        """The most positions that the prefix takes in the LLM."""
        return config.prefix.length if self.vectors is None else self.vectors
