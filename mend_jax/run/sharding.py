"""Which part of each parameter is on which device of a mesh: rules on the parameter's path, for every family.

A mesh has three axes (config.mesh, configs/base.py):

| axis | the batch | the weights |
| --- | --- | --- |
| data | rows are split | are whole on each device |
| fsdp | rows are split | are split; a layer is gathered when needed, then dropped (Zhao et al., 2023) |
| tensor | is whole on each device | are split by heads and the MLP's inner width, and so are the products (Shoeybi et al., 2019) |

The optimizer's moments have their parameter's path and are placed like it.
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from mend_jax.cli.errors import UserError

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
Place = Callable[[str, tuple[int, ...]], Sharding]  # a parameter's path "a/b/c" and shape -> its sharding
ROWS = (DATA, FSDP)  # the axes that split a batch
WHOLE = ()
_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)

# (end of the path, how the last axes are split); the first match counts. Earlier axes (the layers', which a scan runs
# over) are never split.
RULES = tuple(
    (re.compile(rf"(^|/)({path})$"), spec)
    for path, spec in (
        (r"embed/(tokens|head|positions)", (None, (FSDP, TENSOR))),  # (V,D): few vocabulary sizes can be divided
        (r"embed/(tokens|head)_scale", WHOLE),
        (r"(q|k|v|qkv|up|gate)/kernel", (FSDP, TENSOR)),
        (r"(q|k|v|qkv|up|gate)/(bias|kernel_scale)", (TENSOR,)),
        (r"(out|down)/kernel", (TENSOR, FSDP)),  # sums over the axis that tensor splits: followed by one all-reduce
        (r"(out|down)/(bias|kernel_scale)", WHOLE),
        (r"(norm1|norm2|out_norm|down_norm|cross_norm|final_norm|q_norm|k_norm)/(scale|bias)", WHOLE),
        (r"distance_bias", WHOLE),
        (r"(project_in|project_out|projection)/kernel", (FSDP, None)),
        (r"(project_in|project_out)/kernel_scale", WHOLE),
    )
)
# Where a model's parameters stand, each of which needs a rule. All others, such as a prefix's own and the train state's
# numbers, are few: without a rule they are whole on each device.
MODEL = re.compile(r"(^|/)(backbone|embed|layers|encoder|decoder)/")


def mesh_sizes(wanted: Any, devices: int) -> dict[str, int]:
    """{axis: devices along it}; a -1 in `wanted` (config.mesh) is replaced by the rest of the `devices`.

    Raises UserError if the sizes do not fit the number of devices.
    """
    sizes = {axis: wanted[axis] for axis in AXES}
    text = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"The mesh is {text}: each size must be a number of devices, and one may be -1 for the rest.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if devices % known if rest else devices != known:
        raise UserError(
            f"The mesh {text} does not fit {devices} device{'s' * (devices > 1)}: their product must be {devices}, and one"
            " of them may be -1 for the rest."
        )
    return sizes | dict.fromkeys(rest, devices // known)


def make_mesh(wanted: Any, devices: Sequence | None = None) -> Mesh:
    """The mesh that config.mesh describes, over all devices of all processes or over `devices`."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(wanted, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec_of(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """How the parameter at path "a/b/c" is split.

    Raises UserError if no rule matches the path of a model's parameter or the mesh does not divide the parameter.
    """
    rule = next((spec for pattern, spec in RULES if pattern.search(path)), None if MODEL.search(path) else WHOLE)
    if rule is None:
        raise UserError(
            f"No rule says how to shard the parameter {path} {shape}: add one to mend_jax/run/sharding.py, or use"
            " train.parallel=pmap."
        )
    spec = (None,) * (len(shape) - len(rule)) + rule
    for axis, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else names or ()
        if shape[axis] % math.prod(sizes[name] for name in names):
            split = " x ".join(f"mesh.{name}={sizes[name]}" for name in names if sizes[name] > 1)
            raise UserError(
                f"{split} does not divide the {shape[axis]} numbers along axis {axis} of {path} {shape}: use a divisor,"
                " and give the other devices to mesh.data."
            )
    return PartitionSpec(*spec)


def placer(mesh: Mesh) -> Place:
    """The `Place` function of the rules on a mesh."""
    return lambda path, shape: NamedSharding(mesh, spec_of(path, shape, dict(mesh.shape)))


def places(tree: Any, place: Place) -> Any:
    """The tree of shardings of a tree of parameters (arrays or their shapes), or of a train state."""

    def of(path, leaf):
        return place(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)

    return jax.tree_util.tree_map_with_path(of, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The shardings of a tree by the rules, see `places`."""
    return places(tree, placer(mesh))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters are sharded over; None if they are whole on every device that holds them."""
    placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = placed.mesh if isinstance(placed, NamedSharding) else None
    return mesh if mesh is not None and mesh.axis_names == AXES else None


def row_parts(mesh: Mesh | None) -> int:
    """The number of parts that a mesh splits the rows of a batch into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


@contextlib.contextmanager
def sharding_rows_on(mesh: Mesh | None, rows: int = 0):
    """While a function is traced within it, `shard_rows` and `unshard_fsdp` use this mesh.

    Without a mesh, or if the mesh does not divide the number of `rows`, they do nothing and the compiler chooses.
    """
    if rows % row_parts(mesh):
        mesh = None
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def shard_rows(x: jax.Array) -> jax.Array:
    """States (B,...) with rows sharded as the batch's and all other axes whole; without a mesh, `x` itself.

    Without this constraint the compiler may keep the weights in place and send the states of all rows instead.
    """
    mesh = _mesh.get()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS)))


def shard_copies(x: jax.Array) -> jax.Array:
    """(R,...): a copy of `x` for each device that splits the rows of a batch; without a mesh (1,...).

    Values computed from a copy and added to every row need no sum over devices in the backward pass: only the small `x` does.
    """
    return shard_rows(jnp.broadcast_to(x, (row_parts(_mesh.get()), *x.shape)))


def unshard_fsdp(x: jax.Array, path: str) -> jax.Array:
    """A frozen parameter gathered along fsdp for its product, in the dtype that it is stored in; without a mesh, `x` itself.

    Without this constraint the compiler may convert int8 to the compute dtype first, and send two or four times the bytes.
    `path` is the end of the parameter's path, as far as the rules need it.
    """
    mesh = _mesh.get()
    if mesh is None:
        return x
    spec = spec_of(path, x.shape, dict(mesh.shape))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*(_without_fsdp(a) for a in spec))))


def _without_fsdp(axis):
    names = (axis,) if isinstance(axis, str) else axis or ()
    return tuple(name for name in names if name != FSDP)


def check_heads(config: Any, tensor: int, what: str) -> None:
    """Raises UserError if mesh.tensor does not divide the heads of the model `what`, whose `config` is that of models/config.py.

    It need not divide the heads of keys and values (grouped-query attention). If it does not, a device holds a part of a head,
    and the compiler gathers keys and values, which are then small: a layer's forward and backward pass sends 7% to 15% more
    bytes (counted with 8 and with 12 heads on tensor=4, and 2 or 1 heads of keys and values), or 29% more if heads that share
    their keys are on two devices and queries are gathered too (12 heads, 3 of keys and values).
    """
    if config.heads % tensor:
        raise UserError(
            f"mesh.tensor={tensor} does not divide the {config.heads} heads of {what}: use a divisor, and give the other"
            " devices to mesh.fsdp."
        )
