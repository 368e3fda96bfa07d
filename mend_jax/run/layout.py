"""How the one train step is compiled over devices: "pmap" (data parallel) or "mesh" (jit over named shardings).

Both take the same host batch of this process's rows and compute the update of the whole global batch. In "pmap" the state
and the batch have a leading axis of local devices, and each device holds the whole LLM. In "mesh" the rows of the batch and
the weights of both models are split over the axes of config.mesh (sharding.py), so that models too large for one device fit.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import jax_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES
from mend_jax.run import sharding

AXIS = "data"  # pmap's axis of devices, over which the batch is split
MODES = CHOICES["train.parallel"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How trees are placed and functions of them compiled. Made by `make_layout`."""

    init: Callable  # (f, tree) -> the train state f(tree) on the devices
    place_state: Callable  # host or device tree -> devices (train state)
    place_frozen: Callable  # tree -> devices (LLM params); may share the tree's memory
    split: Callable  # host batch of this process -> its rows over the devices
    fetch: Callable  # a tree that is equal everywhere -> a fresh numpy copy; with one process any tree
    kept: Callable  # train state -> a copy for `Checkpoints.save`, which the next step does not overwrite
    scored: Callable  # trainable params on the devices -> in the form that an evaluation takes
    shaped: Callable  # tree of shapes -> the shapes that `Checkpoints.restore` takes
    compile_step: (
        Callable  # (train_step(state, llm_params, batch), state or its shapes) -> compiled; the state is donated
    )
    compile_loss: Callable  # f(params, llm_params, batch) -> f compiled, with means over the devices
    compile_rows: (
        Callable  # f(llm_params, batch) -> f compiled, whose result for each row is a numpy array; one process
    )
    place: (
        sharding.Place | None
    )  # the place of a parameter that is loaded or made on the devices; None: whole on the first
    share: tuple[int, int]  # (i, n): this process reads part i of n of every batch
    average: Callable  # inside a step: tree -> its means over the devices, each of which saw a part of the batch
    mesh: Mesh | None  # the mesh of "mesh"


def make_layout(mode: str, mesh: Any = None, devices: Sequence | None = None) -> Layout:
    """The layout over all devices of all processes.

    Args:
        mode: `config.train.parallel`. Raises UserError for an unknown mode.
        mesh: `config.mesh`, the sizes of the axes, for mode "mesh". Raises UserError if they do not fit the devices.
        devices: other devices for the mesh: those that a step is compiled for but not run on.
    """
    if mode == "pmap":
        return _pmap_layout()
    if mode == "mesh":
        return _mesh_layout(sharding.make_mesh(mesh, devices))
    raise UserError(f'train.parallel is "{mode}": it must be one of {", ".join(MODES)}.')


def check_batch_size(config: Any, name: str = "train.batch_size") -> None:
    """Raises UserError if a global batch cannot be divided by the devices that split it times the accumulation steps.

    `name` is that of the field that the user set.
    """
    size, accumulate, (parts, over) = config.train.batch_size, config.train.accumulate, batch_parts(config)
    if size < 1 or accumulate < 1 or size % (parts * accumulate):
        raise UserError(
            f"{name}={size} cannot be divided by {over} x train.accumulate={accumulate}: use a multiple of"
            f" {parts * max(accumulate, 1)}."
        )


def batch_parts(config: Any) -> tuple[int, str]:
    """The number of parts that the devices split a batch into, and what makes them, in words."""
    count = jax.device_count()
    if config.train.parallel != "mesh":
        return count, f"{count} device{'s' * (count > 1)}"
    sizes = sharding.mesh_sizes(config.mesh, count)
    return math.prod(sizes[name] for name in sharding.ROWS), " x ".join(
        f"mesh.{name}={sizes[name]}" for name in sharding.ROWS
    )


def is_finite(tree: Any) -> bool:
    """Whether every number of a tree is finite. If the tree is on the devices of several processes, all must make this call."""
    leaves = jax.tree.leaves(tree)
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):
        return all(np.isfinite(leaf).all() for leaf in leaves)
    return bool(_all_finite(leaves))


@jax.jit
def _all_finite(leaves):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _pmap_layout() -> Layout:
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), (AXIS,))
    everywhere, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))

    def place_frozen(tree):  # no axis of devices, so that the first device keeps its arrays
        return jax.device_put(tree, everywhere)

    def place_state(tree):
        return jax_utils.replicate(tree, devices)

    def split(batch):
        n = len(devices)
        return jax.tree.map(lambda x: jax.device_put(x.reshape(n, len(x) // n, *x.shape[1:]), rows), batch)

    def fetch(tree):
        return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0], tree)

    def average(tree):
        return jax.lax.pmean(tree, AXIS)

    def compile_step(step, state):
        del state
        return jax.pmap(step, axis_name=AXIS, in_axes=(0, None, 0), donate_argnums=(0,))

    def compile_loss(function):
        return jax.pmap(lambda *args: average(function(*args)), axis_name=AXIS, in_axes=(0, None, 0))

    def compile_rows(function):
        compiled = jax.pmap(function, axis_name=AXIS, in_axes=(None, 0))
        return lambda *args: jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:]), compiled(*args))

    return Layout(
        init=lambda function, tree: place_state(function(tree)),
        place_state=place_state,
        place_frozen=place_frozen,
        split=split,
        fetch=fetch,
        kept=fetch,
        scored=fetch,
        shaped=lambda shapes: shapes,
        compile_step=compile_step,
        compile_loss=compile_loss,
        compile_rows=compile_rows,
        place=None,
        share=(jax.process_index(), jax.process_count()),
        average=average,
        mesh=None,
    )


def _mesh_layout(mesh: Mesh) -> Layout:
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(sharding.ROWS))

    def init(function, tree):
        def copied(tree):  # the first step reuses the state's memory, which must not be the tree's
            return function(jax.tree.map(jnp.copy, tree))

        return jax.jit(copied, out_shardings=sharding.shardings(jax.eval_shape(function, tree), mesh))(place(tree))

    def place(tree):
        return jax.tree.map(_put, tree, sharding.shardings(tree, mesh))

    def split(batch):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    def shaped(shapes):
        placed = sharding.shardings(shapes, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)

    def on_mesh(function):
        def traced(*args):
            with sharding.sharding_rows_on(mesh):
                return function(*args)

        return traced

    def compile_step(step, state):
        placed = (sharding.shardings(state, mesh), everywhere)
        return jax.jit(on_mesh(step), donate_argnums=(0,), out_shardings=placed)

    def compile_rows(function):
        compiled = jax.jit(on_mesh(function), out_shardings=rows)
        return lambda *args: jax.tree.map(np.asarray, compiled(*args))

    return Layout(
        init=init,
        place_state=place,
        place_frozen=place,
        split=split,
        fetch=lambda tree: jax.tree.map(np.array, tree),
        kept=jax.jit(lambda tree: jax.tree.map(jnp.copy, tree)),
        scored=lambda params: params,
        shaped=shaped,
        compile_step=compile_step,
        compile_loss=lambda function: jax.jit(on_mesh(function), out_shardings=everywhere),
        compile_rows=compile_rows,
        place=sharding.placer(mesh),
        share=_share(rows),
        average=lambda tree: tree,  # XLA sees the whole batch
        mesh=mesh,
    )


def _put(array, placed):
    if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(placed, array.ndim):
        return array
    if placed.is_fully_addressable:
        return jax.device_put(array, placed)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=placed)(array)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, placed, lambda index: array[index])


def _share(rows: NamedSharding) -> tuple[int, int]:
    """(i, n): this process reads part i of n of every batch. Processes whose devices hold the same rows read the same part."""
    parts = {device.process_index: set() for device in rows.mesh.devices.flat}
    count = math.prod(rows.mesh.shape[name] for name in sharding.ROWS)
    for device, (part,) in rows.devices_indices_map((count,)).items():
        parts[device.process_index].add(part.start or 0)
    distinct = sorted({tuple(sorted(part)) for part in parts.values()})
    if sum(map(len, distinct)) != count:
        tensor, local = rows.mesh.shape[sharding.TENSOR], jax.local_device_count()
        raise UserError(
            f"mesh.tensor={tensor} and the {local} devices of a process do not divide each other: use a divisor or a multiple."
        )
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)
