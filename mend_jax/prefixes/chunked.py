"""Any number of demonstrations: they are packed into chunks that fit the distiller's window, each chunk is distilled, and the
chunks' vectors are joined.

    concat   l vectors per chunk, one chunk after another, as many as the LLM's window holds
    mean     l vectors: the mean over the chunks

A chunk is distilled as if it were alone, so that chunks can be added or removed without redoing the others (`distill_chunks`,
`join_chunks`). This kind needs no training: its parameters are those of a distiller. It can also be trained further.

Axes: B batch, C chunks, W columns of a chunk, N = C * W, L vectors of a chunk.
"""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES
from mend_jax.cli.text import counted
from mend_jax.data.sampling import EMPTY, Packing, join_demos
from mend_jax.data.templates import Template
from mend_jax.prefixes.context import bucket, demo_tokens, pair_tokens
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.distiller_folder import InWords, card_text, read_settings, write_folder
from mend_jax.prefixes.distiller_module import DistillerModule
from mend_jax.prefixes.embeddings import TRAINED
from mend_jax.prefixes.kind import LONGEST_CONTEXT, Kind
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.distributed import to_host
from mend_jax.run.sharding import Place

JOINS = CHOICES["prefix.join"]


@dataclasses.dataclass(frozen=True, eq=False)
class Chunked(Kind):
    """A distiller that reads its demonstrations chunk by chunk."""

    name, title, reads_demos, reads_chunks = "chunked", "a distiller of chunks", True, True
    begins_with = ("distiller", "chunked")
    same_fields = Distiller.same_fields

    distiller: Distiller
    params: Any  # the distiller's
    join: str = "concat"  # or "mean"
    chunk_tokens: int = 0  # W; 0: the distiller's window
    chunk_demos: int = 16  # demonstrations in a chunk, at most

    def __post_init__(self):
        if self.join not in JOINS:
            raise UserError(f'The vectors of chunks can be joined by {" or ".join(JOINS)}, not by "{self.join}".')

    @classmethod
    def around(
        cls, distiller: "Distiller | Chunked", join: str = "concat", chunk_demos: int = 16, chunk_tokens: int = 0
    ) -> "Chunked":
        """`distiller` with its parameters unchanged, reading chunk by chunk.

        Args:
            distiller: from `load_distiller` or `load_prefix`; of one of chunks the distiller alone is taken, not how it joined them.
            join: "concat" or "mean".
            chunk_demos: demonstrations in a chunk, at most; best the number that the distiller was trained with.
            chunk_tokens: tokens in a chunk, at most; 0 means the distiller's window.
        Raises:
            UserError: an unknown `join`; a prefix that is no distiller.
        """
        if isinstance(distiller, Chunked):
            distiller = dataclasses.replace(distiller.distiller, params=distiller.params)
        if not isinstance(distiller, Distiller):
            raise UserError(f"Chunks are read by a distiller, not by {distiller.title}: give one, from load_prefix.")
        return cls(distiller, distiller.params, join, chunk_tokens, chunk_demos)

    @property
    def llm_width(self) -> int:
        return self.distiller.llm_width

    @property
    def num_vectors(self) -> int:
        return self.distiller.num_vectors

    @property
    def tokenizer(self):
        return self.distiller.tokenizer

    @property
    def template(self) -> Template:
        return self.distiller.template

    @property
    def bos(self) -> str:
        return self.distiller.bos

    @property
    def dtype(self) -> str:
        return self.distiller.dtype

    @property
    def reader(self):
        return self.distiller.config

    @property
    def width(self) -> int:
        """W."""
        return min(self.chunk_tokens or self.distiller.window, self.distiller.window)

    @property
    def longest_demo(self) -> int:
        return self.width

    @property
    def max_input_tokens(self) -> int:
        return self.distiller.max_input_tokens

    @property
    def holds(self) -> str:
        return f" and a chunk of {self.width}" + (" (prefix.chunk_tokens)" if self.chunk_tokens else "")

    @property
    def module(self) -> DistillerModule:
        return self.distiller.module

    def split_params(self):
        return dataclasses.replace(self.distiller, params=self.params).split_params()

    @classmethod
    def whole(cls, params, frozen):
        return Distiller.whole(params, frozen)

    def read_by(self, llm) -> "Chunked":
        read = dataclasses.replace(self.distiller, params=self.params).read_by(llm)
        return dataclasses.replace(self, distiller=read, params=read.params)

    def apply(self, params, demos, length) -> Prefix:
        """(B,N) int32 tokens in chunks of W columns, filled up with `EMPTY`, with lengths (B,) of whole chunks ->
        Prefix((B,C*L,llm_width), (B,)) for "concat", Prefix((B,L,llm_width), (B,)) for "mean"."""
        B, W = demos.shape[0], self.width
        inside = (jnp.arange(demos.shape[1]) < length[:, None]) & (demos != EMPTY)
        chunks = jnp.where(inside, demos, 0).reshape(-1, W)
        sizes = inside.reshape(-1, W).sum(1)
        vectors = self.module.apply({"params": params}, chunks, sizes)
        return _joined(self.join, vectors.reshape(B, -1, *vectors.shape[1:]), sizes.reshape(B, -1))

    def distill(self, demos) -> Prefix:
        """The prefix of any number of demonstrations; `distill_chunks` makes its vectors.

        Args:
            demos: (x, y) string pairs, or a list of demonstrations as token ids (list of lists of int). One that is longer than a
                chunk is left out, with a warning.
        Returns:
            Prefix((1, C * l, llm_width) or, for "mean", (1, l, llm_width), (1,) int32).
        Raises:
            UserError: no demonstrations, none that fits a chunk, or anything that `Distiller.distill` rejects.
        """
        return self.join_chunks(self.distill_chunks(self.chunks(demos)))

    def chunks(self, demos) -> list[np.ndarray]:
        """The chunks of demonstrations, as token ids, each (n,) int32 with n at most W; those that are longer are left out."""
        pieces, most = self._pieces(demos), self.longest_demo
        long = [i for i, piece in enumerate(pieces) if len(piece) > most]
        if len(long) == len(pieces):
            raise UserError(
                f"Demonstration 1 has {len(pieces[0])} tokens, but a chunk holds {most}, and the others fit none either: shorten them."
            )
        if long:
            numbers = ", ".join(str(number + 1) for number in long)
            logging.warning("Demonstrations are left out, longer than a chunk of %d tokens: number %s.", most, numbers)
        pieces = [piece for piece in pieces if len(piece) <= most]
        return _packed(pieces, Packing(self.width, self.chunk_demos, len(pieces)))

    def distill_chunks(self, chunks) -> jax.Array:
        """The vectors of each chunk, (C,L,llm_width), bit for bit the same whatever the other chunks are."""
        return jnp.asarray(self._distil_each(chunks))

    def _distil_each(self, chunks) -> np.ndarray:
        """`distill_chunks` on the host: one by one, each padded to its own bucket, so that nothing depends on the others (products of
        more rows would round differently) and few programs are compiled. They wait for each other on the device alone."""
        made = []
        for chunk in chunks:
            row = np.zeros((1, min(self.width, bucket(len(chunk)))), np.int32)
            row[0, : len(chunk)] = chunk
            made.append(_distill_row(self.module, self.params, row, np.asarray([len(chunk)], np.int32)))
        return np.concatenate([to_host(one) for one in made])

    def context(self, pairs, room: int) -> list[np.ndarray]:
        """The chunks, whose number the LLM's window limits."""
        return _packed([join_demos([pair]) for pair in pairs], self._packing(room))

    def vectors_of(self, contexts) -> list[np.ndarray]:
        if not contexts:
            return []
        made = self._distil_each([chunk for chunks in contexts for chunk in chunks]).astype(np.float32)
        parts = np.split(made, np.cumsum([len(chunks) for chunks in contexts])[:-1])
        return [part.mean(0) if self.join == "mean" else part.reshape(-1, part.shape[2]) for part in parts]

    def join_chunks(self, vectors) -> Prefix:
        """The prefix of chunks' vectors (C,L,llm_width), from one call of `distill_chunks` or several, concatenated."""
        return _joined(self.join, jnp.asarray(vectors)[None], jnp.ones((1, len(vectors)), jnp.int32))

    def _pieces(self, demos) -> list[np.ndarray]:
        reader = self.distiller
        if hasattr(demos, "__len__") and not isinstance(demos, str | dict):
            demos = list(demos)
        if (
            isinstance(demos, list)
            and demos
            and isinstance(demos[0], tuple | list)
            and demos[0]
            and isinstance(demos[0][0], str)
        ):
            read = reader.tokenizer, reader.template, reader.max_input_tokens
            demos = [pair_tokens([pair], *read) for pair in demos]
        elif isinstance(demos, list) and demos and not isinstance(demos[0], str) and np.ndim(demos[0]) == 0:
            demos = [demos]
        tokens, length = demo_tokens(demos, reader.tokenizer, reader.config, 2**30, "distiller", reader.template)
        return [np.asarray(row[:count]) for row, count in zip(tokens, length.tolist(), strict=True)]

    @classmethod
    def backbone(cls, config) -> str:
        return Distiller.backbone(config)

    @classmethod
    def positions(cls, config) -> int:
        return config.prefix.length * (cls.readings(config) if config.prefix.join == "concat" else 1)

    @classmethod
    def readings(cls, config) -> int:
        """As many chunks as there can be of k demonstrations."""
        prefix = config.prefix
        if config.stage == "pretrain":
            return prefix.chunks
        return min(prefix.chunks, config.data.k if prefix.chunk_tokens else -(-config.data.k // prefix.chunk_demos))

    @classmethod
    def packing(cls, config, window: int) -> Packing:
        columns = min(_chunk_tokens(config), window - config.prefix.length)
        return Packing(columns, config.prefix.chunk_demos, config.prefix.chunks)

    @classmethod
    def reader_settings(cls, config, backbone):
        return Distiller.reader_settings(config, backbone)

    @classmethod
    def resolved(cls, name: str, value, backbone, llm):
        return Distiller.resolved(name, value, backbone, llm)

    @classmethod
    def check(cls, config, backbone, llm) -> None:
        Distiller.check(config, backbone, llm)
        _check_truncation(config)
        reads = backbone.window - config.prefix.length
        if not config.prefix.chunk_tokens and config.data.max_demo_tokens > reads:
            raise UserError(
                f"A chunk of data.max_demo_tokens = {config.data.max_demo_tokens} is more than the distiller reads, {reads} tokens:"
                f" set prefix.chunk_tokens to {reads} or fewer."
            )
        if config.stage == "finetune" and 0 < config.prefix.chunk_tokens <= config.data.max_input_tokens:
            raise UserError(
                f"A chunk of prefix.chunk_tokens = {config.prefix.chunk_tokens} holds no demonstration whose input has "
                f"data.max_input_tokens = {config.data.max_input_tokens}: raise the first or lower the second."
            )

    @classmethod
    def init(cls, config, llm, seed: int, place: Place | None = None) -> "Chunked":
        return cls.of_trained(Distiller.init(config, llm, seed, place), config, "")

    def check_use(self, config) -> None:
        _check_truncation(config)

    @classmethod
    def sketch(cls, prefix, backbone, llm, embeddings: str = TRAINED) -> "Chunked":
        made = Distiller.sketch(prefix, backbone, llm, embeddings)
        return cls.around(made, prefix.join, prefix.chunk_demos, prefix.chunk_tokens)

    @property
    def vector_weights(self) -> int:
        return self.distiller.vector_weights

    def fit(self, shown, own, limit: int, room: int) -> int:
        """As many demonstrations as the chunks hold, since the LLM reads none of them. `limit`, that of a context, is of each."""
        del shown
        return len(self._packing(room).chunk_of([size if size <= limit else 2**30 for size in own]))

    def layout(self, chunks: int) -> Packing:
        return Packing(min(self.width, LONGEST_CONTEXT), self.chunk_demos, chunks)

    def vectors_of_chunks(self, chunks: int) -> int:
        return self.num_vectors * (chunks if self.join == "concat" else 1)

    def apply_chunks(self, params, tokens, length) -> Prefix:
        vectors = self.module.apply({"params": params}, tokens, length)
        return _joined(self.join, vectors[None], length[None])

    def lay_out(self, pairs, room: int) -> np.ndarray:
        return self._packing(room).lay_out([np.concatenate(pair) for pair in pairs])

    def columns(self, length: int, sizes) -> int:
        return length  # whole chunks

    def _packing(self, room: int) -> Packing:
        chunks = room // self.num_vectors if self.join == "concat" else 2**30
        return Packing(self.width, self.chunk_demos, chunks)

    def flops(self, llm, context: np.ndarray) -> int:
        chunks = (context.reshape(-1, self.width) != EMPTY).sum(1)
        return sum(self.distiller.flops(llm, np.zeros(count)) for count in chunks)

    def facts(self) -> dict:
        return self.distiller.facts() | {"chunked": [self.join, self.width, self.chunk_demos]}

    @classmethod
    def of_trained(cls, model: Kind, config, path: str) -> "Chunked":
        made = model if isinstance(model, Distiller) else super().of_trained(model, config, path).distiller
        return cls.around(made, config.prefix.join, config.prefix.chunk_demos, _chunk_tokens(config))

    def placed(self, put, dtype: str) -> "Chunked":
        params = put(self.params)
        return dataclasses.replace(
            self, distiller=dataclasses.replace(self.distiller, params=params, dtype=dtype), params=params
        )

    @classmethod
    def from_run(cls, config: dict, params, backbone: Path | None) -> "Chunked":
        made, prefix = Distiller.from_run(config, params, backbone), config["prefix"]
        return cls.around(made, prefix["join"], prefix["chunk_demos"], _chunk_tokens(config))

    @classmethod
    def restored(cls, config: dict, params, backbone: Path | None, place: Place | None = None):
        return Distiller.restored(config, params, backbone, place)

    @classmethod
    def backbone_params(cls, params):
        return Distiller.backbone_params(params)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return Distiller.is_in.__func__(cls, folder)

    @classmethod
    def from_folder(cls, folder: Path, place: Place | None = None) -> "Chunked":
        settings = read_settings(folder)
        own = (settings.get(name) for name in ("join", "chunk_demos", "chunk_tokens"))
        return cls.around(Distiller.from_folder(folder, place), *own)

    def settings(self) -> dict:
        own = {"kind": self.name, "join": self.join, "chunk_demos": self.chunk_demos, "chunk_tokens": self.width}
        return self.distiller.settings() | own

    def write(self, folder: Path, dtype: str = "float32", llm: str = "") -> str:
        write_folder(dataclasses.replace(self.distiller, params=self.params), folder, self.settings(), dtype, llm)
        return "A distiller of chunks as a Hugging Face folder, with mend_distiller.py for PyTorch."

    def card(self, llm: str, logits: str) -> tuple[str, str]:
        vectors = counted(self.num_vectors, "vector")
        words, one_by_one, example = self._in_words(vectors)
        shape = f"(1, {example if self.join == 'concat' else self.num_vectors}, {self.llm_width})"
        text = card_text(self.distiller, llm, logits, shape, "mend_jax.load_prefix", words)
        joined = {"concat": f"{vectors} for each, one after another", "mean": "the mean of their vectors"}
        return "A MEND distiller of chunks", f"{text}Demonstrations are read {one_by_one}: {joined[self.join]}.\n\n"

    def _in_words(self, vectors: str) -> tuple[InWords, str, int | str]:
        """(the card's words, how demonstrations are read, the number of vectors of its example's two). Where each demonstration is
        a chunk of its own, the card speaks of demonstrations: nobody need know what a chunk is."""
        concat = self.join == "concat"
        if self.chunk_demos == 1:
            demos, whose = ("each demonstration (x, y)", "its") if concat else ("demonstrations (x, y)", "their")
            words = InWords(demos, vectors, "any number of demonstrations", whose, " of a demonstration")
            return words, f"one by one, each of at most {self.width} tokens", 2 * self.num_vectors
        reads = f"any number of demonstration tokens, {self.width} in each chunk at most"
        of_each = f"{vectors} of each chunk" if concat else vectors
        words = InWords("demonstrations (x, y), concatenated,", of_each, reads, of=" of a chunk")
        chunks = f"in chunks of at most {self.chunk_demos} demonstrations and {self.width} tokens"
        return words, chunks, f"{self.num_vectors} * chunks"


def _check_truncation(config) -> None:
    if config.data.release_truncation:
        raise UserError(
            "data.release_truncation cuts a context anywhere, but chunks hold whole demonstrations: set it to false."
        )


def _chunk_tokens(config) -> int:
    """The tokens of a chunk, at most, by a run's config, which may be nested dicts."""
    return config["prefix"].get("chunk_tokens", 0) or config["data"]["max_demo_tokens"]


def _packed(pieces, packing: Packing) -> list[np.ndarray]:
    """The chunks of demonstrations, each an array of token ids, which all fit."""
    placed = packing.chunk_of([len(piece) for piece in pieces])
    chunks: list[list] = [[] for _ in range(placed[-1] + 1)]
    for piece, chunk in zip(pieces, placed, strict=True):
        chunks[chunk].append(piece)
    return [np.concatenate(chunk) for chunk in chunks]


@partial(jax.jit, static_argnums=0)
def _distill_row(module: DistillerModule, params, row, size):
    return module.apply({"params": params}, row, size)


def _joined(join: str, vectors, sizes) -> Prefix:
    """(B,C,L,D) vectors of chunks of `sizes` (B,C) tokens -> the prefix. A size of 0 means no chunk; these come last."""
    B, C, L, D = vectors.shape
    there = (sizes > 0).astype(vectors.dtype)
    count = (sizes > 0).sum(1)
    if join == "concat":
        return Prefix(vectors.reshape(B, C * L, D), L * count)
    total = (vectors * there[..., None, None]).sum(1)
    return Prefix(total / jnp.maximum(there.sum(1), 1)[:, None, None], jnp.full((B,), L, jnp.int32))
