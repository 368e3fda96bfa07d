"""A folder's weights read straight onto the devices that hold them, part by part.

Each process reads of each file the parts that its own devices hold, one parameter after another: what a host holds at one
time is its share of one parameter, and what a device holds its share of the model.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from mend_jax.errors import UserError
from mend_jax.models.families import Config
from mend_jax.models.int8 import SCALE, SUMMED, rounded, scales
from mend_jax.models.tables import Entry
from mend_jax.models.weights import NOT_TIED, Tensor, matched, open_file, weight_files
from mend_jax.sharding import Place

COMPARED = 4096  # rows of two token tables at a time


def read_split(folder: str | Path, config: Config, dtype: str, int8: bool, place: Place) -> dict:
    """The tree that `weights.read_params` reads, as `jax.Array`s that lie where `place` says.

    Raises UserError as that does.
    """
    folder, tied, found = Path(folder), None, {}
    with contextlib.ExitStack() as files:
        for _, entry, tensor in matched(_tensors(folder, files), config, str(folder)):
            if entry is None:
                tied = tensor
            else:
                found.setdefault(entry.path, []).append((entry, tensor))
        if tied is not None and not _same(tied, found["embed", "tokens"][0][1]):
            raise UserError(NOT_TIED.format(where=folder))
        tree: dict = {}
        for path, parts in found.items():
            node = tree
            for parent in path[:-1]:
                node = node.setdefault(parent, {})
            parameter = _Parameter(parts, dtype)
            if int8 and path[-1] in SUMMED:
                node[path[-1] + SCALE] = parameter.placed(place, parameter.scales, scales=True)
                node[path[-1]] = parameter.placed(place, parameter.in_8_bits)
            else:
                node[path[-1]] = parameter.placed(place, parameter.full)
        return tree


class _Parameter:
    """One parameter of our tree, in the files as one tensor, or one for each layer."""

    def __init__(self, parts: list[tuple[Entry, Tensor]], dtype: str):
        self.entry, self.dtype = parts[0][0], dtype
        self.tensors = [tensor for _, tensor in sorted(parts, key=lambda part: part[0].layer or 0)]
        self.summed = SUMMED.get(self.entry.path[-1])
        self._scales: dict[Tensor, np.ndarray] = {}  # of all parts of a channel, which may lie on different devices

    def placed(self, place: Place, read: Callable, scales: bool = False) -> jax.Array:
        """The whole as an array over devices; `read(tensor, index)` gives a part of a tensor, in our axes."""
        entry, shape = self.entry, list(self.entry.our_shape)
        if scales:
            del shape[self.summed]
        stacked = entry.layer is not None
        shape = (len(self.tensors), *shape) if stacked else tuple(shape)
        kept: dict = {}  # devices that hold the same part share it

        def part(index):
            key = tuple(axis.indices(size) for axis, size in zip(index, shape, strict=True))
            if key not in kept:
                if stacked:
                    layers = self.tensors[index[0]]
                    kept[key] = _stack((read(tensor, index[1:]) for tensor in layers), len(layers))
                else:
                    kept[key] = read(self.tensors[0], index)
            return kept[key]

        path = "/".join(entry.path) + (SCALE if scales else "")
        return jax.make_array_from_callback(shape, place(path, shape), part)

    def full(self, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        return np.ascontiguousarray(self._read(tensor, index), self.dtype)

    def in_8_bits(self, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        channels = list(index)
        del channels[self.summed]
        return rounded(self._read(tensor, index), self.scales(tensor, tuple(channels)), self.summed)

    def scales(self, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        """Of the channels at `index`, which are read whole, once."""
        shape = list(self.entry.our_shape)
        del shape[self.summed]
        known = self._scales.setdefault(tensor, np.full(shape, np.nan, np.float32))
        if np.isnan(known[index]).any():
            whole = list(index)
            whole.insert(len(index) + 1 + self.summed, slice(None))
            known[index] = scales(self._read(tensor, tuple(whole)), self.summed)
            if not np.isfinite(known[index]).all():
                name = "/".join(self.entry.path)
                raise UserError(f"The weights of {name} hold numbers that are not finite: copy the model's folder again.")
        return known[index]

    def _read(self, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        return tensor[index[::-1]].T if self.entry.transposed else tensor[index]


def _tensors(folder: Path, files: contextlib.ExitStack):
    """(name, tensor) of every tensor of a folder; the files stay open as long as `files`."""
    for path in weight_files(folder):
        yield from open_file(path, files)


def _stack(parts: Iterator[np.ndarray], count: int) -> np.ndarray:
    """`np.stack` of `count` arrays, of which one is held at a time."""
    first = next(parts)
    stack = np.empty((count, *first.shape), first.dtype)
    stack[0] = first
    for i, part in enumerate(parts, 1):
        stack[i] = part
    return stack


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, read some rows at a time."""
    if one.shape != other.shape:
        return False
    starts = range(0, one.shape[0], COMPARED)
    return all(np.array_equal(one[i : i + COMPARED], other[i : i + COMPARED]) for i in starts)
