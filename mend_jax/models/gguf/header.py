"""The header of a GGUF file: its metadata, and where each tensor lies. Every count and size is held against the file's size
before it is used.

The reader of the package `gguf` believes what a header claims, so that a damaged one can take all memory; what the types of
blocks are, and their arithmetic, is the package's.
"""

import functools
import math
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mend_jax.cli.errors import UserError

SUFFIX = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
MOST_STRINGS = 1 << 22  # of an array; the largest vocabularies have a tenth of it
MOST_AXES = 4
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class Stored(NamedTuple):
    """Where a tensor lies, whole rows of blocks one after another."""

    file: Path
    kind: int  # ggml's number of its type
    shape: tuple[int, ...]  # the slowest axis first, as NumPy's
    start: int  # bytes from the file's beginning
    row_bytes: int  # of all but the slowest axis; of an axis alone, of all


class Header(NamedTuple):
    """Metadata (numbers, text, arrays of NumPy, lists of text) and tensors, by the names that the file gives them."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


class _Damaged(Exception):
    """Why a header cannot be right."""


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file, there or not."""
    return str(path).endswith(SUFFIX)


def package():
    """The package `gguf`. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf to be read: pip install gguf.") from None
    return gguf


def parts(path: str | Path) -> list[Path]:
    """The files of a model: `path` alone, or all parts where its name is that of one. Raises UserError where one is not there."""
    path = Path(path)
    match = SPLIT.fullmatch(path.name)
    names = [path.name]
    if match:
        count = int(match[3])
        names = [f"{match[1]}-{part:05}-of-{count:05}{SUFFIX}" for part in range(1, count + 1)]
    for name in names:
        if not (path.parent / name).is_file():
            what = f"it is a part of the split model {path.name}" if match else "name a GGUF file that is"
            raise UserError(f"{path.parent / name} is not there: {what}.")
    return [path.parent / name for name in names]


def read_model(path: str | Path) -> Header:
    """The metadata of a model (a split one's first part has it) and its tensors in all parts.

    Raises UserError: a file that is not there, is no GGUF file, is cut or damaged, or in blocks that cannot be read.
    """
    headers = [read_header(part) for part in parts(path)]
    count = int(headers[0].metadata.get("split.count") or 1)
    if count not in (0, 1, len(headers)):
        raise UserError(
            f"{path} is one of {count} parts, but its name does not say so: give all their names back (NAME-00001-of-{count:05}.gguf)."
        )
    tensors: dict[str, Stored] = {}
    for header in headers:
        twice = next((name for name in header.tensors if name in tensors), None)
        if twice:
            raise UserError(f"{path} holds {twice} in two of its parts: copy them again.")
        tensors |= header.tensors
    return Header(headers[0].metadata, tensors)


def read_header(path: Path) -> Header:
    """Of one file."""
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read(path: Path, size: int, _) -> Header:
    """Of a file of this size and time of change: read once, though each parameter may be read by itself."""
    package()
    try:
        if size < 24:
            raise _Damaged(f"it has {size} bytes")
        with open(path, "rb") as file:
            if file.read(4) != MAGIC:
                raise UserError(f"{path} is no GGUF file: it begins with other bytes.")
        return _Reader(path, np.memmap(path, np.uint8, "r")).header()
    except _Damaged as error:
        raise UserError(f"{path} is cut or damaged ({error}): copy it again.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged (a name in it is not text): copy it again.") from None


class _Reader:
    """Reads one file from its beginning on."""

    def __init__(self, path: Path, content: np.ndarray):
        self.path, self.data, self.size, self.at = path, memoryview(content), len(content), len(MAGIC)

    def header(self) -> Header:
        version = self.number("<I")
        if version not in VERSIONS:
            raise UserError(f"{self.path} is GGUF of version {version}: only 2 and 3, lowest byte first, can be read.")
        tensors, entries = self.number("<Q"), self.number("<Q")
        self.room(tensors, 24, "tensors")
        self.room(entries, 13, "entries of metadata")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = self.text()
            if name in metadata:
                raise _Damaged(f"it holds {name!r} twice")
            metadata[name] = self.value(self.number("<I"))
        return Header(metadata, self.tensors(tensors, metadata.get("general.alignment", 32)))

    def number(self, form: str):
        start, self.at = self.at, self.at + struct.calcsize(form)
        if self.at > self.size:
            raise _Damaged(f"its header goes on behind its {self.size} bytes")
        return struct.unpack_from(form, self.data, start)[0]

    def room(self, count: int, each: int, what: str) -> None:
        """Raises where so many, of so many bytes each at least, cannot follow."""
        if count > (self.size - self.at) // each:
            raise _Damaged(f"it claims {count} {what} and has {self.size} bytes")

    def text(self) -> str:
        length = self.number("<Q")
        self.room(length, 1, "bytes of text")
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("<I"), self.number("<Q"))
        value = self.numbers(kind, 1)[0]
        # A float32 as the shortest decimal that means it: 1e-5 and not 9.999999747378752e-06.
        return float(str(value)) if NUMBERS[kind] == "<f4" else value.item()

    def array(self, kind: int, count: int) -> np.ndarray | list[str]:
        if kind != STRING:
            return self.numbers(kind, count)
        self.room(count, 8, "texts")
        if count > MOST_STRINGS:
            raise _Damaged(f"it claims {count} texts in one list")
        return [self.text() for _ in range(count)]

    def numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in NUMBERS:
            raise _Damaged(f"a value of its metadata is of the unknown type {kind}")
        form = np.dtype(NUMBERS[kind])
        self.room(count, form.itemsize, "numbers")
        found = np.frombuffer(self.data, form, count, self.at).copy()
        self.at += count * form.itemsize
        return found

    def tensors(self, count: int, alignment: int) -> dict[str, Stored]:
        if not isinstance(alignment, int) or alignment <= 0:
            raise _Damaged(f"it says general.alignment={alignment}")
        found: dict[str, tuple] = {}
        for _ in range(count):
            name = self.text()
            if name in found:
                raise _Damaged(f"it holds {name!r} twice")
            found[name] = self.shape(name), self.number("<I"), self.number("<Q")
        begin = -(-self.at // alignment) * alignment
        return {name: self.stored(name, *where, begin) for name, where in found.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        axes = self.number("<I")
        if not 1 <= axes <= MOST_AXES:
            raise _Damaged(f"{name} has {axes} axes")
        return tuple(self.number("<Q") for _ in range(axes))[::-1]

    def stored(self, name: str, shape: tuple, kind: int, offset: int, begin: int) -> Stored:
        if block_size(kind) is None:
            raise UserError(
                f"{self.path} holds {name} in ggml's type {kind}{_called(kind)}, which the package gguf cannot dequantise: "
                "take the model in another quantisation, such as Q8_0."
            )
        block, block_bytes = block_size(kind)
        if shape[-1] % block:
            raise _Damaged(f"rows of {name} have {shape[-1]} numbers, which are not whole blocks of {block}")
        row_bytes = math.prod(shape[1:] or shape) // block * block_bytes
        end = begin + offset + row_bytes * (shape[0] if len(shape) > 1 else 1)
        if end > self.size:
            raise _Damaged(f"{name} ends at byte {end}, the file has {self.size}")
        return Stored(self.path, kind, shape, begin + offset, row_bytes)


@functools.cache
def block_size(kind: int) -> tuple[int, int] | None:
    """(numbers, bytes) of a block of one of ggml's types; None for a type that the package cannot dequantise."""
    gguf = package()
    try:
        known = gguf.GGMLQuantizationType(kind)
        numbers, size = gguf.GGML_QUANT_SIZES[known]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), known)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return numbers, size


def _called(kind: int) -> str:
    try:
        return f" ({package().GGMLQuantizationType(kind).name})"
    except ValueError:
        return ""
