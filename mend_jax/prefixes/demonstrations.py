"""Vanilla in-context learning: the embedded demonstrations themselves."""

import dataclasses
from typing import Any

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data import sampling
from mend_jax.data.templates import Template, chosen
from mend_jax.prefixes.context import demo_tokens
from mend_jax.prefixes.kind import Kind
from mend_jax.prefixes.prefix import Prefix


def demonstrations_prefix(
    llm, demos, template: str | Template | None = None, *, separator: str | None = None
) -> Prefix:
    """The embedded demonstrations as a prefix: Vanilla ICL.

    Args:
        llm: from `load_llm`.
        demos: token ids of one context (list of int) or of several (list of lists), or (x, y) string pairs.
        template: the texts around x and y of string pairs: "space" (None), "newline", "qa" or "question"
            (docs/protocol.md), or a distiller's, `distiller.template`.
        separator: " " for "space" or "\n" for "newline", in the place of `template`.
    Returns:
        Prefix((B, P, llm_width), (B,)) in the LLM's dtype; B is the number of contexts, P the tokens of the longest.
    Raises:
        UserError: no demonstrations or an empty context, texts without a tokenizer, an unknown template, a token that the LLM
            does not have, or more tokens than its window.
    """
    tokens, length = demo_tokens(demos, llm.tokenizer, llm.config, llm.window, "LLM", chosen(template, separator))
    return Prefix(llm.embed(llm.params, tokens), length)


@dataclasses.dataclass(frozen=True, eq=False)
class Demonstrations(Kind):
    """The LLM reads the demonstrations; `params` are the LLM's."""

    name, title, method, reads_demos = "demonstrations", "in-context learning", "icl", True

    llm: Any
    last: int = 0  # tokens: of the context its last ones alone, or of `each` demonstration; 0: all
    each: bool = False

    @classmethod
    def beside(cls, llm) -> "Demonstrations":
        return cls(llm)

    def cut(self, last: int, each: bool = False) -> "Demonstrations":
        """Cut to the last tokens of the context, or of each demonstration: what vectors of that number have to be better than."""
        if last < 1:
            raise UserError(f"In-context learning cannot be cut to {last} tokens: give 1 or more.")
        return dataclasses.replace(self, last=last, each=each)

    def check_use(self, config) -> None:
        if self.last and config.data.release_truncation:
            raise UserError(
                "evaluate.methods cuts in-context learning to its last tokens, and data.release_truncation cuts every context: leave out"
                " one."
            )

    def fit(self, shown, own, limit: int, room: int) -> int:
        """Cut to its last tokens each demonstration takes no more than these, as the vectors of chunks."""
        if not self.each:
            return super().fit(shown, own, limit, room)
        return sampling.fit_demos([min(size, self.last) for size in shown], room)

    def lay_out(self, pairs, room: int) -> np.ndarray:
        if self.each:
            return np.concatenate([np.concatenate(pair)[-self.last :] for pair in pairs])
        return super().lay_out(pairs, room)[-self.last :]

    def facts(self) -> dict:
        return {"last": [self.last, self.each]} if self.last else {}

    @property
    def params(self):
        return self.llm.params

    @property
    def window(self) -> int:
        return self.llm.window

    @property
    def llm_width(self) -> int:
        return self.llm.config.width

    def distill(self, demos) -> Prefix:
        if self.last:
            raise UserError(
                "In-context learning cut to its last tokens is for evaluate.methods: cut the demonstrations themselves."
            )
        return demonstrations_prefix(self.llm, demos)

    def apply(self, params, demos, length) -> Prefix:
        return Prefix(self.llm.embed(params, demos), length)
