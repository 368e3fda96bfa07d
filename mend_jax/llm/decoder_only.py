"""The frozen decoder-only LLM: whatever precedes a query, the LLM reads it as embeddings.

Axes: B batch, R queries after each prefix, P prefix, Q query tokens, T any sequence, D width, V vocabulary.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES
from mend_jax.data.bos import NONE, bos_token
from mend_jax.data.query import Query
from mend_jax.llm.encoder_decoder import EncoderDecoderLLM
from mend_jax.llm.frozen import FrozenLLM
from mend_jax.models.decoder import Cache, Decoder
from mend_jax.models.families import DecoderConfig, EncoderDecoderConfig, from_hf_config
from mend_jax.models.folders import Model, init_model, init_params, load_model, load_tokenizer, local_folder
from mend_jax.models.stacks import as_bits
from mend_jax.prefixes.prefix import Prefix, continue_after
from mend_jax.run.sharding import Place


@dataclasses.dataclass(frozen=True, eq=False)
class LLM(FrozenLLM):
    """A decoder-only LLM; its `params` are a Decoder's tree, {"embed", "layers", ...}."""

    config: DecoderConfig

    @property
    def model(self) -> Decoder:
        return Decoder(self.config, jnp.dtype(self.dtype), self.attention, self.remat)

    start_token = None  # only an encoder–decoder has one: the first token that its decoder reads

    def targets(self, query: Query) -> Query:
        """The tokens that `states` are at: the whole query."""
        return query

    def states(self, params, prefix: Prefix, query: Query):
        """The hidden states *at* the query's tokens, after the prefix: (B*R,Q,D) in `dtype`. Rows beyond a length are garbage.

        R consecutive rows of queries follow each of the B prefixes, which is read once for all of them.
        """
        tokens, contexts = query.tokens, len(prefix.length)
        prefix = self.begin(params, prefix)
        if len(tokens) == contexts:
            return continue_after(self.model, _read(params), prefix, self.embed(params, tokens))
        at = jnp.broadcast_to(jnp.arange(tokens.size // contexts), (contexts, tokens.size // contexts))
        segment, position = jnp.divmod(at, tokens.shape[1])
        cache = Cache(*self._keys_and_values(params, prefix), prefix.length)
        states = self.cached_states(params, cache, tokens.reshape(at.shape), position, 1 + segment)
        return states.reshape(*tokens.shape, -1)

    def text_states(self, params, tokens, length):
        """The states (B,T,D) of texts alone, behind nothing but the BOS where there is one."""
        rows = len(tokens)
        nothing = Prefix(jnp.zeros((rows, 0, self.config.width), self.dtype), jnp.zeros(rows, jnp.int32))
        return self.states(params, nothing, Query(tokens, length, jnp.zeros_like(length)))

    def prefix_cache(self, params, prefix: Prefix) -> Cache:
        """Keys and values of one prefix (B == 1; P may be 0), to be shared by every query after it; the BOS is one of them."""
        keys, values, length = self.prefix_caches(params, prefix)
        return Cache(keys[:, 0], values[:, 0], length[0])

    def prefix_caches(self, params, prefix: Prefix) -> Cache:
        """Those of each of B prefixes."""
        prefix = self.begin(params, prefix)
        return Cache(*self._keys_and_values(params, prefix), prefix.length)

    def _keys_and_values(self, params, prefix: Prefix):
        return self.model.clone(keep_cache=True).apply({"params": _read(params)}, prefix.embeds)[1]

    def cached_states(self, params, cache: Cache, tokens, positions, segments, items=None):
        """States (B,T,D) of rows that all follow the one cached prefix, or each its own.

        Args:
            tokens: (B,T) int32.
            positions: (B,T) int32, counted from the end of the prefix.
            segments: (B,T) int32: every later token sees 0, only tokens of segment j > 0 see j, and -1 is padding.
                So an input (0) is read once, and every answer option (1, 2, ...) sees it and itself.
            items: (B,T) int32: a token sees only tokens of its own item, so that a row may hold several; None: one item a row.
        """
        T, length = tokens.shape[1], cache.length[..., None]
        within = jnp.tril(jnp.ones((T, T), bool))[None] & (
            (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        )
        if items is not None:
            within &= items[:, None, :] == items[:, :, None]
        embeds = self.embed(params, tokens)
        return self.model.apply({"params": _read(params)}, embeds, length + positions, cache, within)

    def prefill(self, params, cache: Cache, inputs, length, room: int):
        """Reads inputs (B,X) with lengths (B,) after the one prefix, or each after its own: (what `decode_next` needs for answers
        of at most `room` tokens, states (B,D) that predict the first)."""
        (B, X), at = inputs.shape, jnp.arange(inputs.shape[1])[None]
        within = jnp.broadcast_to(jnp.tril(jnp.ones((X, X), bool)), (B, X, X))
        positions = jnp.broadcast_to(cache.length[..., None] + at, (B, X))
        states, own = self._with_keys(params, cache, inputs, positions, within)
        # Each row gets the prefix's keys, its own behind them, and room behind these: what is no row's is overwritten.
        put = partial(jax.lax.dynamic_update_slice_in_dim, axis=2) if cache.length.ndim == 0 else _put_rows
        keys, values = (
            put(_with_room(before, B, X + room), new, cache.length)
            for before, new in zip((cache.keys, cache.values), own, strict=True)
        )
        return Cache(keys, values, cache.length + length), states[jnp.arange(B), length - 1]

    def decode_next(self, params, kept: Cache, tokens):
        """Reads the next token (B,) of each answer: (`kept` with it, states (B,D) that predict the one after)."""
        within = jnp.ones((len(tokens), 1, 1), bool)
        states, own = self._with_keys(params, kept, tokens[:, None], kept.length[:, None], within)
        keys, values = (
            _put_rows(old, new, kept.length) for old, new in zip((kept.keys, kept.values), own, strict=True)
        )
        return Cache(keys, values, kept.length + 1), states[:, 0]

    def _with_keys(self, params, cache, tokens, positions, within):
        """States (B,T,D) of tokens after a cache, and their keys and values (layers,B,T,G,F)."""
        model = self.model.clone(keep_cache=True)
        return model.apply({"params": _read(params)}, self.embed(params, tokens), positions, cache, within)


def _read(params):
    """The params as the model reads them."""
    return {**params, "layers": as_bits(params["layers"])}


def _with_room(a, rows: int, room: int):
    """A prefix's keys (layers,P,G,F) for each of several rows, or those that each has, with `room` columns more:
    (layers,rows,P+room,G,F)."""
    if a.ndim == 4:
        a = jnp.broadcast_to(a[:, None], (len(a), rows, *a.shape[1:]))
    return jnp.pad(a, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0)))


def _put_rows(kept, new, at):
    """Keys (layers,B,S,G,F) with those of each row's new tokens (layers,B,T,G,F) from its column `at` (B,) on."""
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 1), (1, 1, 0), 1)
    return put(kept, new, at)


def load_llm(
    path: str | Path,
    dtype: str = "float32",
    attention: str = "xla",
    remat: bool = False,
    weights: str = "full",
    place: Place | None = None,
    bos: str = NONE,
) -> LLM | EncoderDecoderLLM:
    """The LLM of a Hugging Face folder, a hub name, a GGUF file or a packaged model.

    Args:
        path: a folder with config.json, weights (safetensors, single or sharded; .bin where PyTorch is installed)
            and, if texts are to be read, a tokenizer; a hub name such as "gpt2-large"; a file such as "model.gguf"; or one
            of the names of models/gguf/packaged.py.
        dtype: "float32" or "bfloat16", of the weights and of the arithmetic (norms and softmax stay float32).
        attention: "xla", or "cudnn" (NVIDIA, bfloat16).
        remat: recompute each layer in the backward pass.
        weights: "full" (in `dtype`), or "int8": kernels and token tables in 8 bits with a scale per output channel
            (models/int8.py), a quarter of the bytes of float32; the arithmetic is still that of `dtype`.
        place: where each parameter lives, for an LLM that is split over devices (sharding.py).
        bos: whether the BOS stands before every prefix: "true", "false", or "auto": as the tokenizer does (data/bos.py).
    Returns:
        An `LLM`, or an `EncoderDecoderLLM` with the same methods for the T5 family; its params are on the default device.
    Raises:
        UserError: no such folder, an unsupported model_type, weights that do not fit config.json, another dtype,
            attention, weights or bos than these, or "true" where there is no BOS.
    """
    _check(dtype, attention, weights, bos)
    model = load_model(path, dtype, weights == "int8", place)
    return _llm(path, model, dtype, attention, remat, bos)


def init_llm(
    path: str | Path,
    seed: int,
    dtype: str = "float32",
    attention: str = "xla",
    remat: bool = False,
    place: Place | None = None,
    bos: str = NONE,
) -> LLM:
    """As `load_llm` with random weights: the start of stage "lm" where `path` holds a config.json alone."""
    _check(dtype, attention, "full", bos)
    return _llm(path, init_model(path, seed, dtype, place), dtype, attention, remat, bos)


def without_weights(path: str | Path, dtype: str = "float32", bos: str = NONE) -> LLM:
    """The settings and the tokenizer of `load_llm` alone, for what is counted before weights are read."""
    folder = local_folder(path)
    tokenizer = load_tokenizer(folder)
    bos = bos_token(bos, tokenizer, str(path))
    return LLM(from_hf_config(folder), None, tokenizer, str(path), dtype, bos=bos, folder=str(folder))


def with_layers(llm: LLM, layers: int, seed: int) -> LLM:
    """The LLM with only its first `layers` layers, or with new ones on top of all; 0 keeps it as it is.

    A new layer adds nothing at first (the last product of its attention and of its MLP is 0), so that a grown LLM
    starts where the small one ended. Raises UserError if norms come last: then no layer can add nothing.
    """
    more = layers - llm.config.layers
    if not layers:
        return llm
    if more > 0 and not llm.config.norm_first:
        raise UserError(
            f"llm.layers is {layers}, but {llm.path} has {llm.config.layers} layers, and only models whose norms come "
            "first can get more: set fewer."
        )
    config = dataclasses.replace(llm.config, layers=layers)
    stack = jax.tree.map(lambda a: a[:layers], llm.params["layers"])
    if more > 0:
        new = init_params(dataclasses.replace(config, layers=more), seed)["layers"]
        new |= {name: jax.tree.map(jnp.zeros_like, new[name]) for name in ("out", "down")}
        stack = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stack, new)
    return dataclasses.replace(llm, config=config, params={**llm.params, "layers": stack})


def _check(dtype: str, attention: str, weights: str, bos: str) -> None:
    for name, value in {"dtype": dtype, "attention": attention, "weights": weights, "bos": bos}.items():
        choices = CHOICES["data.bos" if name == "bos" else f"llm.{name}"]
        if value not in choices:
            raise UserError(f"{name} is {value!r}: it must be one of {', '.join(choices)}.")
    if attention == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            f'attention "cudnn" needs an NVIDIA GPU, but JAX finds only {jax.default_backend()}: use "xla".'
        )


def _llm(path: str | Path, model: Model, dtype: str, attention: str, remat: bool, bos: str) -> LLM | EncoderDecoderLLM:
    """`path` as it was given: packs and messages say what everybody can find, not where the hub's copy lies here."""
    kind = EncoderDecoderLLM if isinstance(model.config, EncoderDecoderConfig) else LLM
    if kind is EncoderDecoderLLM and attention != "xla":
        raise UserError(f'attention "{attention}" is for decoder-only models, {path} is none: use "xla".')
    if kind is EncoderDecoderLLM and not model.config.decoder_layers:
        raise UserError(f"{path} is an encoder alone, which predicts no words: it can be a backbone, not the LLM.")
    token = bos_token(bos, model.tokenizer, str(path))
    if kind is EncoderDecoderLLM and token is not None:
        raise UserError(f"{path} is an encoder–decoder, which reads no BOS: set --config.data.bos=false.")
    settings = str(path), dtype, attention, remat, token, str(model.folder)
    return kind(model.config, model.params, model.tokenizer, *settings)
