"""Norms of the models: Flax's, computed on rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn


def layer_norm(epsilon: float, dtype, name: str) -> Callable[[jax.Array], jax.Array]:
    """The (...,D) of an array normed, with scale and bias (Ba et al., 2016)."""
    # The two-pass variance is PyTorch's; Flax's fast one loses digits where the mean is large.
    return _on_rows(nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name))


def rms_norm(epsilon: float, dtype, name: str, adds_one: bool = False) -> Callable[[jax.Array], jax.Array]:
    """The (...,D) of an array normed, with a scale (Zhang and Sennrich, 2019); with `adds_one` the scale is 1 + the parameter."""
    return _on_rows(rms_norm_module(epsilon, dtype, name, adds_one))


def rms_norm_module(epsilon: float, dtype, name: str, adds_one: bool = False) -> nn.Module:
    """As `rms_norm`, of arrays whose axes are not to be joined."""
    return (_OnePlusRMSNorm if adds_one else nn.RMSNorm)(epsilon=epsilon, dtype=dtype, name=name)


class _OnePlusRMSNorm(nn.Module):
    """Flax's RMSNorm that scales by 1 + `scale`, in float32."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        y = nn.RMSNorm(epsilon=self.epsilon, dtype=jnp.float32, use_scale=False)(x)
        return (y * (1 + scale.astype(jnp.float32))).astype(self.dtype)


def _on_rows(norm: nn.Module) -> Callable[[jax.Array], jax.Array]:
    # Of a single row, (1,T,D), XLA sums products ten times slower on a CPU than of (T,D).
    return lambda x: norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
