"""One decoder-only transformer (GPT-2's) that reads embeddings; tokens are embedded outside it.

Axes: B batch, T any sequence, P prefix, S keys (P + T), D width, H heads, V vocabulary.
The layers are scanned: their parameters are stacked, (layers, ...), and compile time does not grow with depth.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mend_jax.models.attention import causal_attention
from mend_jax.models.families import DecoderConfig

# What a layer keeps for the backward pass: the products. Norms and GELU are computed again, which is quicker than to
# write and read what they would keep (three times as much).
KEPT = ("qkv", "attended", "normaliser", "middle", "up")


class Cache(NamedTuple):
    """Keys and values of one prefix, shared by every row that is read after it."""

    keys: jax.Array  # (layers, P, H, D/H)
    values: jax.Array  # (layers, P, H, D/H)
    length: jax.Array  # () int32: rows beyond are padding


def attend_after(q, cache, k, v, mask):
    """Softmax attention to a prefix that all rows share, (keys, values) each (P,H,F), and to the rows themselves.

    q, k, v (B,T,H,F), mask (B,T,P+T) -> (B,T,H,F); scores and softmax in float32.
    The prefix is not copied per row: it is multiplied with all rows' queries at once.
    """
    keys, values = cache
    P = keys.shape[0]
    q = q * q.shape[-1] ** -0.5
    before = jnp.einsum("bthf,phf->bhtp", q, keys, preferred_element_type=jnp.float32)
    within = jnp.einsum("bthf,bshf->bhts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None], jnp.concatenate([before, within], -1), jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bhtp,phf->bthf", shares[..., :P], values) + jnp.einsum("bhts,bshf->bthf", shares[..., P:], v)


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    config: DecoderConfig
    dtype: jnp.dtype
    attention: str
    keep_cache: bool

    @nn.compact
    def __call__(self, x, cache, mask):
        """x (B,T,D); cache None or this layer's (keys, values) of a prefix; mask None (causal) or (B,T,P+T)."""
        config = self.config
        y = _norm(config, self.dtype, "norm1")(x)
        qkv = checkpoint_name(_dense(3 * config.width, self.dtype, "qkv")(y), "qkv")
        q, k, v = jnp.split(qkv, 3, axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], config.heads, config.head_width) for a in (q, k, v))
        y = self._attend(q, k, v, cache, mask).reshape(x.shape)
        residual_std = 0.02 / (2 * config.layers) ** 0.5  # GPT-2's: the sum of all residuals keeps its size
        x = checkpoint_name(x + _dense(config.width, self.dtype, "out", residual_std)(y), "middle")
        y = _norm(config, self.dtype, "norm2")(x)
        up = checkpoint_name(_dense(config.mlp_width, self.dtype, "up")(y), "up")
        y = nn.gelu(up, approximate=True)
        x = x + _dense(config.width, self.dtype, "down", residual_std)(y)
        return x, ((k, v) if self.keep_cache else None)

    def _attend(self, q, k, v, cache, mask):
        if cache is not None:
            return attend_after(q, cache, k, v, mask)
        if self.attention == "cudnn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        # Rows are right-padded, so the causal mask alone keeps padding from every valid token.
        return causal_attention(q, k, v)


class Decoder(nn.Module):
    """(B,T,D) embeddings -> (B,T,D) states after the final norm. Positions 0, 1, 2, ... are added here."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32  # of the arithmetic; parameters keep the dtype they are given in
    attention: str = "xla"
    remat: bool = False
    keep_cache: bool = False

    @nn.compact
    def __call__(self, embeds, positions=None, cache=None, mask=None):
        """States (B,T,D); with `keep_cache` also keys and values, each (layers,B,T,H,D/H).

        Args:
            embeds: (B,T,D).
            positions: (B,T) int32; None is 0..T-1.
            cache: a `Cache`: the rows are read after this prefix. Needs `positions` and `mask`.
            mask: (B,T,P+T) bool, what each token sees; None is causal.
        """
        config = self.config
        table = Embed(config, name="embed")()["positions"]
        length = embeds.shape[1]
        x = embeds.astype(self.dtype) + (table[None, :length] if positions is None else table[positions]).astype(
            self.dtype
        )
        kept = jax.checkpoint_policies.save_only_these_names(*() if self.remat else KEPT)
        block = nn.remat(Block, prevent_cse=False, policy=kept)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.layers,
        )(config, self.dtype, self.attention, self.keep_cache, name="layers")
        x, kept = layers(x, None if cache is None else (cache.keys, cache.values), mask)
        x = _norm(config, self.dtype, "final_norm")(x)
        return (x, kept) if self.keep_cache else x


class Embed(nn.Module):
    """The token and position tables: parameters only, read by whoever needs them."""

    config: DecoderConfig

    @nn.compact
    def __call__(self):
        config, normal = self.config, nn.initializers.normal(0.02)
        return {
            "tokens": self.param("tokens", normal, (config.vocab_size, config.width)),
            "positions": self.param("positions", normal, (config.max_positions, config.width)),
        }


def init_params(config: DecoderConfig, seed: int) -> dict:
    """Random float32 parameters, GPT-2's initialisation: {"embed", "layers", "final_norm"}."""
    sample = jnp.zeros((1, 2, config.width))
    return jax.jit(Decoder(config).init)(jax.random.key(seed), sample)["params"]


def _dense(features, dtype, name, std=0.02):
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(std), name=name)


def _norm(config, dtype, name):
    # The two-pass variance is PyTorch's; Flax's fast one loses digits where the mean is large.
    return nn.LayerNorm(epsilon=config.norm_eps, dtype=dtype, use_fast_variance=False, name=name)
