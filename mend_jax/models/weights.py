"""Weights between Hugging Face files and our tree: one key table per family, used in both directions.

Reading refuses, by name: a key it does not know, one that is missing, one that comes twice, one of another shape.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives numpy the name "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mend_jax.errors import UserError
from mend_jax.models.families import FAMILIES, HEAD, DecoderConfig, key_table
from mend_jax.models.tables import Entry

FORMAT = {"format": "pt"}  # transformers reads no .safetensors without it
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # or their shards, which <name>.index.json lists


def from_tensors(
    tensors: Iterator[tuple[str, Callable[[], np.ndarray]]], config: DecoderConfig, dtype="float32", where="the weights"
) -> dict:
    """The tree of (their name, function that reads it), read one tensor at a time into place in `dtype`."""
    family, table, params, seen, tied = FAMILIES[config.family], key_table(config), {}, set(), None
    for raw_name, read in tensors:
        name = raw_name.removeprefix(family.prefix)
        if family.derived(name):
            continue
        if name == HEAD and config.tied_head:
            tied = read()
            continue
        if name not in table:
            raise UserError(
                f"{where} holds {raw_name}, which a {config.layers}-layer {config.family} model does not have."
            )
        if name in seen:
            raise UserError(f"{where} holds {name} twice: remove the stray file or key.")
        seen.add(name)
        entry, array = table[name], read()
        if array.shape != entry.shape:
            raise UserError(f"{where}: {raw_name} has shape {array.shape}, config.json asks for {entry.shape}.")
        _place(params, entry, array, dtype)
    missing = [name for name in table if name not in seen]
    if missing:
        raise UserError(
            f"{where} lacks {missing[0]} ({len(missing)} keys missing): the file is of another model or incomplete."
        )
    if tied is not None and not np.array_equal(tied.astype(dtype), params["embed"]["tokens"]):
        raise UserError(
            f"{where} holds a head ({HEAD}) that is not the token table, though config.json says so"
            " (tie_word_embeddings): take the config.json that belongs to the weights."
        )
    return params


def to_tensors(config: DecoderConfig, params: Mapping, prefix: str | None = None) -> dict[str, np.ndarray]:
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


def read_params(folder: str | Path, config: DecoderConfig, dtype: str = "float32") -> dict:
    """The weights of a Hugging Face folder: model.safetensors, its shards, or (with PyTorch there) pytorch_model.bin."""
    folder = Path(folder)
    return from_tensors(_tensors_of(weight_files(folder)), config, dtype, where=str(folder))


def write_params(folder: str | Path, config: DecoderConfig, params: Mapping, dtype: str | None = None) -> None:
    """`model.safetensors` in `folder`, as transformers saves the model with its head; `dtype` None is that of `params`.

    float32 holds every bfloat16 and float16 number: what was read as float32 and is written in the dtype it had is the
    same bytes again.
    """
    tensors = {name: np.ascontiguousarray(a, dtype or a.dtype) for name, a in to_tensors(config, params).items()}
    write_file(tensors, Path(folder) / "model.safetensors")


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
    """Whether a Hugging Face folder holds a file of weights or an index of some, whole or not."""
    return any((folder / name).exists() or _index(folder, name).exists() for name in SINGLE_FILES)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a Hugging Face folder, safetensors before .bin; a missing shard is an error."""
    for single in SINGLE_FILES:
        index = _index(folder, single)
        if (folder / single).exists():
            return [folder / single]
        if index.exists():
            shards = _shards(index)
            missing = [shard for shard in shards if not (folder / shard).exists()]
            if missing:
                raise UserError(
                    f"{folder / missing[0]} is not there, though {index.name} names it: copy the model's folder again."
                )
            return [folder / shard for shard in shards]
    raise UserError(f"{folder} holds no weights: model.safetensors or pytorch_model.bin is expected there.")


def _index(folder: Path, single: str) -> Path:
    return folder / f"{single}.index.json"


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is no index of weights ({type(error).__name__}: {error}): copy the model's folder again."
        ) from None


def read_file(path: str | Path) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """(name, function that reads it) of one .safetensors or .bin file."""
    return _tensors_of([Path(path)])


def _tensors_of(files: list[Path]) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    for path in files:
        yield from (_read_torch(path) if path.suffix == ".bin" else _read_safetensors(path))


def _read_safetensors(path: Path):
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dict and cannot be iterated)
                yield name, lambda name=name: file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): copy it again.") from error


def _read_torch(path: Path):
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs PyTorch to be read: pip install torch, or convert it to safetensors.") from None
    try:  # weights only: an arbitrary pickle could run code
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, all of them mean the same to the user
        raise UserError(
            f"{path} cannot be read as PyTorch weights ({str(error).splitlines()[0]}): copy it again."
        ) from error
    for name, tensor in tensors.items():
        yield (
            name,
            lambda tensor=tensor: tensor.to(torch.float32).numpy() if tensor.is_floating_point() else tensor.numpy(),
        )


def _place(params: dict, entry: Entry, array: np.ndarray, dtype: str) -> None:
    *parents, leaf = entry.path
    for part in parents:
        params = params.setdefault(part, {})
    array = array.T if entry.transposed else array
    if entry.layer is None:
        params[leaf] = np.ascontiguousarray(array, dtype)
    else:
        params.setdefault(leaf, np.empty((entry.layers, *entry.our_shape), dtype))[entry.layer] = array
