"""One encoder–decoder (T5's family) that reads embeddings; tokens are embedded outside it.

Axes: B batch, S tokens of the encoder, Y tokens of the decoder, T any sequence that reads, D width, H heads, F width of
a head, V vocabulary. Rows are right-padded; the encoder's attention sees a row's own tokens alone, so the padding
changes no number. Both stacks are scanned: their parameters are stacked, (layers, ...).
Positions enter as a bias of the scores by the distance between two tokens, so there is no longest sequence; scores are
not divided by sqrt(F), which T5's weights have taken up.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mend_jax.models.attention import MASKED
from mend_jax.models.config import EncoderDecoderConfig
from mend_jax.models.decoder import ACTIVATIONS
from mend_jax.models.int8 import Dense
from mend_jax.models.norms import rms_norm
from mend_jax.models.stacks import keep
from mend_jax.run.sharding import shard_copies, shard_rows

KEPT = ("qkv", "attended", "middle", "up")  # for the backward pass: the products, as the decoder-only models


class Attention(nn.Module):
    """Softmax attention without a scale; scores and softmax in float32."""

    config: EncoderDecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, source, bias, mask, kept=None, at=None):
        """x (B,T,D) reads source (B,S,D) -> (B,T,D), and the keys and values that it read.

        Args:
            bias: (R,H,T,S) float32, each for B/R rows, or None.
            mask: (B,1 or T,S), what is seen.
            kept: keys and values (B,S,H,F) of what was read before. Those of `source` are put there at column `at`; where
                `source` is None, all are there already.
        """
        config = self.config
        q = self._heads("q", x)
        k, v = kept if source is None else (self._heads(name, source) for name in ("k", "v"))
        if kept is not None and source is not None:
            k, v = (jax.lax.dynamic_update_slice_in_dim(a, new, at, 1) for a, new in zip(kept, (k, v), strict=True))
        scores = jnp.einsum("bthf,bshf->bhts", q, k, preferred_element_type=jnp.float32)
        if bias is not None:
            separate = scores.reshape(bias.shape[0], -1, *scores.shape[1:])
            scores = (separate + bias[:, None]).reshape(scores.shape)
        shares = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED)).astype(v.dtype)
        out = keep(jnp.einsum("bhts,bshf->bthf", shares, v), "attended")
        return _dense(config.width, self.dtype, "out")(out.reshape(*x.shape[:2], -1)), (k, v)

    def _heads(self, name, a):
        """(B,T,D) -> (B,T,H,F)."""
        made = _dense(self.config.heads * self.config.head_width, self.dtype, name)(a)
        return keep(made, "qkv").reshape(*a.shape[:2], self.config.heads, -1)


class Block(nn.Module):
    """Attention to itself, in a decoder to the encoder's states, then the MLP; each after a norm, with a residual."""

    config: EncoderDecoderConfig
    dtype: jnp.dtype
    cross: bool

    @nn.compact
    def __call__(self, x, kept, bias, mask, encoded, encoded_mask, at):
        """kept None, or (keys and values of itself, those of the encoder's states): a decoder's of an answer that grows, whose
        new tokens stand at column `at`."""
        config, activation = self.config, ACTIVATIONS[self.config.activation]
        x = shard_rows(x)
        y, (own, others) = self._norm("norm1")(x), (None, None) if kept is None else kept
        y, own = Attention(config, self.dtype, name="self")(y, y, bias, mask, own, at)
        x = keep(shard_rows(x + y), "middle")
        if self.cross:
            attend = Attention(config, self.dtype, name="cross")
            y, _ = attend(self._norm("cross_norm")(x), encoded, None, encoded_mask, others)
            x = keep(shard_rows(x + y), "middle")
        y = self._norm("norm2")(x)
        up = keep(_dense(config.mlp_width, self.dtype, "up")(y), "up")
        if config.gated:
            up = activation(keep(_dense(config.mlp_width, self.dtype, "gate")(y), "up")) * up
        else:
            up = activation(up)
        return shard_rows(x + _dense(config.width, self.dtype, "down")(up)), None if kept is None else own

    def _norm(self, name):
        return rms_norm(self.config.norm_eps, self.dtype, name)


class Stack(nn.Module):
    """All layers of one side, the bias by distance before them and the norm behind."""

    config: EncoderDecoderConfig
    layers: int
    cross: bool  # the decoder: attends to the encoder's states, and to its own only backwards
    dtype: jnp.dtype
    remat: bool

    @nn.compact
    def __call__(self, x, mask, encoded=None, encoded_mask=None, kept=None, at=None):
        """x (B,T,D) -> (B,T,D); mask (B,1 or T,T). With `kept`, all layers' of `Block`, also the keys and values of itself."""
        config = self.config
        biases = self.param("distance_bias", nn.initializers.normal(0.02), (config.buckets, config.heads))
        buckets = distance_buckets(mask.shape[2], config, both_ways=not self.cross)
        if kept is not None:
            buckets = jax.lax.dynamic_slice_in_dim(buckets, at, x.shape[1])
        bias = shard_copies(biases.astype(jnp.float32))[:, buckets]  # (R,T,T,H)
        saved = jax.checkpoint_policies.save_only_these_names(*() if self.remat else KEPT)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=saved),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 5),
            length=self.layers,
        )(config, self.dtype, self.cross, name="layers")
        x, bias = shard_rows(x.astype(self.dtype)), bias.transpose(0, 3, 1, 2)
        x, own = layers(x, kept, bias, mask, encoded, encoded_mask, at)
        x = rms_norm(config.norm_eps, self.dtype, "final_norm")(shard_rows(x))
        return x if kept is None else (x, own)


def distance_buckets(length: int, config: EncoderDecoderConfig, both_ways: bool):
    """(T,T) int32: the bucket of the distance from each token (row) to each (column).

    Half of the buckets are for one distance each, the others for ranges that grow logarithmically to `max_distance`.
    `both_ways`: half of all are for tokens to the right; else these, which a decoder does not see, count as distance 0.
    """
    distance = jnp.arange(length)[None] - jnp.arange(length)[:, None]
    count, first = config.buckets, 0
    if both_ways:
        count //= 2
        first, distance = jnp.where(distance > 0, count, 0), jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = count // 2
    growth = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(config.max_distance / exact)
    far = jnp.minimum(exact + (growth * (count - exact)).astype(jnp.int32), count - 1)
    return first + jnp.where(distance < exact, distance, far)


def encode(config: EncoderDecoderConfig, params, embeds, length, dtype=jnp.float32, remat: bool = False):
    """The encoder's states (B,S,D) of embeddings (B,S,D) with lengths (B,); rows beyond a length are garbage."""
    mask = _valid(embeds.shape[1], length)
    return Stack(config, config.layers, False, dtype, remat).apply({"params": params["encoder"]}, embeds, mask)


def decode(config, params, embeds, encoded, encoded_length, segments=None, dtype=jnp.float32, remat: bool = False):
    """The decoder's states (B,Y,D), of which the head makes logits.

    Args:
        embeds: (B,Y,D), what the decoder reads.
        encoded: (B,S,D) with lengths (B,), of `encode`.
        segments: (B,Y) int32: a token sees those before it of its own segment; None: all are one.
    """
    Y = embeds.shape[1]
    mask = jnp.tril(jnp.ones((Y, Y), bool))[None]
    if segments is not None:
        mask = mask & (segments[:, None, :] == segments[:, :, None])
    stack = Stack(config, config.decoder_layers, True, dtype, remat)
    seen = _valid(encoded.shape[1], encoded_length)
    return _scaled(config, stack.apply({"params": params["decoder"]}, embeds, mask, encoded, seen))


class Decoding(NamedTuple):
    """What a decoder keeps of the encoder's states and of the answers (B) that it has begun."""

    keys: jax.Array  # (layers,B,Y,H,F) of the answers' tokens, Y of which there is room for
    values: jax.Array  # as keys
    encoded_keys: jax.Array  # (layers,B,S,H,F) of the encoder's states
    encoded_values: jax.Array  # as encoded_keys
    encoded_length: jax.Array  # (B,) int32
    length: jax.Array  # () int32: tokens that were read, of every answer


def begin_decoding(config, params, encoded, encoded_length, room: int, dtype=jnp.float32) -> Decoding:
    """Of the encoder's states (B,S,D), for answers of at most `room` tokens."""
    width, cross = config.heads * config.head_width, params["decoder"]["layers"]["cross"]

    def heads(name):
        made = jax.vmap(lambda one: _dense(width, dtype, None).apply({"params": one}, encoded))(cross[name])
        return made.reshape(*made.shape[:3], config.heads, -1)

    empty = jnp.zeros((config.decoder_layers, len(encoded), room, config.heads, config.head_width), dtype)
    return Decoding(empty, empty, heads("k"), heads("v"), encoded_length, jnp.int32(0))


def decode_next(config, params, embeds, kept: Decoding, dtype=jnp.float32):
    """`decode` of each answer's next token alone, embeds (B,1,D): (states (B,1,D), the `Decoding` behind it)."""
    mask = (jnp.arange(kept.keys.shape[2]) <= kept.length)[None, None]
    seen = _valid(kept.encoded_keys.shape[2], kept.encoded_length)
    layers = (kept.keys, kept.values), (kept.encoded_keys, kept.encoded_values)
    stack = Stack(config, config.decoder_layers, True, dtype, False)
    states, own = stack.apply({"params": params["decoder"]}, embeds, mask, None, seen, layers, kept.length)
    return _scaled(config, states), kept._replace(keys=own[0], values=own[1], length=kept.length + embeds.shape[1])


def _scaled(config, states):
    """The decoder's states, as the head reads them."""
    return states * config.width**-0.5 if config.scaled_head else states


def init_params(config: EncoderDecoderConfig, seed) -> dict:
    """Random float32 parameters: {"embed", "encoder"}, and "decoder" where there is one."""

    def init(key):
        normal, keys, x = nn.initializers.normal(0.02), jax.random.split(key, 4), jnp.zeros((1, 2, config.width))
        names = ("tokens",) if config.tied_head else ("tokens", "head")
        shape, mask = (config.vocab_size, config.width), jnp.ones((1, 1, 2), bool)
        params = {"embed": {name: normal(key, shape) for name, key in zip(names, keys, strict=False)}}
        encoder = Stack(config, config.layers, False, jnp.float32, False)
        params["encoder"] = encoder.init(keys[2], x, mask)["params"]
        if config.decoder_layers:
            decoder = Stack(config, config.decoder_layers, True, jnp.float32, False)
            params["decoder"] = decoder.init(keys[3], x, mask, x, mask)["params"]
        return params

    return jax.jit(init)(seed if isinstance(seed, jax.Array) else jax.random.key(seed))


def _valid(columns: int, length):
    """(B,1,S) bool: the columns of each row that are no padding."""
    return (jnp.arange(columns)[None] < length[:, None])[:, None]


def _dense(features, dtype, name):
    return Dense(features, use_bias=False, dtype=dtype, name=name)
