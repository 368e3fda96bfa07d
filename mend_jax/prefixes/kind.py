"""The interface of a kind of prefix: all that the rest of the program asks of it. Each kind is a file beside this one.

A kind is used in three phases. Before anything is loaded, its class says whether it reads demonstrations, with which
backbone, and how many positions it takes in the LLM. In training, the `apply` of an instance makes a prefix from `params`.
In use, the instance says what it read, what that cost and what an export contains. A new kind is a subclass in its own
file and a line in `KINDS` (prefixes/__init__.py).

Axes: B batch, N demonstration tokens, L vectors, D width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data import sampling
from mend_jax.data.evaluation import read_twice
from mend_jax.data.templates import SPACE, Template
from mend_jax.data.tokenize import other_tokenizer
from mend_jax.models import int8
from mend_jax.models.programs import program
from mend_jax.prefixes.context import bucket, bucket_rows, pair_ids
from mend_jax.prefixes.embeddings import TRAINED
from mend_jax.prefixes.prefix import Prefix, room_for_vectors
from mend_jax.run.distributed import to_host
from mend_jax.run.sharding import Place

LONGEST_CONTEXT = 1024  # tokens of a context of one size, where the window is larger
FROZEN = "prefix"  # under this name a kind's own frozen parameters stand beside those of the frozen LLM
SIZES = (128, 256, 384, 512, 768, 1024, 1536, 2048)  # padded lengths of contexts: few, because each is compiled


class Reading(NamedTuple):
    """A set of demonstrations as a kind reads it."""

    context: Any  # as `vectors_of` takes it
    tokens: int  # of the context
    read: tuple[int, ...]  # the numbers, from 0, of the demonstrations that it holds
    dropped: tuple[int, ...]  # and of the others, which do not fit


class Kind:
    """A way to make a prefix. The defaults suit a kind that has nothing to train and reads no demonstrations."""

    name: ClassVar[str]  # its key in `KINDS`, and `prefix.kind` of a run that trains it
    title: ClassVar[str]  # its name in a sentence: "a soft prompt"
    method = ""  # its name in evaluate.methods, if it needs no training
    reads_demos = False
    reads_chunks = False  # whether it reads them chunk by chunk
    # The kinds whose trained parameters it can start from, and the fields of a config that must then be the same.
    begins_with: ClassVar[tuple[str, ...]] = ()
    same_fields: ClassVar[tuple[str, ...]] = ("prefix.length", "data.template", "data.bos", "llm.path")

    params: Any  # the tree that is trained, or None
    llm_width: int  # of the vectors it makes
    num_vectors = 0  # positions of the LLM that it takes at least, whatever the demonstrations
    nested: tuple[
        int, ...
    ] = ()  # shorter numbers of vectors that it was trained with as well: prefix.nested of its training
    can_nest: ClassVar[bool] = False  # whether a run can train it with `prefix.nested`
    tokenizer = None  # of the texts it reads, where it has one of its own
    window = 2**30  # tokens of demonstrations that it can read in one context
    longest_demo = 2**30  # a demonstration of more tokens is left out, and those behind it are not
    max_input_tokens = 0  # where texts of inputs are cut: data.max_input_tokens of its training; 0: nowhere
    holds = ""  # what else limits a demonstration, as a part of a sentence
    template: Template = SPACE  # the texts around every x and y: that of config.data.template of its training
    bos: str | None = (
        None  # config.data.bos of its training: what its vectors stand behind; None: nothing is known of it
    )

    # Asked of the class, given a run's config

    @classmethod
    def backbone(cls, config) -> str:
        """The folder or hub name of the model that it starts from and reads with; "" if there is none."""
        return ""

    @classmethod
    def positions(cls, config) -> int:
        """The most positions that it takes in the LLM during training."""
        return config.prefix.length

    @classmethod
    def readings(cls, config) -> int:
        """How many parts of a training context it reads, each as if it were alone, at most."""
        return 1

    @classmethod
    def packing(cls, config, window: int) -> sampling.Packing | None:
        """The layout of training contexts if it reads them in chunks; None: demonstrations one after another.

        `window` is that of its backbone.
        """
        return None

    @classmethod
    def reader_settings(cls, config, backbone):
        """The settings of the model that reads with, of those of its backbone's folder; `config` may be nested dicts."""
        return backbone.headless

    @classmethod
    def resolved(cls, name: str, value, backbone, llm):
        """What the `value` of a field of `same_fields` means for the settings of the two models: "auto" decided."""
        return value

    @classmethod
    def check(cls, config, backbone, llm) -> None:
        """Raises UserError if the settings of the two models (models/config.py) are incompatible."""

    @classmethod
    def init(cls, config, llm, seed: int, place: Place | None = None) -> "Kind":
        """A new, untrained instance for `llm`. `place` is as in `load_llm`."""
        raise TypeError(f"{cls.title} has nothing to train")

    @classmethod
    def sketch(cls, prefix, backbone, llm, embeddings: str = TRAINED) -> "Kind":
        """An instance whose params are shapes, to compute what it costs: for a config's section `prefix` and the settings of
        the two models; `embeddings` are as in `whose` (embeddings.py)."""
        raise TypeError(f"the cost of {cls.title} is not computed")

    # Asked of an instance

    @property
    def vector_weights(self) -> int:
        """The number of weights that each vector is multiplied with, behind the `reader`."""
        return 0

    @property
    def separator(self) -> str:
        """The text before every x and y. Raises UserError for a `template` that has more than that."""
        return self.template.separator

    def apply(self, params, demos, length) -> Prefix:
        """(B,N) int32 tokens with lengths (B,) -> a Prefix of B rows. Differentiable in `params`.

        A kind that `can_nest` takes `vectors` (B,) int32 besides: of each row the prefix has only the first so many.
        """
        raise NotImplementedError

    def first(self, count: int) -> "Kind":
        """The same, making only its first `count` vectors. Raises UserError for a number that it was not trained with."""
        if count == self.num_vectors:
            return self
        if count not in self.nested:
            known = ", ".join(map(str, (*sorted(self.nested), self.num_vectors)))
            train = ", or train with --config.prefix.nested" if self.can_nest else ", the only one that it has"
            take = "one of these lengths" if self.nested else "this length"
            raise UserError(f"This is {self.title} of {known} vectors, not of {count}: take {take}{train}.")
        return self._cut(count)

    def _cut(self, count: int) -> "Kind":
        """`first`, of one of the `nested` lengths."""
        raise NotImplementedError

    @property
    def shorter(self) -> tuple[int, ...]:
        """Those of the `nested` lengths whose vectors are the first ones of any longer prefix, so that vectors can be cut."""
        return ()

    def distill(self, demos=()) -> Prefix:
        """The prefix of demonstrations, texts or token ids as `Distiller.distill` reads them, with its own parameters.

        Raises UserError for demonstrations that it cannot read.
        """
        if self.reads_demos:
            raise UserError(
                f"{self.title} reads no demonstrations but those of a run: train or evaluate it, or write {type(self).__name__}.distill."
            )
        return self.apply(self.params, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))

    def split_params(self) -> tuple[Any, Any]:
        """(`params` that are trained, those that are not): the second are no part of the optimiser or of checkpoints."""
        return self.params, {}

    @classmethod
    def whole(cls, params, frozen):
        """The `params` that `apply` takes: trained ones with those that are not, under `FROZEN` of the step's frozen tree."""
        return params

    @property
    def reader(self):
        """The settings of its own model that reads the demonstrations (models/config.py); None if it has none."""
        return None

    def check_use(self, config) -> None:
        """Raises UserError for a config of an evaluation that it cannot be used with."""

    def fit(self, shown: Sequence[int], own: Sequence[int], limit: int, room: int) -> int:
        """How many demonstrations of these lengths, counted from the first, make one context.

        Args:
            shown: the length of each in the LLM's tokens.
            own: the length of each in the tokens of this kind's tokenizer.
            limit: data.max_demo_tokens.
            room: positions that the LLM has left beside the longest query.
        """
        return min(sampling.fit_demos(shown, min(limit, room)), sampling.fit_demos(own, min(limit, self.window)))

    def fitting(self, own: Sequence[int], llm) -> int:
        """How many demonstrations of these lengths, as in `fit`, it reads at once for this LLM, which itself reads none."""
        return self.fit([0] * len(own), own, 2**30, room_for_vectors(llm))

    def read_pairs(self, pairs: Sequence[tuple[str, str]], llm) -> Reading:
        """(x, y) pairs of texts as it reads them for an LLM: each x cut as in training, and what does not fit left out.

        Raises UserError if there are none, or if none fits.
        """
        if not pairs:
            raise UserError("There are no demonstrations: give at least one.")
        pieces = self._pair_ids(pairs, llm)
        lengths = [len(x) + len(y) for x, y in pieces]
        short = [i for i, length in enumerate(lengths) if length <= self.longest_demo]
        read = tuple(short[: self.fitting([lengths[i] for i in short], llm)])
        if not read:
            raise self._nothing_fits(pairs[0][0], lengths[0], llm)
        dropped = tuple(sorted(set(range(len(pairs))) - set(read)))
        context = self.context([pieces[i] for i in read], room_for_vectors(llm))
        return Reading(context, sum(lengths[i] for i in read), read, dropped)

    def _pair_ids(self, pairs, llm) -> list:
        """The (x, y) of its tokenizer; where the LLM has another, an x is cut where it is one text to both, as in training."""
        most, template = self.max_input_tokens, self.template
        if not most or other_tokenizer(llm.tokenizer, self.tokenizer) is None:
            return pair_ids(pairs, self.tokenizer, template, most)
        texts = tuple((template.before + x, template.answer + y) for x, y in pairs)
        return read_twice(texts, (llm.tokenizer, self.tokenizer), most, template.between)[1]

    def _nothing_fits(self, first: str, length: int, llm) -> UserError:
        most, room = min(self.window, self.longest_demo), room_for_vectors(llm)
        if length <= most:
            return UserError(
                f"The LLM's window has room for {room} vectors, {self.title} makes {self.num_vectors} at least."
            )
        return UserError(
            f"A demonstration ({first[:40]!r} ...) has {length} tokens, more than the distiller reads at once, {most}: shorten it,"
            " or leave it out."
        )

    def context(self, pairs, room: int) -> Any:
        """The context of (x, y) pairs of token ids which all fit, as `vectors_of` takes it."""
        return self.lay_out(pairs, room)

    def vectors_of(self, contexts: Sequence) -> list[np.ndarray]:
        """The vectors (L,D) float32 of each context of `read_pairs`, with its own parameters; like lengths together cost least."""
        if not contexts:
            return []
        rows = np.zeros((bucket_rows(len(contexts)), self.columns(max(map(len, contexts)), SIZES)), np.int32)
        for row, context in zip(rows, contexts, strict=False):
            row[: len(context)] = context
        length = np.asarray([len(context) for context in contexts] + [1] * (len(rows) - len(contexts)), np.int32)
        made = _apply(self, self.params, rows, length)
        vectors, counts = to_host(made.embeds).astype(np.float32), to_host(made.length)
        return [vectors[i, : counts[i]] for i in range(len(contexts))]

    def layout(self, chunks: int) -> sampling.Packing:
        """That of a context of one size, of `chunks` chunks: one row of tokens where it does not read in chunks."""
        columns = min(self.window, LONGEST_CONTEXT)
        return sampling.Packing(columns, columns, 1)

    def vectors_of_chunks(self, chunks: int) -> int:
        """How many vectors it makes of so many chunks."""
        return self.num_vectors

    def apply_chunks(self, params, tokens, length) -> Prefix:
        """The prefix, of one row, of a context in `layout`: tokens (C,N) with lengths (C,), where 0 is no chunk; those come last."""
        return self.apply(params, tokens, length)

    def lay_out(self, pairs, room: int) -> np.ndarray:
        """The context (N,) int32 of those (x, y) pairs of token ids that fit, in the form that `apply` reads."""
        return sampling.join_demos(pairs)

    def columns(self, length: int, sizes: Sequence[int]) -> int:
        """The padded columns of a context of `length`: one of few sizes, because each is compiled. `sizes` are the config's."""
        return min(self.window, min((size for size in sizes if size >= length), default=bucket(length)))

    def flops(self, llm, context: np.ndarray) -> int:
        """FLOPs of making the prefix of a context (N,) from `lay_out`; `llm` are the LLM's settings."""
        return 0

    def facts(self) -> dict:
        """What decides its vectors besides its parameters: part of the key of its predictions."""
        return {}

    # Used without training, or as another kind than it was trained as

    @classmethod
    def beside(cls, llm) -> "Kind":
        """An instance that needs no training (`method`), for an LLM."""
        raise TypeError(f"{cls.title} needs training")

    @classmethod
    def of_trained(cls, model: "Kind", config, path: str) -> "Kind":
        """`model`, trained in `path` as a kind that this one can start from, used as this kind with the settings of
        `config`. Raises UserError for other kinds."""
        if model.name != cls.name:
            raise UserError(
                f"{path} holds {model.title}, which cannot be used as {cls.title}: name another workdir, or leave the kind out."
            )
        return model

    def placed(self, put: Callable[[Any], Any], dtype: str) -> "Kind":
        """A copy with its parameters placed by `put`, and its arithmetic in `dtype`."""
        return dataclasses.replace(self, params=put(self.params))

    # Stored in files

    @classmethod
    def from_run(cls, config: dict, params, backbone: Path | None) -> "Kind":
        """The instance of a training workdir, from the run's config (nested dicts), parameters and backbone folder."""
        raise TypeError(f"{cls.title} is not trained")

    @classmethod
    def restored(cls, config: dict, params, backbone: Path | None, place: Place | None = None):
        """The whole parameters of a checkpoint's, which has only those of `split_params` that are trained; `place` is as in
        `load_llm`, for what is read besides."""
        return params

    @classmethod
    def backbone_params(cls, params):
        """The part of the trained `params` that has the form of `reader_settings`' model; None if there is none."""
        return None

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether an exported folder holds this kind."""
        return False

    def read_by(self, llm) -> "Kind":
        """The instance for an LLM that reads its prefix, with what its files leave to the LLM."""
        return self

    def settings(self) -> dict:
        """What decides its parameters' shapes and what they mean, as an exported folder says it."""
        return {}

    @classmethod
    def from_folder(cls, folder: Path, place: Place | None = None) -> "Kind":
        """The instance in an exported folder."""
        raise TypeError(f"{cls.title} is not exported")

    def write(self, folder: Path, dtype: str = "float32", llm: str = "") -> str:
        """Writes the files that `from_folder` reads and those to use it without this project; returns a sentence about them.

        `dtype` is that of its backbone's weights: "float32", "bfloat16", or "int8"; `llm` a name under which everybody has its
        LLM, which the files then say, or "". Raises UserError for one that it cannot write.
        """
        raise TypeError(f"{self.title} is not exported")

    def write_release(self, folder: Path) -> str:
        """Writes the layouts of other programs that can hold it into the new `folder`; returns a sentence about them, "" if
        there are none."""
        return ""

    def card(self, llm: str, logits: str) -> tuple[str, str]:
        """(title, text) of its model card: what it is and how to use it with the LLM named `llm`.

        `logits` are the lines of the card's snippet by which that LLM computes its `logits` from `embeds`.
        """
        raise TypeError(f"{self.title} is not exported")


@program
def _apply(model, params, demos, length):
    return model.apply(params, demos, length)


def initial_rows(prefix, model, seed: int):
    """(L,D) float32: embeddings of random tokens (the release's start), or random normal; `prefix` is a config's section,
    `model` what reads them, with `config` and `params`."""
    key, embed = jax.random.key(seed), model.params["embed"]
    words, width = embed["tokens"].shape
    if prefix.placeholder_init == "normal":
        return 0.02 * jax.random.normal(key, (prefix.length, width))
    picked = jax.random.randint(key, (prefix.length,), 0, words)
    return int8.rows(int8.table(embed, "tokens"), picked, jnp.float32, model.config.embed_scale).astype(jnp.float32)
