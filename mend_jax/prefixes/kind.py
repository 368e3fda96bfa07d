"""What a kind of prefix is: all that the rest of the program asks about it. Each kind is a file beside this one.

A kind is asked three times. Before anything is loaded, its class is: does it read demonstrations, with which backbone, how
many positions of the LLM does it take. While it trains, its instance is: `apply` makes a prefix from `params`. When it is
used, its instance is: what it read, what that cost, what an export of it holds. A new kind is a subclass in a file of its
own, and a line in `KINDS` (prefixes/__init__.py).

Axes: B batch, N demonstration tokens, L vectors, D width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data import sampling
from mend_jax.models import int8
from mend_jax.prefixes.context import bucket
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.sharding import Place


class Kind:
    """A way to make a prefix. The defaults are those of a kind that has nothing to train and reads no demonstrations."""

    name: ClassVar[str]  # its key in `KINDS`, and `prefix.kind` of a run that trains it
    title: ClassVar[str]  # in a sentence: "a soft prompt"
    method = ""  # its name in evaluate.methods, where it needs no training
    reads_demos = False
    # The kinds whose trained parameters it can begin with, and the fields of a config that must then be the same.
    begins_with: ClassVar[tuple[str, ...]] = ()
    same_fields: ClassVar[tuple[str, ...]] = ("prefix.length", "data.template", "data.bos", "llm.path")

    params: Any  # the tree that is trained, or None
    llm_width: int  # of the vectors it makes
    num_vectors = 0  # positions of the LLM that it takes at least, whatever the demonstrations
    tokenizer = None  # of the texts it reads, where it has one of its own
    window = 2**30  # tokens of demonstrations that it can read in one context
    bos: str | None = (
        None  # config.data.bos of its training: what its vectors stand behind; None: nothing is known of it
    )

    # Asked of the class, by a run's config

    @classmethod
    def backbone(cls, config) -> str:
        """The folder or hub name of the model that it starts from and reads with; "" where there is none."""
        return ""

    @classmethod
    def positions(cls, config) -> int:
        """Positions of the LLM that it takes at most while it trains."""
        return config.prefix.length

    @classmethod
    def packing(cls, config, window: int) -> sampling.Packing | None:
        """How contexts are laid out for it in training where it reads them in chunks; None: one after another.

        `window` is of its backbone.
        """
        return None

    @classmethod
    def reader_settings(cls, config, backbone):
        """The settings of the model that reads with, of those of its backbone's folder; `config` may be nested dicts."""
        return backbone.headless

    @classmethod
    def check(cls, config, backbone, llm) -> None:
        """Raises UserError where the settings of the two models (models/config.py) do not go together."""

    @classmethod
    def init(cls, config, llm, seed: int, place: Place | None = None) -> "Kind":
        """A fresh one for `llm`. `place` as in `load_llm`."""
        raise TypeError(f"{cls.title} has nothing to train")

    # Asked of an instance

    def apply(self, params, demos, length) -> Prefix:
        """(B,N) int32 tokens with lengths (B,) -> the B prefixes. Differentiable in `params`."""
        raise NotImplementedError

    @property
    def reader(self):
        """The settings of the model that reads the demonstrations (models/config.py); None where none of its own does."""
        return None

    def fit(self, shown: Sequence[int], own: Sequence[int], limit: int, room: int) -> int:
        """How many demonstrations of these lengths, from the first on, make one context.

        Args:
            shown: tokens of each to the LLM.
            own: tokens of each to this kind's tokenizer.
            limit: data.max_demo_tokens.
            room: positions that the LLM has left beside the longest query.
        """
        return min(sampling.fit_demos(shown, min(limit, room)), sampling.fit_demos(own, min(limit, self.window)))

    def lay_out(self, pairs, room: int) -> np.ndarray:
        """The context (N,) int32 of the (x, y) pairs of token ids that fit, as `apply` reads it."""
        return sampling.join_demos(pairs)

    def columns(self, length: int, sizes: Sequence[int]) -> int:
        """Columns that a context of `length` is padded to: one of few, because each is compiled. `sizes` are the config's."""
        return min(self.window, min((size for size in sizes if size >= length), default=bucket(length)))

    def flops(self, llm, context: np.ndarray) -> int:
        """FLOPs of making the prefix of a context (N,), as `lay_out` made it; `llm` are the LLM's settings."""
        return 0

    def facts(self) -> dict:
        """What else than its parameters decides its vectors: part of the key of its predictions."""
        return {}

    # Used where it was not trained

    @classmethod
    def beside(cls, llm) -> "Kind":
        """One that needs no training (`method`), for an LLM."""
        raise TypeError(f"{cls.title} needs training")

    @classmethod
    def of_trained(cls, model: "Kind", config, path: str) -> "Kind":
        """What was trained in `path` as one of the kinds that this one begins with, used as this one, as `config`
        says. Raises UserError for another kind."""
        if model.name != cls.name:
            raise UserError(
                f"{path} holds {model.title}, which cannot be used as {cls.title}: name another workdir, or no kind."
            )
        return model

    def placed(self, put: Callable[[Any], Any], dtype: str) -> "Kind":
        """With its parameters where `put` puts a tree, and its arithmetic in `dtype`."""
        return dataclasses.replace(self, params=put(self.params))

    # Kept in files

    @classmethod
    def from_run(cls, config: dict, params, backbone: Path | None) -> "Kind":
        """That of a training workdir: the run's config as nested dicts, its parameters, the folder of its backbone."""
        raise TypeError(f"{cls.title} is not trained")

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether an exported folder holds one."""
        return False

    @classmethod
    def from_folder(cls, folder: Path, place: Place | None = None) -> "Kind":
        """That of an exported folder."""
        raise TypeError(f"{cls.title} is not exported")

    def write(self, folder: Path) -> str:
        """Writes what `from_folder` reads, and what uses it without this project; returns a sentence on it."""
        raise TypeError(f"{self.title} is not exported")

    def card(self, llm: str, template: str) -> tuple[str, str]:
        """(title, text) of its model card: what it is, and how it is used with the LLM of that name; data.template of its training."""
        raise TypeError(f"{self.title} is not exported")


def initial_rows(prefix, model, seed: int):
    """(L,D) float32: embeddings of random tokens (the release's start), or random normal; `prefix` is a config's section,
    `model` what reads them, with `config` and `params`."""
    key, embed = jax.random.key(seed), model.params["embed"]
    words, width = embed["tokens"].shape
    if prefix.placeholder_init == "normal":
        return 0.02 * jax.random.normal(key, (prefix.length, width))
    picked = jax.random.randint(key, (prefix.length,), 0, words)
    return int8.rows(int8.table(embed, "tokens"), picked, jnp.float32, model.config.embed_scale).astype(jnp.float32)
