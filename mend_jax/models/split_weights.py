"""A folder's weights read straight onto the devices that hold them, part by part.

Each process reads of each file the parts that its own devices hold, one parameter after another. A file is open only
while one parameter is read of it, and a few megabytes are read at once: beside what its devices hold already, a host has
its share of one parameter and the pages of it that the system maps, of one file at a time. On a CPU the share becomes
the devices' own without a copy.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.models.families import Config
from mend_jax.models.int8 import SCALE, SUMMED, rounded, scales
from mend_jax.models.tables import Entry, Table
from mend_jax.models.weights import NOT_TIED, PIECE, Tensor, aligned, is_mapped, matched, open_file, weight_files
from mend_jax.run.sharding import Place

COMPARED = 4096  # rows of two token tables at a time

Index = tuple[slice, ...]  # with a start and a stop for each axis


class _Stored(NamedTuple):
    """A tensor of a file that need not be open."""

    file: Path
    name: str
    shape: tuple[int, ...]


def read_split(
    folder: str | Path, config: Config, dtype: str, int8: bool, place: Place, wanted: Table | None = None
) -> dict:
    """The tree that `weights.read_params` reads, as `jax.Array`s that lie where `place` says.

    Raises UserError as that does.
    """
    folder, files, tied, found = Path(folder), _Files(), None, {}
    with contextlib.closing(files):
        for _, entry, stored in matched(_stored(folder, files), config, str(folder), wanted):
            if entry is None:
                tied = stored
            else:
                found.setdefault(entry.path, []).append((entry, stored))
        if tied is not None and not _same(tied, found["embed", "tokens"][0][1], files):
            raise UserError(NOT_TIED.format(where=folder))
        tree: dict = {}
        for path, parts in found.items():
            node = tree
            for parent in path[:-1]:
                node = node.setdefault(parent, {})
            kind = _In8Bits if int8 and path[-1] in SUMMED else _Parameter
            node |= kind(parts[0][0], dtype, place).read(parts, files)
        return tree


class _Files:
    """Files of weights, of which one is open at a time: what the system maps of a file is given back with the next."""

    def __init__(self):
        self._path, self._tensors, self._open = None, {}, contextlib.ExitStack()

    def open(self, path: Path) -> dict[str, Tensor]:
        """{name: tensor}, to be read until `open` is called again. A file that can only be read whole is not read twice."""
        if path != self._path or is_mapped(path):
            self.close()
            self._path, self._tensors = path, dict(open_file(path, self._open))
        return self._tensors

    def close(self) -> None:
        self._path, self._tensors = None, {}
        self._open.close()


class _Shares:
    """An array's parts that this process's devices hold, to be filled; devices that hold the same part share it."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype, place: Place):
        self.shape, self.sharding = shape, place(path, shape)
        self._parts = {}
        for index in self.sharding.addressable_devices_indices_map(shape).values():
            key = self._key(index)
            if key not in self._parts:
                self._parts[key] = aligned([stop - start for start, stop in key], dtype)

    def of_layer(self, layer: int | None) -> Iterator[tuple[Index, np.ndarray]]:
        """(index in a layer, or without layers in the whole, what is to be filled there) of each part."""
        for key, part in self._parts.items():
            index = tuple(slice(*ends) for ends in key)
            if layer is None:
                yield index, part
            elif index[0].start <= layer < index[0].stop:
                yield index[1:], part[layer - index[0].start]

    def array(self) -> jax.Array:
        whole = jax.make_array_from_callback(self.shape, self.sharding, lambda index: self._parts[self._key(index)])
        return jax.block_until_ready(whole)  # no longer needs the parts

    def _key(self, index: Index) -> tuple[tuple[int, int], ...]:
        return tuple(axis.indices(size)[:2] for axis, size in zip(index, self.shape, strict=True))


class _Parameter:
    """One parameter of our tree, in the files as one tensor, or one for each layer."""

    def __init__(self, entry: Entry, dtype, place: Place):
        self.entry, self.place = entry, place
        self.name = "/".join(entry.path)
        self.leaves = {entry.path[-1]: self._shares(self.name, entry.our_shape, dtype)}

    def read(self, parts: list[tuple[Entry, _Stored]], files: _Files) -> dict[str, jax.Array]:
        """{name of a leaf: its array}."""
        for file in sorted({stored.file for _, stored in parts}):
            tensors = files.open(file)
            for entry, stored in parts:
                if stored.file == file:
                    self._fill(entry.layer, tensors[stored.name])
        return {name: shares.array() for name, shares in self.leaves.items()}

    def _fill(self, layer: int | None, tensor: Tensor) -> None:
        cut = len(self.entry.shape) - 1 if self.entry.transposed else 0  # rows of the file
        for index, part in self.leaves[self.entry.path[-1]].of_layer(layer):
            size = math.prod(part.shape) // max(1, part.shape[cut])
            for piece, where in _pieces(index, cut, size):
                part[where] = self._values(tensor, piece)

    def _shares(self, path: str, shape: tuple[int, ...], dtype) -> _Shares:
        stacked = self.entry.layer is not None
        return _Shares(path, (self.entry.layers, *shape) if stacked else tuple(shape), dtype, self.place)

    def _values(self, tensor: Tensor, index: Index) -> np.ndarray:
        return tensor[index[::-1]].T if self.entry.transposed else tensor[index]


class _In8Bits(_Parameter):
    """A kernel (in,out) or a token table (V,D) as int8, and the scales of its channels."""

    def __init__(self, entry: Entry, dtype, place: Place):
        super().__init__(entry, np.int8, place)
        self.summed = SUMMED[entry.path[-1]]
        self.channels = 1 + self.summed  # their axis
        shape = [entry.our_shape[self.channels]]
        self.leaves[entry.path[-1] + SCALE] = self._shares(self.name + SCALE, shape, np.float32)

    def _fill(self, layer: int | None, tensor: Tensor) -> None:
        values, scale = self.leaves.values()
        known = np.full(self.entry.our_shape[self.channels], np.nan, np.float32)  # a channel may lie on several devices
        size = self.entry.our_shape[self.summed]
        for index, part in values.of_layer(layer):
            for piece, where in _pieces(index, self.channels, size):
                unit = self._scales(tensor, piece[self.channels], known)
                part[where] = rounded(self._values(tensor, piece), unit, self.summed)
        for index, part in scale.of_layer(layer):
            for piece, where in _pieces(index, 0, size):
                part[where] = self._scales(tensor, piece[0], known)

    def _scales(self, tensor: Tensor, channels: slice, known: np.ndarray) -> np.ndarray:
        """Of channels, which are read whole unless they are `known`."""
        if np.isnan(known[channels]).any():
            whole = [slice(0, size) for size in self.entry.our_shape]
            whole[self.channels] = channels
            known[channels] = scales(self._values(tensor, tuple(whole)), self.summed)
            if not np.isfinite(known[channels]).all():
                raise UserError(
                    f"The weights of {self.name} hold numbers that are not finite: copy the model's folder again."
                )
        return known[channels]


def _stored(folder: Path, files: _Files) -> Iterator[tuple[str, _Stored]]:
    """(name, tensor) of every tensor of a folder."""
    for path in weight_files(folder):
        for name, tensor in files.open(path).items():
            yield name, _Stored(path, name, tensor.shape)


def _pieces(index: Index, axis: int, size: int) -> Iterator[tuple[Index, Index]]:
    """`index` cut along `axis`, where each number stands for `size`: (index of a piece, its index in the part)."""
    count = max(1, PIECE // max(1, size))
    for start in range(index[axis].start, index[axis].stop, count):
        piece, where = list(index), [slice(None)] * len(index)
        piece[axis] = slice(start, min(start + count, index[axis].stop))
        where[axis] = slice(start - index[axis].start, piece[axis].stop - index[axis].start)
        yield tuple(piece), tuple(where)


def _same(one: _Stored, other: _Stored, files: _Files) -> bool:
    """Whether two tensors hold the same, read some rows at a time."""
    if one.shape != other.shape:
        return False
    for start in range(0, one.shape[0], COMPARED):
        rows = slice(start, start + COMPARED)
        if not np.array_equal(*(files.open(stored.file)[stored.name][rows] for stored in (one, other))):
            return False
    return True
