"""The public PyTorch release's layout of a distiller: one file of tensors, read and written.

Its names are GPT2Model's after `hypernet.`, with `hypernet.init_prompt_weight` (l, width) and, if the widths differ,
`hypernet.adap_pooler.dense.{weight,bias}`, a Linear followed by tanh.
"""

import errno
from pathlib import Path

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.imports import pytorch
from mend_jax.models import weights
from mend_jax.models.families import Config

HYPERNET = "hypernet."
PLACEHOLDERS = "init_prompt_weight"
PROJECTION = {"kernel": "adap_pooler.dense.weight", "bias": "adap_pooler.dense.bias"}


def read_params(path: Path, config: Config) -> dict:
    """The parameters of a distiller (`DistillerModule`), float32, in the release's .safetensors or .bin file.

    `config` is that of its backbone. Raises UserError if the file is damaged, incomplete or of another model.
    """
    own = {}

    def backbone_tensors():  # one after another: the file is open only during the iteration
        for raw_name, tensor in weights.read_file(path):
            name = raw_name.removeprefix(HYPERNET)
            if name == raw_name:
                raise UserError(
                    f"{path} holds {raw_name}, which is not part of a distiller (its names start with {HYPERNET})."
                )
            if name == PLACEHOLDERS or name in PROJECTION.values():
                own[name] = np.asarray(tensor[:], np.float32)
            else:
                yield name, tensor

    params = {"backbone": weights.from_tensors(backbone_tensors(), config, where=str(path))}
    params["placeholders"] = weights.take(own, PLACEHOLDERS, (None, config.width), path)
    if own:
        kernel = weights.take(own, PROJECTION["kernel"], (None, config.width), path).T
        bias = weights.take(own, PROJECTION["bias"], (kernel.shape[1],), path)
        params["projection"] = {"kernel": np.ascontiguousarray(kernel), "bias": bias}
    return params


def release_tensors(distiller) -> dict[str, np.ndarray]:
    """A `Distiller`'s parameters under the release's names, in its order: placeholders, backbone, projection.

    Raises:
        UserError: a projection that the release does not have (its code adds tanh, and only where the widths differ).
    """
    if distiller.config.family != "gpt2":
        raise UserError(
            f"The release's layout only has GPT-2 backbones: it cannot hold this one ({distiller.config.family})."
        )
    width, llm_width = distiller.config.width, distiller.llm_width
    if distiller.projection != ("identity" if width == llm_width else "tanh"):
        raise UserError(
            f'The release\'s layout has no "{distiller.projection}" projection from width {width} to '
            f"{llm_width}: it cannot hold this distiller."
        )
    if distiller.residual:
        raise UserError(
            "The release's layout has no prefix.residual, which adds to the tokens' embeddings: it cannot hold this distiller."
        )
    params = distiller.params
    if "tokens" not in params["backbone"]["embed"]:  # as it is read from an exported folder
        raise UserError(
            "The release's layout holds token embeddings, which this distiller's folder leaves to the LLM: it cannot hold it."
        )
    tensors = {HYPERNET + PLACEHOLDERS: np.asarray(params["placeholders"])}
    tensors |= weights.to_tensors(distiller.config, params["backbone"], HYPERNET)
    if "projection" in params:
        tensors[HYPERNET + PROJECTION["kernel"]] = np.asarray(params["projection"]["kernel"]).T
        tensors[HYPERNET + PROJECTION["bias"]] = np.asarray(params["projection"]["bias"])
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def write_release(distiller, path: str | Path) -> None:
    """Writes a `Distiller` as the release's own file; `path` ends in .safetensors, or in .bin (needs PyTorch)."""
    tensors, path = release_tensors(distiller), Path(path)
    if path.suffix == ".safetensors":
        weights.write_file(tensors, path, metadata=None)
        return
    try:
        torch = pytorch()
    except ImportError:
        raise UserError(f"Writing {path.name} needs PyTorch: pip install torch, or use the .safetensors.") from None
    content = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    try:
        torch.save(content, path)
    except RuntimeError as error:  # PyTorch's error for a full disk, among others
        raise OSError(errno.EIO, f"PyTorch: {str(error).splitlines()[0]}", str(path)) from error


def write_both(distiller, folder: Path) -> str:
    """Writes those of the release's two files that can be written into the new `folder`; returns a sentence about them."""
    folder.mkdir()
    where = f"The public release's layout is in {folder.name}/"
    try:
        write_release(distiller, folder / "distiller.safetensors")
        write_release(distiller, folder / "distiller.bin")
    except UserError as error:
        if any(folder.iterdir()):
            return f"{where}, without distiller.bin, which only PyTorch writes (pip install torch)."
        folder.rmdir()
        return str(error)
    return f"{where}."
