"""What is stacked over the layers, in bfloat16 on a CPU.

XLA's CPU backend has no bfloat16 but in products: to read or write one layer of a stack it converts the whole stack to float32,
and where it writes, back. With L layers that is L times the work for what the backward pass keeps, and a copy of all weights
for each pass. So there what is written stands in float32, which holds every bfloat16 exactly, and frozen weights are read
as whole numbers of 16 bits. On other devices, and in float32, nothing is changed.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def written(dtype) -> jnp.dtype:
    """The dtype that arrays of `dtype` are stacked in."""
    return jnp.dtype(jnp.float32) if _converts(dtype) else jnp.dtype(dtype)


def keep(a, name: str):
    """`checkpoint_name`, of an array that a layer keeps for the backward pass."""
    return checkpoint_name(a.astype(written(a.dtype)), name).astype(a.dtype)


def as_bits(params):
    """A tree of frozen stacks of weights, with the kernels of bfloat16 as their bits, uint16: `from_bits` reads a layer's.

    No gradient flows back to them.
    """

    def of(path, a):
        kernel = path[-1] == jax.tree_util.DictKey("kernel")
        return jax.lax.bitcast_convert_type(a, jnp.uint16) if kernel and _converts(a.dtype) else a

    return jax.tree_util.tree_map_with_path(of, params)


def from_bits(a):
    """A kernel, which may be one of `as_bits`."""
    return jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a


def _converts(dtype) -> bool:
    return dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
