"""The tensors of a GGUF file under the names and in the shapes of a Hugging Face one, dequantised when they are sliced."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mend_jax.models.families import FAMILIES, HEAD, Config, from_hf_config, key_table
from mend_jax.models.gguf.config import ARCHITECTURES, FREQUENCIES, Architecture, architecture_of
from mend_jax.models.gguf.header import Stored, block_size, package, read_header

PAIRED = ("attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias")


def open_part(path: Path) -> Iterator[tuple[str, "Tensor"]]:
    """(their name, tensor) of one file of a model, which stays mapped as long as one of its tensors is kept."""
    architecture, config = architecture_of(path), from_hf_config(path)
    names, made_as, mapped = _names(architecture, config), ARCHITECTURES[architecture], Mapped(path)
    for name, stored in read_header(path).tensors.items():
        if name != FREQUENCIES:  # is part of the settings
            yield names.get(name, name), Tensor(mapped, stored, _layout(name, stored, made_as, config))


@functools.lru_cache(maxsize=8)
def _names(architecture: str, config: Config) -> dict[str, str]:
    """{the file's name: Hugging Face's} of each tensor that the model has."""
    gguf = package()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, config.layers)
    theirs = [*(FAMILIES[config.family].prefix + name for name in key_table(config) if name != HEAD), HEAD]
    return {known.get_name(name, try_suffixes=(".weight", ".bias")): name for name in theirs}


class Layout(NamedTuple):
    """In what the file's numbers differ from Hugging Face's."""

    order: np.ndarray | None = None  # the file's row of each row; None: the same
    swapped: bool = False  # whether its axes are
    added: float = 0.0  # to every number of the file; of tensors with one axis alone


def _layout(name: str, stored: Stored, architecture: Architecture, config: Config) -> Layout:
    part = name.split(".", 2)[-1]
    if architecture.paired and part in PAIRED:
        heads = config.heads if part.startswith("attn_q") else config.kv_heads
        if stored.shape[0] == heads * config.head_width:  # else it is refused for its shape
            rows = np.arange(stored.shape[0]).reshape(heads, config.head_width // 2, 2)
            return Layout(rows.swapaxes(1, 2).ravel())
    one = architecture.one_added and name.endswith("norm.weight") and len(stored.shape) == 1
    return Layout(swapped=part in architecture.transposed, added=float(one))


class Mapped:
    """A file that is mapped into memory, and the one tensor that was last dequantised whole."""

    def __init__(self, path: Path):
        self._bytes, self._last = np.memmap(path, np.uint8, "r"), (None, None)

    def rows(self, stored: Stored) -> np.ndarray:
        """(rows, bytes of one); of a tensor with one axis a single row."""
        count = stored.shape[0] if len(stored.shape) > 1 else 1
        return self._bytes[stored.start : stored.start + count * stored.row_bytes].reshape(count, stored.row_bytes)

    def whole(self, stored: Stored) -> np.ndarray:
        if self._last[0] != stored:
            self._last = (None, None)  # gone before the next is made
            self._last = stored, dequantize(self.rows(stored), stored)
        return self._last[1]


class Tensor:
    """One tensor, of which slices are read: `tensor[:]`, `tensor[2:4, :]`, float32."""

    def __init__(self, mapped: Mapped, stored: Stored, layout: Layout):
        self._mapped, self._stored, self._layout = mapped, stored, layout
        self.shape = stored.shape[::-1] if layout.swapped else stored.shape

    def __getitem__(self, index) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        order, swapped, added = self._layout
        if swapped:  # a few of its rows are of every row in the file
            return self._mapped.whole(self._stored).T[(first, *rest)]
        rows = self._mapped.rows(self._stored)
        if len(self.shape) == 1:
            values = dequantize(rows, self._stored)[0] - np.float32(added)
            return (values if order is None else values[order])[first]
        rows = rows[first] if order is None else rows[order[first]]
        return self._columns(rows, *rest)

    def _columns(self, rows: np.ndarray, columns: slice = slice(None)) -> np.ndarray:
        """Of some rows, without the blocks that hold nothing of these columns."""
        block, block_bytes = block_size(self._stored.kind)
        start, stop, _ = columns.indices(self.shape[1])
        begin, end = start // block, -(-stop // block)
        return dequantize(rows[:, begin * block_bytes : end * block_bytes], self._stored)[
            :, start - begin * block : stop - begin * block
        ]


def dequantize(rows: np.ndarray, stored: Stored) -> np.ndarray:
    """(R, bytes of whole blocks) as float32 (R, numbers)."""
    block, block_bytes = block_size(stored.kind)
    if not rows.size:
        return np.zeros((len(rows), rows.shape[1] // block_bytes * block), np.float32)
    return package().quants.dequantize(np.ascontiguousarray(rows), package().GGMLQuantizationType(stored.kind))
