"""Weights between Hugging Face files and our tree: one key table per family, used in both directions.

Reading refuses, by name: a key it does not know, one that is missing, one that comes twice, one of another shape.
Files are read piece by piece into place, quantised on the way where that is asked for: beside the tree that is made, and
the pages of one file that the system maps, there are never more than a few megabytes.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import ml_dtypes  # noqa: F401  (gives numpy the name "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mend_jax.cli.errors import UserError
from mend_jax.cli.imports import pytorch
from mend_jax.models.families import FAMILIES, HEAD, Config, file_says_head, key_table
from mend_jax.models.gguf.header import is_gguf, parts
from mend_jax.models.gguf.tensors import open_part
from mend_jax.models.int8 import SCALE, SUMMED, quantize
from mend_jax.models.tables import Entry, Table
from mend_jax.run.reading import read_json, require_regular

AGAIN = "copy the model's folder again"
FORMAT = {"format": "pt"}  # transformers reads no .safetensors without it
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # or their shards, which <name>.index.json lists
NOT_TIED = (
    "{where} holds a head (lm_head.weight) that is not the token table, though config.json says so"
    " (tie_word_embeddings): take the config.json that belongs to the weights."
)
SHARD_BYTES = 1 << 30  # of a file in `copy_weights`, at least
PIECE = 1 << 18  # numbers that are read at once: a few copies of them fit in a CPU's cache


class Tensor(Protocol):
    """A tensor of a file, of which slices are read: `tensor[:]`, `tensor[2:4, :]`. NumPy's arrays are some too."""

    shape: tuple[int, ...]

    def __getitem__(self, index) -> np.ndarray: ...


def from_tensors(
    tensors: Iterator[tuple[str, Tensor]],
    config: Config,
    dtype="float32",
    int8=False,
    where="the weights",
    wanted: Table | None = None,
) -> dict:
    """The tree (NumPy) of (their name, tensor), read one after another into place, in `dtype`.

    With `int8` kernels and token tables are int8 with float32 scales (models/int8.py), quantised from the file's dtype.
    `wanted` is as in `matched`.
    """
    table, params, tied = key_table(config), {}, None
    embed = next(entry for entry in table.values() if entry.path == ("embed", "tokens"))
    for raw_name, entry, tensor in matched(tensors, config, where, wanted):
        if entry is None:
            same_shape = tensor.shape == embed.shape
            tied = _digests(_pieces(tensor, embed, dtype, int8)) if same_shape else {"tokens": None}
            continue
        for leaf, index, piece in _pieces(tensor, entry, dtype, int8):
            if leaf.endswith(SCALE) and not np.isfinite(piece).all():
                raise UserError(
                    f"{where}: {raw_name} holds numbers that are not finite: copy the model's folder again."
                )
            _leaf(params, entry, leaf, piece.dtype)[index] = piece
    if tied is not None and any(digest != _digest(params["embed"][leaf]) for leaf, digest in tied.items()):
        raise UserError(NOT_TIED.format(where=where))
    return params


def matched(
    tensors: Iterator[tuple[str, Tensor]], config: Config, where: str, wanted: Table | None = None
) -> Iterator[tuple[str, Entry | None, Tensor]]:
    """(name, our place, tensor) of each tensor that is read; the place of a head that is the token table is None.

    Args:
        tensors: all of a model's, by name.
        config: the model's.
        where: what holds them.
        wanted: some of them, with their places in another tree than the whole model's (such as its first layers'); None: all.
    Raises:
        UserError: a name that the model does not have, that comes twice or is missing, another shape; of those not wanted too.
    """
    optional = {HEAD} if file_says_head(config) else set()
    config = dataclasses.replace(config, tied_head=config.tied_head and not optional)
    family, table, seen = FAMILIES[config.family], key_table(config), set()
    wanted = table if wanted is None else wanted
    for raw_name, tensor in tensors:
        name = family.bare(raw_name)
        if family.derived(name):
            continue
        if name == HEAD and config.tied_head:
            if tokens_name(config) in wanted:  # else there is nothing to compare it with
                yield raw_name, None, tensor
            continue
        if name not in table:
            raise UserError(
                f"{where} holds {raw_name}, which a {config.layers}-layer {config.family} model does not have."
            )
        if name in seen:
            raise UserError(f"{where} holds {name} twice: remove the stray file or key.")
        seen.add(name)
        if tensor.shape != table[name].shape:
            raise UserError(f"{where}: {raw_name} has shape {tensor.shape}, config.json asks for {table[name].shape}.")
        if name in wanted:
            yield raw_name, wanted[name], tensor
    missing = [name for name in table if name not in seen | optional]
    if missing:
        raise UserError(
            f"{where} lacks {missing[0]} ({len(missing)} keys missing): the file is of another model or incomplete."
        )


def as_read(config: Config, params: Mapping) -> Config:
    """`config` with what `params`, read with it, say of the head (`families.file_says_head`)."""
    return dataclasses.replace(config, tied_head="head" not in params["embed"])


def tokens_name(config: Config) -> str:
    """The name of the token embeddings, without the prefix of a model with a head."""
    return next(name for name, entry in key_table(config).items() if entry.path == ("embed", "tokens"))


def to_tensors(config: Config, params: Mapping, prefix: str | None = None) -> dict[str, np.ndarray]:
    """The inverse: their names -> arrays, in the order of the model.

    `prefix` stands before all names but the head's; None is that of the family's model with a head.
    """
    prefix = FAMILIES[config.family].prefix if prefix is None else prefix
    tensors = {}
    for name, entry in key_table(config).items():
        leaf = params
        for part in entry.path:
            leaf = leaf[part]
        array = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
        tensors[name if name == HEAD else prefix + name] = array.T if entry.transposed else array
    return tensors


def read_params(
    folder: str | Path, config: Config, dtype: str = "float32", int8: bool = False, wanted: Table | None = None
) -> dict:
    """The weights of a Hugging Face folder: model.safetensors, its shards, or (with PyTorch there) pytorch_model.bin; or
    those of a GGUF file. `wanted` is as in `matched`.

    It never takes more memory than the tree and 1.2 times the largest file.
    """
    folder = Path(folder)
    return from_tensors(_tensors_of(weight_files(folder)), config, dtype, int8, str(folder), wanted)


def write_params(folder: str | Path, config: Config, params: Mapping, dtype: str | None = None) -> None:
    """`model.safetensors` in `folder`, as transformers saves the model with its head; `dtype` None is that of `params`.

    float32 holds every bfloat16 and float16 number: what was read as float32 and is written in the dtype it had is the
    same bytes again.
    """
    tensors = {name: np.ascontiguousarray(a, dtype or a.dtype) for name, a in to_tensors(config, params).items()}
    write_file(tensors, Path(folder) / "model.safetensors")


def copy_weights(source: str | Path, config: Config, folder: Path) -> None:
    """The weights of a folder or GGUF file as float32 shards in another folder, of which one is in memory at a time.

    Raises UserError as `read_params` does.
    """
    shard, written, whole = {}, {}, 0

    def write():
        name = f"model-{len(set(written.values())) + 1:05}.safetensors"
        write_file(shard, folder / name)
        written.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, _, tensor in matched(_tensors_of(weight_files(Path(source))), config, str(source)):
        shard[name] = np.ascontiguousarray(tensor[:], np.float32)
        whole += shard[name].nbytes
        if sum(array.nbytes for array in shard.values()) >= SHARD_BYTES:
            write()
    if not written:
        write_file(shard, folder / SINGLE_FILES[0])
        return
    if shard:
        write()
    index = {"metadata": {"total_size": whole}, "weight_map": written}
    _index(folder, SINGLE_FILES[0]).write_text(json.dumps(index, indent=2) + "\n")


def write_file(tensors: dict[str, np.ndarray], path: str | Path, metadata: dict | None = FORMAT) -> None:
    """One .safetensors file. Raises OSError where it cannot be written: safetensors has an error of its own for that."""
    Path(path).touch()
    mode = os.stat(path).st_mode  # what the umask allows; safetensors' own files are their owner's alone
    try:
        save_file(tensors, path, metadata=metadata)
        os.chmod(path, mode)
    except SafetensorError as error:
        code = re.search(r"(?:os error|code:) (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def has_weights(folder: Path) -> bool:
    """Whether a Hugging Face folder holds a file of weights or an index of some, whole or not; a GGUF file does."""
    return is_gguf(folder) or any((folder / name).exists() or _index(folder, name).exists() for name in SINGLE_FILES)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a Hugging Face folder, safetensors before .bin, or the parts of a GGUF file; a missing one is
    an error."""
    if is_gguf(folder):
        return parts(folder)
    for single in SINGLE_FILES:
        index = _index(folder, single)
        if (folder / single).exists():
            require_regular(folder / single, AGAIN)
            return [folder / single]
        if index.exists():
            return _shards(index)
    raise UserError(f"{folder} holds no weights: model.safetensors or pytorch_model.bin is expected there.")


def _index(folder: Path, single: str) -> Path:
    return folder / f"{single}.index.json"


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which lie beside it. Raises UserError where it names another place, or what is not there."""
    named = read_json(index, AGAIN).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index} is no index of weights (weight_map is no object of file names): {AGAIN}.")
    names = sorted(set(named.values()))
    for name in names:
        if Path(name).name != name or name == ".." or "\0" in name:
            raise UserError(f"{index} names the file {name!r}, which is not one beside it: {AGAIN}.")
        try:
            require_regular(index.parent / name, AGAIN)
        except FileNotFoundError:
            raise UserError(f"{index.parent / name} is not there, though {index.name} names it: {AGAIN}.") from None
    return [index.parent / name for name in names]


def read_file(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one .safetensors or .bin file; a tensor can be read until the next is asked for."""
    return _tensors_of([Path(path)])


def read_metadata(path: str | Path) -> dict[str, str]:
    """What `write_file` was given beside the tensors."""
    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def open_file(path: Path, files: contextlib.ExitStack) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one .safetensors, .gguf or .bin file; the tensors can be read as long as `files` is open."""
    if is_gguf(path):
        return open_part(path)
    return _open_torch(path) if path.suffix == ".bin" else _open_safetensors(path, files)


def is_mapped(path: Path) -> bool:
    """Whether a tensor can be read without the rest of its file: not from a .bin file older than PyTorch 1.6, which is no archive."""
    return path.suffix != ".bin" or zipfile.is_zipfile(path)


def _open_safetensors(path: Path, files: contextlib.ExitStack):
    try:
        file = files.enter_context(safe_open(path, framework="numpy"))
        for name in file.keys():  # noqa: SIM118  (it is no dict and cannot be iterated)
            yield name, _SafeTensor(file.get_slice(name))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): copy it again.") from error


def _open_torch(path: Path):
    try:
        torch = pytorch()
    except ImportError:
        raise UserError(f"{path} needs PyTorch to be read: pip install torch, or convert it to safetensors.") from None
    try:  # weights only: an arbitrary pickle could run code
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped(path))
    except Exception as error:  # torch raises many kinds, all of them mean the same to the user
        raise UserError(
            f"{path} cannot be read as PyTorch weights ({str(error).splitlines()[0]}): copy it again."
        ) from error
    for name, tensor in tensors.items():
        yield name, _TorchTensor(tensor)


def _tensors_of(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        with contextlib.ExitStack() as files:
            yield from open_file(path, files)


class _SafeTensor:
    def __init__(self, stored):
        self._stored, self.shape = stored, tuple(stored.get_shape())

    def __getitem__(self, index):
        return self._stored[index]


class _TorchTensor:
    def __init__(self, tensor):
        self._tensor, self.shape = tensor, tuple(tensor.shape)

    def __getitem__(self, index):
        part = self._tensor[index]
        return part.float().numpy() if part.is_floating_point() else part.numpy()


def _pieces(tensor: Tensor, entry: Entry, dtype: str, int8: bool) -> Iterator[tuple[str, tuple, np.ndarray]]:
    """(leaf of our tree, index in it, values in its dtype), piece by piece; of 8 bits a piece is whole output channels."""
    name, cut = entry.path[-1], 0  # the axis of the file along which it is read
    quantised = int8 and name in SUMMED
    if quantised:
        cut = int((SUMMED[name] == -2) != entry.transposed)
    size = entry.shape[cut]
    count = max(1, PIECE * size // max(1, math.prod(entry.shape)))
    for start in range(0, size, count):
        part = slice(start, min(start + count, size))
        index = tuple(part if axis == cut else slice(None) for axis in range(len(entry.shape)))
        array = tensor[index]
        if entry.transposed:
            array, index = array.T, index[::-1]
        if quantised:
            values, scale = quantize(array, SUMMED[name])
            yield name, index, values
            yield name + SCALE, (part,), scale
        else:
            yield name, index, np.asarray(array, dtype)


def _leaf(params: dict, entry: Entry, leaf: str, dtype) -> np.ndarray:
    """The array that a tensor goes to, made where it is not there yet."""
    *parents, name = entry.path
    for part in parents:
        params = params.setdefault(part, {})
    if leaf not in params:
        kept = [n for axis, n in enumerate(entry.our_shape) if leaf == name or axis != SUMMED[name] % 2]
        params[leaf] = aligned(kept if entry.layer is None else (entry.layers, *kept), dtype)
    return params[leaf] if entry.layer is None else params[leaf][entry.layer]


def aligned(shape, dtype) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes: JAX takes it for a CPU's own, without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _digests(pieces) -> dict[str, str]:
    """{leaf: `_digest` of all its pieces, one behind another}."""
    found = {}
    for leaf, _, piece in pieces:
        found.setdefault(leaf, hashlib.blake2b()).update(np.ascontiguousarray(piece).view(np.uint8))
    return {leaf: digest.hexdigest() for leaf, digest in found.items()}


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(array.view(np.uint8)).hexdigest()


def take(tensors: dict, name: str, shape: tuple, where) -> np.ndarray:
    """Takes a tensor out of `tensors`; None in `shape` is any size."""
    if name not in tensors:
        raise UserError(f"{where} lacks {name}: the file is of another model or incomplete.")
    tensor = tensors.pop(name)
    fits = tensor.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(
            f"{where}: {name} has shape {tensor.shape}, ({wanted}) is needed: take the backbone it was trained with."
        )
    return tensor
