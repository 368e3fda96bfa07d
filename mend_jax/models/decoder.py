"""One decoder-only transformer that reads embeddings; tokens are embedded outside it. Families are settings of it.

Axes: B batch, T any sequence, P prefix, S keys (P + T), D width, W width inside the layers (D but for opt-350m),
H heads, G heads of keys and values, F width of a head, V vocabulary.
The layers are scanned: their parameters are stacked, (layers, ...), and compile time does not grow with depth.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mend_jax.models import rope
from mend_jax.models.attention import (
    Reach,
    attention_after,
    causal_attention,
    fused_attention_after,
    fused_causal_attention,
)
from mend_jax.models.config import DecoderConfig
from mend_jax.models.int8 import Dense
from mend_jax.models.norms import layer_norm, rms_norm, rms_norm_module
from mend_jax.models.stacks import keep, written
from mend_jax.run.sharding import shard_rows

# What a layer keeps for the backward pass: the products. Norms, activations and rotations are computed again, which is
# quicker than to write and read what they would keep (three times as much).
KEPT = ("qkv", "attended", "normaliser", "middle", "up")
ACTIVATIONS = {"gelu_tanh": partial(nn.gelu, approximate=True), "relu": nn.relu, "silu": nn.silu}


class Cache(NamedTuple):
    """Keys and values of one prefix, shared by every row that is read after it; or of a prefix for each row."""

    keys: jax.Array  # (layers, P, G, F), or (layers, B, P, G, F)
    values: jax.Array  # as keys
    length: jax.Array  # () or (B,) int32: rows beyond are padding

    @property
    def columns(self) -> int:
        return self.keys.shape[-3]

    @classmethod
    def join(cls, caches: "Sequence[Cache]") -> "Cache":
        """Of single prefixes, of as many columns each, one of them all."""
        return cls(*(jnp.stack(parts, axis) for parts, axis in zip(zip(*caches, strict=True), (1, 1, 0), strict=True)))

    def take(self, rows) -> "Cache":
        """Of several prefixes, for each of some rows (B,) int32 the one with this number."""
        return Cache(self.keys[:, rows], self.values[:, rows], self.length[rows])


class Seen(NamedTuple):
    """What the tokens of rows that are read after a prefix see."""

    within: jax.Array  # (B,T,T) bool: of their own row
    length: jax.Array  # () or (B,) int32: of the prefix
    at: jax.Array | None  # (B,T) int32: where they stand; None where no layer slides


class Wanted(NamedTuple):
    """The columns of whose states there is need, next to each other in each row: none comes after them but padding."""

    start: jax.Array  # (B,) int32
    count: int

    def take(self, a):
        """These columns of (B,T,...): (B,count,...)."""
        return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, self.count))(a, self.start)


class Block(nn.Module):
    """Attention and MLP with residuals, each after a norm or (norm_first=False) before one; or between two (post_norms)."""

    config: DecoderConfig
    dtype: jnp.dtype
    attention: str
    keep_cache: bool

    @nn.compact
    def __call__(self, x, cache, slides, seen, rotations, wanted=None):
        """x (B,T,W); cache None or this layer's (keys, values) of a prefix; slides () bool, None where all layers are alike;
        seen None (causal) or a `Seen`; rotations None or those of the tokens' positions, in full layers and in sliding ones;
        wanted None or a `Wanted`: of the other columns there are keys and values alone."""
        config, carried, x = self.config, x.dtype, shard_rows(x.astype(self.dtype))
        norm1, norm2 = (_norm(config, self.dtype, name) for name in ("norm1", "norm2"))
        residual_std = 0.02 / (2 * max(1, config.layers)) ** 0.5  # GPT-2's: the sum of all residuals keeps its size
        q, k, v = self._heads(norm1(x) if config.norm_first else x, self._rotations(rotations, slides))
        self.sow("intermediates", "queries", q)  # kept for models/attention_weights.py alone: else this does nothing
        if wanted is not None:
            cache, seen = self._before(wanted, k, v)
            x, q, k, v = (wanted.take(a) for a in (x, q, k, v))
        y = self._attend(q, k, v, cache, seen, slides).reshape(*x.shape[:2], config.heads * config.head_width)
        y = _dense(config.hidden_width, self.dtype, "out", config.out_bias, residual_std)(y)
        x = x + (_norm(config, self.dtype, "out_norm")(y) if config.post_norms else y)
        x = keep(shard_rows(x if config.norm_first else norm1(x)), "middle")
        y = self._up(norm2(x) if config.norm_first else x)
        y = _dense(config.hidden_width, self.dtype, "down", config.mlp_bias, residual_std)(y)
        x = x + (_norm(config, self.dtype, "down_norm")(y) if config.post_norms else y)
        x = shard_rows(x if config.norm_first else norm2(x))
        kept = tuple(a.astype(written(a.dtype)) for a in (k, v)) if self.keep_cache else None
        return x.astype(carried), kept

    def _before(self, wanted: Wanted, k, v):
        """(keys, values) of the columns before the wanted ones, as of a prefix for each row, and what these see."""
        (B, T), count = k.shape[:2], wanted.count
        within = jnp.broadcast_to(jnp.tri(count, dtype=bool), (B, count, count))
        at = wanted.start[:, None] + jnp.arange(count) if self.config.sliding else None
        return (k[:, : T - count], v[:, : T - count]), Seen(within, wanted.start, at)

    def _rotations(self, rotations, slides):
        """Those of this layer."""
        if self.config.sliding_rope is None or rotations is None:
            return rotations
        full, sliding = rotations
        if slides is None:
            return sliding if self.config.sliding else full
        return jax.tree.map(partial(jnp.where, slides), sliding, full)

    def _heads(self, y, rotations):
        """Queries (B,T,H,F), keys and values (B,T,G,F), turned by their positions."""
        config, F = self.config, self.config.head_width
        if config.fused_qkv:
            qkv = keep(_dense(3 * config.hidden_width, self.dtype, "qkv", config.qkv_bias)(y), "qkv")
            q, k, v = jnp.split(qkv, 3, axis=-1)
        else:
            heads = (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
            q, k, v = (keep(_dense(count * F, self.dtype, name, config.qkv_bias)(y), "qkv") for name, count in heads)
        q, k, v = (a.reshape(*a.shape[:2], a.shape[2] // F, F) for a in (q, k, v))
        if config.qk_norm:
            # Heads may lie on several devices, so they are not joined with the tokens.
            q, k = (
                rms_norm_module(config.norm_eps, self.dtype, name, config.norm_adds_one)(a)
                for name, a in (("q_norm", q), ("k_norm", k))
            )
        if config.score_width != F:  # attention divides by the root of F
            q = q * (F / config.score_width) ** 0.5
        if rotations is not None:
            q, k = rope.rotate(q, *rotations), rope.rotate(k, *rotations)
        return q, k, v

    def _attend(self, q, k, v, cache, seen, slides):
        span = self.config.attention_span if self.config.sliding else 0
        if cache is not None:
            after = fused_attention_after if self.attention == "cudnn" else attention_after
            hides = seen.at is not None and span < cache[0].shape[-3] + q.shape[1]
            far = span if slides is None else jnp.where(slides, span, jnp.iinfo(jnp.int32).max)
            return after(q, cache, k, v, seen.within, seen.length, Reach(seen.at, far) if hides else None)
        # Rows are right-padded, so the causal mask alone keeps padding from every valid token.
        attend = fused_causal_attention if self.attention == "cudnn" else causal_attention
        return attend(q, k, v, span, slides)

    def _up(self, y):
        """The activated inside of the MLP (B,T,mlp_width)."""
        config, activation = self.config, ACTIVATIONS[self.config.activation]
        up = keep(_dense(config.mlp_width, self.dtype, "up", config.mlp_bias)(y), "up")
        if not config.gated:
            return activation(up)
        gate = keep(_dense(config.mlp_width, self.dtype, "gate", config.mlp_bias)(y), "up")
        return activation(gate) * up


class Decoder(nn.Module):
    """(B,T,D) embeddings -> (B,T,D) states, of which the head makes logits. Positions 0, 1, 2, ... come in here."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32  # of the arithmetic; parameters keep the dtype they are given in
    attention: str = "xla"
    remat: bool = False
    keep_cache: bool = False

    @nn.compact
    def __call__(self, embeds, positions=None, cache=None, within=None, wanted=None):
        """States (B,T,D); with `keep_cache` also keys and values, each (layers,B,T,G,F).

        Args:
            embeds: (B,T,D).
            positions: (B,T) int32; None is 0..T-1.
            cache: a `Cache`: the rows are read after this prefix. Needs `positions` and `within`.
            within: (B,T,T) bool, what each token sees of its own row; None is causal.
            wanted: a `Wanted`: the states (B,count,D) of these columns alone, of which the last layer computes no others. Without
                `cache`; its gradient would add up whole stacks of weights, layer by layer: prefix.py has the way around it.
        """
        config, project = self.config, partial(_dense, dtype=self.dtype, bias=False)
        tables, rotations = Embed(config, name="embed")(), None
        x, length = embeds.astype(self.dtype), embeds.shape[1]
        if config.width != config.hidden_width:
            x = project(config.hidden_width, name="project_in")(x)
        if config.rope is not None:
            at = jnp.arange(length)[None] if positions is None else positions
            rotations = rope.rotations(config.rope, config.head_width, at)
            if config.sliding_rope is not None:
                rotations = rotations, rope.rotations(config.sliding_rope, config.head_width, at)
        else:
            table, first = tables["positions"], config.position_offset
            rows = table[None, first : first + length] if positions is None else table[first + positions]
            x = x + rows.astype(self.dtype)
        kept = jax.checkpoint_policies.save_only_these_names(*() if self.remat else KEPT)
        block = nn.remat(Block, prevent_cse=False, policy=kept)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=config.layers,
        )(config, self.dtype, self.attention, self.keep_cache, name="layers")
        # The scan's carry keeps the sharding that it begins with, so `x` gets it before: else every layer would split the
        # carry over the axis `tensor` and gather it again.
        before, seen, slides = None, None, None
        if cache is not None:
            before, at = (cache.keys, cache.values), positions if config.sliding else None
            seen = Seen(within, cache.length, at)
        if len(set(config.sliding)) > 1:
            slides = jnp.asarray(config.sliding)
        if wanted is None:
            x, kept = layers(shard_rows(x.astype(written(x.dtype))), before, slides, seen, rotations)
            x, kept = jax.tree.map(lambda a: a.astype(self.dtype), (x, kept))
        else:
            x, kept = self._last_alone(shard_rows(x), slides, rotations, wanted), None
        x = shard_rows(x)
        if config.final_norm:
            x = _norm(config, self.dtype, "final_norm")(x)
        if config.width != config.hidden_width:
            x = project(config.width, name="project_out")(x)
        return (x, kept) if self.keep_cache else x

    def _last_alone(self, x, slides, rotations, wanted: Wanted):
        """The layers, the last of them for the wanted columns alone: (B,count,W). Each is read from where all lie, as the scan
        does: without its last layer the stack would be copied."""
        stacked, last = self.get_variable("params", "layers"), self.config.layers - 1
        block = Block(self.config, self.dtype, self.attention, False, parent=None)

        def read(i, x, wanted=None):
            params, slide = jax.tree.map(lambda a: a[i], (stacked, slides))
            return block.apply({"params": params}, x, None, slide, None, rotations, wanted)[0]

        return read(last, jax.lax.fori_loop(0, last, read, x) if last else x, wanted)


class Embed(nn.Module):
    """The tables of tokens, of positions (where they are learned) and of the head (where it is not the tokens').

    Parameters only, read by whoever needs them.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self):
        config, normal = self.config, nn.initializers.normal(0.02)
        shapes = {"tokens": (config.vocab_size, config.width)}
        if config.rope is None:
            shapes["positions"] = (config.max_positions + config.position_offset, config.hidden_width)
        if not config.tied_head:
            shapes["head"] = (config.vocab_size, config.width)
        return {name: self.param(name, normal, shape) for name, shape in shapes.items()}


def init_params(config: DecoderConfig, seed) -> dict:
    """Random float32 parameters, GPT-2's initialisation for every family; `seed` is a whole number, or a key of JAX.

    {"embed", "layers"}, and where the model has them "final_norm", "project_in", "project_out".
    """
    sample = jnp.zeros((1, 2, config.width))
    key = seed if isinstance(seed, jax.Array) else jax.random.key(seed)
    return jax.jit(Decoder(config).init)(key, sample)["params"]


def _dense(features, dtype, name, bias=True, std=0.02):
    return Dense(features, bias, dtype, std, name=name)


def _norm(config, dtype, name):
    if not config.rms_norm:
        return layer_norm(config.norm_eps, dtype, name)
    return rms_norm(config.norm_eps, dtype, name, config.norm_adds_one)
