"""The weights of a distiller's backbone in an exported folder: float32, bfloat16, or 8 bits.

    model.safetensors        float32 or bfloat16, which `AutoModel.from_pretrained` reads too
    model.int8.safetensors   every matrix (R,C) as int8 with one float32 scale per row, NAME.scale (R,); the rest as float32

The second has a name of its own, since transformers would read the integers as weights.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mend_jax.models import weights
from mend_jax.models.families import Config
from mend_jax.models.folders import read_weights
from mend_jax.models.int8 import LARGEST
from mend_jax.prefixes.embeddings import OF_LLM, with_tokens, without_tokens
from mend_jax.run.sharding import Place

DTYPES = ("float32", "bfloat16", "int8")
FILE = weights.SINGLE_FILES[0]
INT8_FILE = "model.int8.safetensors"
SCALE = ".scale"


def write_backbone(folder: Path, config: Config, backbone: Mapping, embeddings: str, dtype: str = "float32") -> None:
    """Writes a backbone's file, without token embeddings if they are the LLM's; `dtype` is one of DTYPES."""
    tensors = _tensors(config, backbone, embeddings)
    if dtype == "int8":
        weights.write_file(in_8_bits(tensors), folder / INT8_FILE)
    else:
        kept = {name: np.ascontiguousarray(tensor, jnp.dtype(dtype)) for name, tensor in tensors.items()}
        weights.write_file(kept, folder / FILE)


def read_backbone(folder: Path, config: Config, embeddings: str, place: Place | None = None) -> dict:
    """The backbone's tree in float32. Raises UserError for a damaged file, or one of another model.

    `place` is as in `load_llm`; weights in 8 bits, and those of a backbone without embeddings, are read whole.
    """
    if embeddings != OF_LLM and not (folder / INT8_FILE).exists():
        return read_weights(folder, config, place=place)
    file = INT8_FILE if (folder / INT8_FILE).exists() else FILE
    tensors = weights.read_file(folder / file)
    tensors = from_8_bits(tensors) if file == INT8_FILE else tensors
    if embeddings != OF_LLM:
        return weights.from_tensors(tensors, config, where=str(folder))
    none = (weights.tokens_name(config), np.broadcast_to(np.float32(0), (config.vocab_size, config.width)))
    return without_tokens(weights.from_tensors(itertools.chain(tensors, [none]), config, where=str(folder)))[0]


def in_8_bits(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each matrix as int8 with its scales: the largest number of a row is 127."""
    packed = {}
    for name, tensor in tensors.items():
        tensor = np.ascontiguousarray(tensor, np.float32)
        if tensor.ndim != 2:
            packed[name] = tensor
            continue
        scale = np.abs(tensor).max(1) / LARGEST
        packed[name] = np.rint(tensor / np.where(scale == 0, 1, scale)[:, None]).astype(np.int8)
        packed[name + SCALE] = scale
    return packed


def from_8_bits(tensors) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 array) of those that `in_8_bits` made, from pairs of a name and something to read."""
    read = {name: np.asarray(tensor[:]) for name, tensor in tensors}
    for name, tensor in read.items():
        if not name.endswith(SCALE):
            scale = read.get(name + SCALE)
            yield name, tensor if scale is None else tensor.astype(np.float32) * scale[:, None]


def _tensors(config: Config, backbone: Mapping, embeddings: str) -> dict[str, np.ndarray]:
    """Under Hugging Face's names, without token embeddings if they are the LLM's."""
    if embeddings != OF_LLM:
        return weights.to_tensors(config, backbone, prefix="")
    tensors = weights.to_tensors(config, with_tokens(backbone, np.zeros(0)), prefix="")
    return {name: tensor for name, tensor in tensors.items() if name != weights.tokens_name(config)}
