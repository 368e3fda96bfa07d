"""Norms of the models: Flax's, computed on rows."""

from collections.abc import Callable

import jax
from flax import linen as nn


def layer_norm(epsilon: float, dtype, name: str) -> Callable[[jax.Array], jax.Array]:
    """The (...,D) of an array normed, with scale and bias (Ba et al., 2016)."""
    # The two-pass variance is PyTorch's; Flax's fast one loses digits where the mean is large.
    return _on_rows(nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name))


def rms_norm(epsilon: float, dtype, name: str) -> Callable[[jax.Array], jax.Array]:
    """The (...,D) of an array normed, with a scale (Zhang and Sennrich, 2019)."""
    return _on_rows(nn.RMSNorm(epsilon=epsilon, dtype=dtype, name=name))


def _on_rows(norm: nn.Module) -> Callable[[jax.Array], jax.Array]:
    # Of a single row, (1,T,D), XLA sums products ten times slower on a CPU than of (T,D).
    return lambda x: norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
