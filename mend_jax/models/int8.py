"""Weights in 8 bits: every kernel and token table as int8, with one float32 scale per output channel (weights only).

Axes: V vocabulary, D width; of a kernel (..., in, out).

Beside `.../kernel`, int8 in its usual place and shape, lies `.../kernel_scale` (..., out); beside `embed/tokens` and
`embed/head` (V,D), one scale per row, `embed/tokens_scale` and `embed/head_scale` (V,). So a rule on parameter paths that
fits a kernel fits it in 8 bits too, and a `*_scale` has the axes of its array without the one that is summed over. Norms,
biases, positions and T5's biases by distance (1.3% of opt-125m, less of larger models) stay as they are.

A scale is that of its output alone: x @ (int8 * scale) = (x @ int8) * scale. So the product is taken with the integers,
which every float dtype here holds exactly, one layer at a time inside the scan over the layers, and its result is
scaled: no full-precision kernel is kept, or rounded. The gradient of x flows the same way back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mend_jax.models.stacks import from_bits
from mend_jax.run.sharding import unshard_fsdp

SCALE = "_scale"
SUMMED = {"kernel": -2, "tokens": -1, "head": -1}  # what is held in 8 bits, and the axis that a product sums over
LARGEST = 127


class Dense(nn.Module):
    """Flax's Dense, whose kernel may also be int8 with `kernel_scale` beside it."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32  # of the arithmetic
    std: float = 0.02  # of the kernel's first values

    @nn.compact
    def __call__(self, x):
        """(...,in) -> (...,features)."""
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        kernel, in_8_bits = from_bits(kernel), self.has_variable("params", "kernel" + SCALE)
        kernel = unshard_fsdp(kernel, f"{self.name}/kernel") if in_8_bits else kernel
        y = times(x.astype(self.dtype), kernel.astype(self.dtype))
        if in_8_bits:
            y = (y * self.get_variable("params", "kernel" + SCALE)).astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


@jax.custom_vjp
def times(x, kernel):
    """(...,in) x (in,out) -> (...,out); the gradient of a frozen kernel is not computed.

    JAX's own gradient of the kernel is a product that is transposed afterwards. For that XLA on a CPU copies one operand
    column by column, often computing it again on the way. Here the narrower one is transposed, once it is whole.
    """
    return _dot(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _dot(a, b, axes):
    """`jax.lax.dot_general` of one dtype. XLA multiplies bfloat16 on a CPU with its own instructions only where the sums stay
    float32; else it converts to float32 first, which is four to seven times slower."""
    if a.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return jax.lax.dot_general(a, b, axes)
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32).astype(a.dtype)


def _times_forward(x, kernel):
    return times(x.value, kernel.value), (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)


def _times_backward(kept, out_grad):
    x, kernel = kept
    x_grad = None if kernel is None else _dot(out_grad, kernel, (((out_grad.ndim - 1,), (1,)), ((), ())))
    kernel_grad = None
    if x is not None:
        if x.shape[-1] <= out_grad.shape[-1]:
            kernel_grad = _over_rows(jax.lax.optimization_barrier(x), out_grad)
        else:
            kernel_grad = _over_rows(out_grad, x).T
    return x_grad, kernel_grad


def _over_rows(a, b):
    """(...,m) x (...,n) -> (m,n), the sum over all rows.

    XLA's CPU backend makes this product of bfloat16 in float32, five times slower, unless `a` lies in memory as its transpose;
    and it takes a transpose into the product where it sees one. It does not see through a slice that begins where the data say.
    """
    if a.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        rows = tuple(range(a.ndim - 1))
        return jax.lax.dot_general(a, b, ((rows, rows), ((), ())))
    bits = jax.lax.bitcast_convert_type(a.reshape(-1, a.shape[-1]), jnp.uint16)
    zero = bits[:1, :1].sum(dtype=jnp.int32) >> 16
    turned = jax.lax.dynamic_slice_in_dim(jnp.pad(bits.T, ((0, 1), (0, 0))), zero, a.shape[-1])
    turned = jax.lax.bitcast_convert_type(turned, a.dtype)
    return _dot(turned, b.reshape(-1, b.shape[-1]), (((1,), (0,)), ((), ())))


times.defvjp(_times_forward, _times_backward, symbolic_zeros=True)


class Table(NamedTuple):
    """A token table, or a head, in 8 bits."""

    values: jax.Array  # (V,D) int8
    scale: jax.Array  # (V,) float32


def table(embed: dict, name: str) -> jax.Array | Table:
    """`embed[name]` (V,D), "tokens" or "head", as it is held: what the functions below take."""
    return Table(embed[name], embed[name + SCALE]) if name + SCALE in embed else embed[name]


def rows(table: jax.Array | Table, ids, dtype, factor: float = 1.0):
    """(V,D) at ids (...), times `factor` -> (...,D); `dtype` is what those of 8 bits are given in, others keep theirs."""
    found = (table.values[ids] * table.scale[ids][..., None]).astype(dtype) if isinstance(table, Table) else table[ids]
    return found if factor == 1 else found * jnp.asarray(factor, found.dtype)


def logits(table: jax.Array | Table, states):
    """(...,D) -> (...,V) float32: the products of states with the table's rows."""
    if isinstance(table, Table):
        return _product("...d,vd->...v", states, table.values.astype(states.dtype)) * table.scale
    return _product("...d,vd->...v", states, table)


def states_gradient(table: jax.Array | Table, logit_grad, dtype):
    """(C,V) -> (C,D) float32: the gradient of the states whose `logits` have this one; products of `dtype`'s numbers."""
    if isinstance(table, Table):
        return _product("cv,vd->cd", (logit_grad * table.scale).astype(dtype), table.values.astype(dtype))
    return _product("cv,vd->cd", logit_grad.astype(table.dtype), table)


def quantize(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 and float32 scales such that int8 * scale is near `array`; `axis` is summed over and has no scale of its own."""
    array = np.asarray(array, np.float32)
    scale = scales(array, axis)
    return rounded(array, scale, axis), scale


def scales(array: np.ndarray, axis: int) -> np.ndarray:
    """The float32 scales of whole channels: the largest number of each is to be 127 or -127 (symmetric).

    Numbers that are not finite make a scale that is not.
    """
    return np.abs(np.asarray(array, np.float32)).max(axis) / np.float32(LARGEST)


def rounded(array: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """`array` in units of its channels' scales, to the nearest int8; it may be a part of `axis`."""
    unit = np.expand_dims(np.where(scale == 0, np.float32(1), scale), axis)
    with np.errstate(invalid="ignore"):
        return np.rint(np.asarray(array, np.float32) / unit).astype(np.int8)


def quantize_params(params: dict) -> dict:
    """A model's whole tree in 8 bits. (What is read from files is quantised as it is read: weights.py.)"""
    tree: dict[str, Any] = {}
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            tree[name] = quantize_params(leaf)
        elif name in SUMMED:
            values, scale = quantize(np.asarray(leaf), SUMMED[name])
            tree |= {name: jnp.asarray(values), name + SCALE: jnp.asarray(scale)}
        else:
            tree[name] = leaf
    return tree


def _product(form: str, a, b):
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)
