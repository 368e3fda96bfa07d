"""A method is a prefix: what stands before a query, as embeddings with a length. What makes one is here.

Axes: B batch, N demonstration tokens, L vectors, P prefix, Q query tokens, D width.
Every row is right-padded and carries a length; rows are joined contiguously, so positions are 0, 1, 2, ...
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mend_jax.cli.errors import UserError
from mend_jax.data.query import token_ids
from mend_jax.models import int8
from mend_jax.models.decoder import Decoder
from mend_jax.models.encoder_decoder import encode
from mend_jax.models.families import Config, EncoderDecoderConfig
from mend_jax.models.folders import headless_params, load_model
from mend_jax.run.sharding import Place

PROJECTIONS = ("tanh", "linear", "identity")


@struct.dataclass
class Prefix:
    """What stands before a query, in the LLM's embedding space."""

    embeds: jax.Array  # (B,P,D) float32 or bfloat16; what reads them converts
    length: jax.Array  # (B,) int32, at most P


def join(prefix: Prefix, embeds, length=None):
    """Rows of `embeds` (B,Q,D) put right where each prefix ends: ((B,P+Q,D), length (B,))."""
    B, Q, D = embeds.shape
    if prefix.embeds.shape[1] == 0:
        return embeds, length
    room = jnp.zeros((B, Q, D), embeds.dtype)
    buffer = jnp.concatenate([prefix.embeds.astype(embeds.dtype), room], 1)
    joined = jax.vmap(lambda row, query, start: jax.lax.dynamic_update_slice(row, query, (start, 0)))(
        buffer, embeds, prefix.length
    )
    return joined, None if length is None else prefix.length + length


def continue_after(model: Decoder, params, prefix: Prefix, embeds):
    """The model's states at `embeds` (B,Q,D), read after the prefix: (B,Q,D).

    The LLM reads a query after a prefix, and a decoder distiller its placeholders after the demonstrations: one function.
    """
    joined, _ = join(prefix, embeds)
    # Padding may reach beyond the window though no row does: it is cut off, and comes back as zeros.
    beyond = max(0, joined.shape[1] - model.config.window)
    states = model.apply({"params": params}, joined[:, : joined.shape[1] - beyond])
    states = jnp.pad(states, ((0, 0), (0, beyond), (0, 0)))
    return states if prefix.embeds.shape[1] == 0 else take_rows(states, prefix.length, embeds.shape[1])


def take_rows(states, start, count: int):
    """`count` columns of (B,T,D) from each row's `start` (B,) on: (B,count,D)."""
    shape = count, states.shape[2]
    return jax.vmap(lambda row, first: jax.lax.dynamic_slice(row, (first, 0), shape))(states, start)


def no_prefix(batch_size: int, width: int) -> Prefix:
    """Zero-shot: nothing stands before the query. Prefix((batch_size, 0, width) float32, zeros (batch_size,) int32).

    Args:
        batch_size: rows; `score_options` takes one.
        width: of the LLM's embeddings, `llm.config.width`.
    """
    return Prefix(jnp.zeros((batch_size, 0, width)), jnp.zeros((batch_size,), jnp.int32))


def demonstrations_prefix(llm, demos, separator: str = " ") -> Prefix:
    """Vanilla ICL: the embedded demonstrations.

    Args:
        llm: of `load_llm`.
        demos: token ids of one context (list of int) or of several (list of lists), or (x, y) string pairs.
        separator: stands before every x and y of texts; that of a distiller is `distiller.separator`.
    Returns:
        Prefix((B, P, llm_width), (B,)) in the LLM's dtype, B the number of contexts, P the tokens of the longest.
    Raises:
        UserError: no demonstrations or an empty context, texts without a tokenizer, a token that the LLM does not have, or
            more tokens than its window.
    """
    tokens, length = demo_tokens(demos, llm.tokenizer, llm.config, llm.window, "LLM", separator)
    return Prefix(llm.embed(llm.params, tokens), length)


@dataclasses.dataclass(frozen=True, eq=False)
class SoftPrompt:
    """PromptTuning: one learned matrix, whatever the demonstrations (Lester et al., 2021)."""

    params: Any  # {"vectors": (L, llm_width)}

    @property
    def num_vectors(self) -> int:
        return self.params["vectors"].shape[0]

    @property
    def llm_width(self) -> int:
        return self.params["vectors"].shape[1]

    def apply(self, params, demos, length) -> Prefix:
        """The same L vectors for every row; `demos` (B,N) and `length` are not read."""
        vectors, rows = params["vectors"], demos.shape[0]
        return Prefix(jnp.broadcast_to(vectors, (rows, *vectors.shape)), jnp.full((rows,), len(vectors), jnp.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class Distiller:
    """The trainable model from demonstrations to vectors (paper, section 3.1).

    A decoder, or the encoder of an encoder–decoder, reads the demonstrations and then L placeholder embeddings; its
    states there, projected to the LLM's width, are the vectors.
    """

    config: Config  # of the backbone
    params: Any  # {"backbone": a model's tree, "placeholders": (L, width)} and {"projection": {"kernel", "bias"}}
    projection: str  # "tanh", "linear" or "identity"
    llm_width: int
    tokenizer: Any = None
    dtype: str = "float32"
    attention: str = "xla"
    remat: bool = False
    separator: str = " "  # stands before every x and y of texts: config.data.template of its training

    @property
    def num_vectors(self) -> int:
        return self.params["placeholders"].shape[0]

    @property
    def window(self) -> int:
        """Demonstration tokens it can read: its positions less one for each vector."""
        return self.config.window - self.num_vectors

    @property
    def settings(self) -> "Settings":
        return Settings(self.config, self.projection, self.dtype, self.attention, self.remat)

    def apply(self, params, demos, length) -> Prefix:
        """(B,N) int32 tokens with lengths (B,) int32 -> Prefix((B,L,llm_width) in `dtype`, (B,) int32, all L)."""
        return make_vectors(self.settings, params, demos, length)

    def read(self, demos):
        """Tokens (B,N) and lengths (B,) of what `distill` takes; N is one of few, because each is compiled."""
        reader = (self.tokenizer, self.config, self.window, "distiller", self.separator)
        tokens, length = demo_tokens(demos, *reader)
        return pad_columns(tokens, self.window), length

    def distill(self, demos) -> Prefix:
        """The vectors of any demonstrations, with the distiller's own parameters.

        Args:
            demos: token ids of one context (list of int) or of several (list of lists), or (x, y) string pairs
                where the distiller came with a tokenizer.
        Returns:
            Prefix((B, L, llm_width) in `dtype`, (B,) int32, all L), B the number of contexts (paper, section 3.1).
        Raises:
            UserError: no demonstrations, what is neither ids nor pairs of texts, no tokenizer for texts, a token that the
                distiller does not have, or more tokens than its window.
        """
        tokens, length = self.read(demos)
        return _distill(self.settings, self.params, tokens, length)


class Settings(NamedTuple):
    """What a distiller's computation depends on besides its arguments: hashable, and without its parameters."""

    config: Config
    projection: str
    dtype: str
    attention: str
    remat: bool


def make_vectors(settings: Settings, params, demos, length) -> Prefix:
    """`Distiller.apply` as a function of its settings."""
    dtype, backbone, rows = jnp.dtype(settings.dtype), params["backbone"], demos.shape[0]
    context = Prefix(backbone["embed"]["tokens"][demos], length)
    placeholders = jnp.broadcast_to(params["placeholders"], (rows, *params["placeholders"].shape))
    vectors = _states_at(placeholders, settings, backbone, context)
    if settings.projection != "identity":
        kernel, bias = params["projection"]["kernel"].astype(dtype), params["projection"]["bias"].astype(dtype)
        vectors = vectors @ kernel + bias
    if settings.projection == "tanh":
        vectors = jnp.tanh(vectors)
    return Prefix(vectors, jnp.full((rows,), vectors.shape[1], jnp.int32))


def _states_at(placeholders, settings: Settings, backbone, context: Prefix):
    """The backbone's states at the placeholders (B,L,width), which it reads behind the context."""
    config, dtype = settings.config, jnp.dtype(settings.dtype)
    if isinstance(config, EncoderDecoderConfig):
        L = placeholders.shape[1]
        joined, length = join(context, placeholders, jnp.full_like(context.length, L))
        return take_rows(encode(config, backbone, joined, length, dtype, settings.remat), context.length, L)
    model = Decoder(config, dtype, settings.attention, settings.remat)
    return continue_after(model, backbone, context, placeholders)


_distill = partial(jax.jit, static_argnums=0)(make_vectors)  # one for all distillers: each shape is compiled once


def init_distiller(config, llm, seed: int, place: Place | None = None) -> Distiller:
    """A fresh distiller for `llm`, as the section `prefix` of a run's config says (configs/base.py).

    `place` as in `load_llm`; what is small is wherever it was made.
    """
    backbone = load_model(config.backbone, place=place)
    params = {
        "backbone": headless_params(backbone.config, backbone.params),
        "placeholders": _initial_rows(config, backbone.params["embed"], seed),
    }
    projection = resolve_projection(config.projection, backbone.config.width, llm.config.width)
    if projection != "identity":
        shape = backbone.config.width, llm.config.width
        kernel = 0.02 * jax.random.normal(jax.random.key(seed + 1), shape)  # as the release
        params["projection"] = {"kernel": kernel, "bias": jnp.zeros(llm.config.width)}
    return Distiller(
        backbone.config.headless,
        params,
        projection,
        llm.config.width,
        backbone.tokenizer,
        config.dtype,
        llm.attention,
        config.remat,
    )


def init_soft_prompt(config, llm, seed: int, place: Place | None = None) -> SoftPrompt:
    """A fresh soft prompt in the LLM's embedding space, started as `prefix.placeholder_init` says."""
    del place  # it is small
    return SoftPrompt({"vectors": _initial_rows(config, llm.params["embed"], seed)})


def resolve_projection(projection: str, width: int, llm_width: int) -> str:
    """What "auto" stands for; `identity` needs equal widths."""
    if projection == "auto":
        return "identity" if width == llm_width else "tanh"
    if projection == "identity" and width != llm_width:
        raise UserError(
            f'prefix.projection="identity" needs a backbone as wide as the LLM, not {width} against {llm_width}: use "tanh" or "linear".'
        )
    return projection


def demo_tokens(demos, tokenizer, config: Config, window: int, reader: str, separator: str = " "):
    """Right-padded int32 tokens (B,N) and lengths (B,) of one context, of several, or of (x, y) string pairs."""
    if not hasattr(demos, "__len__"):
        raise UserError(f"Demonstrations are a list, not {demos!r}: give token ids, or [(input, output), ...].")
    if len(demos) == 0:
        raise UserError("There are no demonstrations: give at least one.")
    if isinstance(demos, str) or isinstance(demos[0], str):
        raise UserError("Demonstrations as texts are a list of (x, y) pairs, not a text: give [(input, output), ...].")
    if isinstance(demos[0], tuple | list) and len(demos[0]) and isinstance(demos[0][0], str):
        demos = [pair_tokens(demos, tokenizer, separator)]
    elif not hasattr(demos[0], "__len__") or np.ndim(demos[0]) == 0:
        demos = [demos]
    demos = [token_ids(row, "a context of demonstrations", "pairs of texts") for row in demos]
    for row in demos:
        if len(row) == 0:
            raise UserError("A context of demonstrations is empty: every context needs at least one token.")
        wrong = next((int(token) for token in row if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"The demonstrations hold token {wrong}, the {reader} has {config.vocab_size}: use its own tokenizer."
            )
    longest = max(len(row) for row in demos)
    if longest > window:
        raise UserError(
            f"The demonstrations have {longest} tokens, the {reader} reads at most {window}{config.window_reason}:"
            " give fewer or shorter ones."
        )
    tokens = np.zeros((len(demos), longest), np.int32)
    for row, ids in zip(tokens, demos, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in demos], jnp.int32)


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length`: at most a third is padding."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def pad_columns(tokens, window: int):
    """(B,N) tokens with N padded to its bucket, or to the window where that is less."""
    return jnp.pad(tokens, ((0, 0), (0, min(window, bucket(tokens.shape[1])) - tokens.shape[1])))


def pair_tokens(pairs, tokenizer, separator: str = " ") -> list[int]:
    """The context of (x, y) string pairs: each x and y behind the separator, as in training."""
    if tokenizer is None:
        raise UserError("Demonstrations as texts need a tokenizer: give token ids, or a folder with tokenizer files.")
    wrong = next((p for p in pairs if isinstance(p, str) or len(p) != 2 or not all(isinstance(t, str) for t in p)), None)
    if wrong is not None:
        raise UserError(f"A demonstration is a pair of texts, (input, output), not {wrong!r}.")
    texts = [separator + text for pair in pairs for text in pair]
    return [token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids]


def _initial_rows(config, embed, seed: int):
    """(L, width) float32: random rows of the token table (the release's start), or random normal."""
    key, (words, width) = jax.random.key(seed), embed["tokens"].shape
    if config.placeholder_init == "normal":
        return 0.02 * jax.random.normal(key, (config.length, width))
    picked = jax.random.randint(key, (config.length,), 0, words)
    return int8.rows(int8.table(embed, "tokens"), picked, jnp.float32).astype(jnp.float32)
