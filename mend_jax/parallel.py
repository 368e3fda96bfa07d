"""How the one train step is compiled over devices: "pmap" (data parallel) or "mesh" (jit over named shardings).

Both take the same host batch of this process's rows and give the update of the whole global batch. In "pmap" the state
and the batch carry a leading axis of local devices, and the LLM is whole on each. In "mesh" the batch is sharded by rows and large
weights of the frozen LLM by one of their axes, so that an LLM too large for one device fits; XLA gathers a layer when it
is needed.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import jax_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mend_jax.errors import UserError

AXIS = "data"  # the devices, over which the batch is split
MODES = ("pmap", "mesh")
SHARD_FROM = 1 << 20  # elements: smaller weights of the LLM stay whole on every device


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where trees live, and how functions of them are compiled. Made by `make_layout`."""

    replicate: Callable  # host tree -> the same on every device (train state)
    place_frozen: Callable  # tree -> devices (LLM params); may share memory with it
    split: Callable  # host batch of this process -> its rows over the devices
    fetch: Callable  # a replicated tree -> numpy, freshly copied
    compile_step: Callable  # train_step(state, llm_params, batch) -> the same, compiled; the state is donated
    compile_loss: Callable  # f(params, llm_params, batch) -> the same, compiled; means over the devices
    axis: str | None  # name for `jax.lax.pmean` inside the step; None where XLA sees the global batch
    mesh: Mesh | None  # of "mesh"


def make_layout(mode: str) -> Layout:
    """The layout over all devices of all processes; `mode` is `train.parallel`. Raises UserError for another mode."""
    if mode == "pmap":
        return _pmap_layout()
    if mode == "mesh":
        return _mesh_layout()
    raise UserError(f'train.parallel is "{mode}": it must be one of {", ".join(MODES)}.')


def check_batch_size(batch_size: int, accumulate: int) -> None:
    """Raises UserError where a global batch does not divide over the devices and the accumulation steps."""
    devices = jax.device_count()
    if batch_size < 1 or accumulate < 1 or batch_size % (devices * accumulate):
        raise UserError(
            f"train.batch_size={batch_size} does not divide over {devices} device{'s' * (devices > 1)} x "
            f"train.accumulate={accumulate}: use a multiple of {devices * max(accumulate, 1)}."
        )


def _pmap_layout() -> Layout:
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), (AXIS,))
    everywhere, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))

    def place_frozen(tree):  # without an axis of devices: the first device keeps the arrays it has
        return jax.device_put(tree, everywhere)

    def replicate(tree):
        return jax_utils.replicate(tree, devices)

    def split(batch):
        n = len(devices)
        return jax.tree.map(lambda x: jax.device_put(x.reshape(n, len(x) // n, *x.shape[1:]), rows), batch)

    def fetch(tree):
        return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0], tree)

    def compile_step(step):
        return jax.pmap(step, axis_name=AXIS, in_axes=(0, None, 0), donate_argnums=(0,))

    def compile_loss(function):
        return jax.pmap(lambda *args: jax.lax.pmean(function(*args), AXIS), axis_name=AXIS, in_axes=(0, None, 0))

    return Layout(replicate, place_frozen, split, fetch, compile_step, compile_loss, AXIS, None)


def _mesh_layout() -> Layout:
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(AXIS))

    def replicate(tree):
        return jax.tree.map(lambda x: _put(np.array(x), everywhere), tree)

    def place_frozen(tree):
        return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, _frozen_spec(x.shape))), tree)

    def split(batch):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    def fetch(tree):
        return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), tree)

    def compile_step(step):
        return jax.jit(step, donate_argnums=(0,), out_shardings=(everywhere, everywhere))

    def compile_loss(function):
        return jax.jit(function, out_shardings=everywhere)

    return Layout(replicate, place_frozen, split, fetch, compile_step, compile_loss, None, mesh)


def _put(array, sharding):
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _frozen_spec(shape):
    """A large weight is split along its last axis that divides; the first axis of a stack of layers is scanned over."""
    devices = jax.device_count()
    if devices > 1 and int(np.prod(shape)) >= SHARD_FROM:
        for axis in range(len(shape) - 1, 0 if len(shape) > 1 else -1, -1):
            if shape[axis] % devices == 0:
                return PartitionSpec(*[None] * axis, AXIS)
    return PartitionSpec()
