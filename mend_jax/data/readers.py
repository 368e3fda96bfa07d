"""Who reads the data: what rows and batches need to know of the models."""

import dataclasses
from typing import Any

from mend_jax.data.sampling import Packing


@dataclasses.dataclass(frozen=True)
class Readers:
    """The LLM, and what makes its prefix."""

    tokenizer: Any  # the LLM's, a Hugging Face fast tokenizer
    window: int = 1024  # the LLM's, in tokens
    distiller_window: int | None = None  # of the distiller's backbone; None: nothing reads a context as a whole
    distiller_tokenizer: Any = (
        None  # where it is another than the LLM's (`other_tokenizer`): contexts are then read by both
    )
    separate_targets: bool = (
        False  # the LLM reads x and y apart (an encoder–decoder): queries say how many columns each has
    )
    reads_demos: bool = True  # whether the prefix is made of demonstrations
    vectors: int | None = None  # positions of the LLM that the prefix takes, at most; None: prefix.length
    packing: Packing | None = None  # how a context is laid out where it is read in chunks

    @property
    def windows(self) -> tuple[int, int]:
        return self.window, self.distiller_window or 2**31

    def positions(self, config) -> int:
        """Of the LLM, that the prefix takes at most."""
        return config.prefix.length if self.vectors is None else self.vectors
