"""Out to PyTorch: a trained model as files that need nothing of this project, and the way back.

    python -m mend_jax.export --workdir=runs/mend --out=exported/mend

--backbone=FOLDER names the distiller's backbone (stage "lm": the LLM) where it has moved since the training.

A distiller becomes a Hugging Face folder. Its backbone loads with `AutoModel.from_pretrained(folder)`, beside it are
distiller.safetensors (`placeholders` (l, width), `projection.weight` (llm_width, width), `projection.bias`),
distiller_config.json, the tokenizer, a model card, mend_distiller.py (one PyTorch module) and release/: the layout of
MEND's public release. A stage "lm" run becomes a Hugging Face folder of its LLM, a soft prompt a file of its vectors.

The names in the release's layout are GPT2Model's behind `hypernet.`, with `hypernet.init_prompt_weight` (l, width) and,
where the widths differ, `hypernet.adap_pooler.dense.{weight,bias}`, a Linear that is followed by tanh.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mend_jax import checkpoint
from mend_jax.data import small_world
from mend_jax.data.tokenize import separator
from mend_jax.errors import UserError
from mend_jax.model_card import distiller_card, llm_card, soft_prompt_card
from mend_jax.models import weights
from mend_jax.models.decoder import init_params
from mend_jax.models.families import DecoderConfig, from_hf_config, to_hf_config
from mend_jax.models.folders import load_tokenizer, local_folder, save_model
from mend_jax.prefix import PROJECTIONS, Distiller, SoftPrompt, resolve_projection

SETTINGS = "distiller_config.json"
TENSORS = "distiller.safetensors"
MODULE = "mend_distiller.py"  # torch_module.py under the name that stays
SOFT_PROMPT = "soft_prompt.safetensors"
HYPERNET = "hypernet."
PLACEHOLDERS = "init_prompt_weight"
PROJECTION = {"kernel": "adap_pooler.dense.weight", "bias": "adap_pooler.dense.bias"}


def export(workdir: str | Path, out: str | Path, backbone: str | Path | None = None) -> str:
    """Writes what was trained in `workdir` to the new folder `out`, whole or not at all; returns a sentence on it.

    Args:
        workdir: of mend_jax.train, any stage; its best checkpoint is taken.
        out: a folder that is not there yet, or is empty.
        backbone: the Hugging Face folder of the distiller's backbone (stage "lm": of the LLM), where it has moved.
    Raises:
        UserError: no such workdir, no whole checkpoint, a backbone that is not there, a full `out`, a full disk.
    """
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: name another folder, or remove it.")
    config, model, meta = _read_workdir(workdir, backbone)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        said = _write(temporary, workdir, config, model, meta, backbone)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}): make room, or name another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"{said} Step {meta['step']} of {workdir} is in {out}."


def read_distiller(path: str | Path, backbone: str | Path | None = None) -> Distiller:
    """A distiller from any place one is kept in; it learns its shape from the files.

    Args:
        path: a training workdir, an exported folder, or the public release's .safetensors or .bin file.
        backbone: the Hugging Face folder of its backbone (config.json, tokenizer): needed for the release's file, and
            for a workdir whose backbone has moved.
    Raises:
        UserError: nothing there, a soft prompt or an LLM, or files that are damaged, incomplete or of another model.
    """
    model = read_trained(path, backbone)
    if isinstance(model, SoftPrompt):
        raise UserError(f"{path} holds a soft prompt, which reads no demonstrations: name the workdir of a distiller.")
    return model


def read_trained(path: str | Path, backbone: str | Path | None = None) -> Distiller | SoftPrompt:
    """As `read_distiller`, and soft prompts too: a workdir of PromptTuning, or an exported folder of one."""
    path = Path(path).expanduser()
    if path.is_file():
        if backbone is None:
            raise UserError(
                f"{path} holds no settings: give the folder of its backbone too (config.json), as backbone=..."
            )
        return read_release(path, backbone)
    if (path / SETTINGS).exists():
        return _read_exported(path)
    if (path / SOFT_PROMPT).exists():
        vectors = {name: read() for name, read in weights.read_file(path / SOFT_PROMPT)}
        return _soft_prompt(vectors, path / SOFT_PROMPT)
    if not path.exists():
        raise UserError(f"{path} is not there: name a training workdir, an exported folder, or a release's file.")
    config, model, _ = _read_workdir(path, backbone)
    if config["stage"] == "lm":
        raise UserError(
            f"{path} holds an LLM (stage lm), not a distiller: name the workdir of a pretrain or finetune run."
        )
    return model


# The release's layout


def read_release(path: str | Path, backbone: str | Path) -> Distiller:
    """The distiller of the public release's own .safetensors or .bin file (read as weights only, never as a pickle)."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".bin"):
        raise UserError(f"{path} is neither .safetensors nor .bin: give the release's file, or a folder.")
    folder = local_folder(backbone)
    config = from_hf_config(folder)
    own = {}

    def backbone_tensors():  # one after another: the file is open only while it is walked through
        for raw_name, read in weights.read_file(path):
            name = raw_name.removeprefix(HYPERNET)
            if name == raw_name:
                raise UserError(
                    f"{path} holds {raw_name}, which is no part of a distiller (its names start with {HYPERNET})."
                )
            if name == PLACEHOLDERS or name in PROJECTION.values():
                own[name] = np.asarray(read(), np.float32)
            else:
                yield name, read

    params = {"backbone": weights.from_tensors(backbone_tensors(), config, where=str(path))}
    params["placeholders"] = _take(own, PLACEHOLDERS, (None, config.width), path)
    if own:
        kernel = _take(own, PROJECTION["kernel"], (None, config.width), path).T
        bias = _take(own, PROJECTION["bias"], (kernel.shape[1],), path)
        params["projection"] = {"kernel": np.ascontiguousarray(kernel), "bias": bias}
    projection = "tanh" if "projection" in params else "identity"
    return _distiller(config, params, projection, load_tokenizer(folder))


def release_tensors(distiller: Distiller) -> dict[str, np.ndarray]:
    """The distiller's parameters under the release's names, in its order: placeholders, backbone, projection.

    Raises:
        UserError: a projection that the release does not have (its code adds tanh, and only where the widths differ).
    """
    if distiller.projection != resolve_projection("auto", distiller.config.width, distiller.llm_width):
        raise UserError(
            f'The release\'s layout has no "{distiller.projection}" projection from width {distiller.config.width} to '
            f"{distiller.llm_width}: it cannot hold this distiller."
        )
    params = distiller.params
    tensors = {HYPERNET + PLACEHOLDERS: np.asarray(params["placeholders"])}
    tensors |= weights.to_tensors(distiller.config, params["backbone"], HYPERNET)
    if "projection" in params:
        tensors[HYPERNET + PROJECTION["kernel"]] = np.asarray(params["projection"]["kernel"]).T
        tensors[HYPERNET + PROJECTION["bias"]] = np.asarray(params["projection"]["bias"])
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def write_release(distiller: Distiller, path: str | Path) -> None:
    """The release's own file; `path` ends in .safetensors, or in .bin (needs PyTorch)."""
    tensors, path = release_tensors(distiller), Path(path)
    if path.suffix == ".safetensors":
        weights.write_file(tensors, path, metadata=None)
        return
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs PyTorch to be written: pip install torch, or take the .safetensors.") from None
    content = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    try:
        torch.save(content, path)
    except RuntimeError as error:  # PyTorch's word for a disk that is full, among others
        raise OSError(errno.EIO, f"PyTorch: {str(error).splitlines()[0]}", str(path)) from error


# The exported folder


def write_folder(distiller: Distiller, folder: str | Path) -> None:
    """The distiller as a Hugging Face folder, without card and release files."""
    folder, params = Path(folder), distiller.params
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", to_hf_config(distiller.config) | {"architectures": ["GPT2Model"]})
    backbone = weights.to_tensors(distiller.config, params["backbone"], prefix="")
    weights.write_file(_contiguous(backbone), folder / "model.safetensors")
    tensors = {"placeholders": np.asarray(params["placeholders"])}
    if "projection" in params:
        tensors["projection.weight"] = np.asarray(params["projection"]["kernel"]).T
        tensors["projection.bias"] = np.asarray(params["projection"]["bias"])
    weights.write_file(_contiguous(tensors), folder / TENSORS)
    settings = {
        "num_vectors": distiller.num_vectors,
        "width": distiller.config.width,
        "llm_width": distiller.llm_width,
        "projection": distiller.projection,
        "separator": distiller.separator,
    }
    _write_json(folder / SETTINGS, settings)
    if distiller.tokenizer is not None:
        distiller.tokenizer.save_pretrained(folder)
    shutil.copyfile(Path(__file__).with_name("torch_module.py"), folder / MODULE)


def _read_exported(folder):
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        projection, llm_width, before = settings["projection"], int(settings["llm_width"]), settings["separator"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SETTINGS} cannot be read ({error}): export the distiller again.") from None
    if projection not in PROJECTIONS:
        raise UserError(
            f"{folder / SETTINGS} says projection={projection!r}: it must be one of {', '.join(PROJECTIONS)}."
        )
    config, where = from_hf_config(folder), folder / TENSORS
    own = {name: np.asarray(read(), np.float32) for name, read in weights.read_file(where)}
    params = {"backbone": weights.read_params(folder, config)}
    params["placeholders"] = _take(own, "placeholders", (None, config.width), where)
    if projection != "identity":
        kernel = _take(own, "projection.weight", (llm_width, config.width), where).T
        params["projection"] = {
            "kernel": np.ascontiguousarray(kernel),
            "bias": _take(own, "projection.bias", (llm_width,), where),
        }
    if own:
        raise UserError(f"{where} holds {sorted(own)[0]}, which a {projection} projection does not have.")
    return _distiller(config, params, projection, load_tokenizer(folder), before)


# The training workdir


def _read_workdir(workdir, backbone) -> tuple[dict, Any, dict]:
    """(the run's config, its Distiller, SoftPrompt or (stage "lm") tree of LLM params, the checkpoint's numbers)."""
    workdir = Path(workdir).expanduser()
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder: name a training workdir.")
    config = checkpoint.read_config(workdir)
    params, meta = checkpoint.load_best(workdir)
    if config["stage"] == "lm":
        return config, params, meta
    if config["prefix"]["kind"] == "soft_prompt":
        return config, _soft_prompt(params, workdir), meta
    folder = _source(config["prefix"]["backbone"], backbone, workdir)
    decoder = from_hf_config(folder)
    _check_backbone(params["backbone"], decoder, folder, workdir)
    # The run's widths are in the parameters; what "auto" was decided with is not: equal widths, no projection.
    llm_width = params["projection"]["kernel"].shape[1] if "projection" in params else decoder.width
    projection = resolve_projection(config["prefix"]["projection"], decoder.width, llm_width)
    model = _distiller(decoder, params, projection, load_tokenizer(folder), separator(config["data"]["template"]))
    return config, model, meta


def _check_backbone(params, config: DecoderConfig, folder, workdir) -> None:
    saved = checkpoint.shapes_of(params)
    wanted = checkpoint.shapes_of(jax.eval_shape(lambda: init_params(config, 0)))
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"{workdir} was trained with another backbone than {folder}: its parameter {name} is "
                f"{saved.get(name, 'absent')}, not {wanted.get(name, 'absent')}; give the backbone it was trained with."
            )


def _source(named: str, given, workdir) -> Path:
    """The folder that a run's config names (its backbone or LLM), or the one given in its place."""
    packaged = {small_world.NAME: "llm", f"{small_world.NAME}_backbone": "backbone"}
    try:
        return local_folder(given or (small_world.PACKAGED_MODELS / packaged[named] if named in packaged else named))
    except UserError as error:
        raise UserError(
            f"{workdir} was trained with {named}, which cannot be found: {error} Or give --backbone."
        ) from None


def _write(folder, workdir, config, model, meta, backbone) -> str:
    """Fills the new folder; returns a sentence on what it is."""
    card = folder / "README.md"
    if config["stage"] == "lm":
        source = _source(config["llm"]["path"], backbone, workdir)
        save_model(folder, from_hf_config(source), model, source)
        card.write_text(llm_card(config, meta, workdir))
        return "An LLM as a Hugging Face folder: AutoModelForCausalLM.from_pretrained reads it."
    if isinstance(model, SoftPrompt):
        weights.write_file(_contiguous(model.params), folder / SOFT_PROMPT)
        card.write_text(soft_prompt_card(config, meta, workdir, model))
        return f"A soft prompt: {model.num_vectors} vectors in {SOFT_PROMPT}."
    write_folder(model, folder)
    card.write_text(distiller_card(config, meta, workdir, model))
    return (
        f"A distiller as a Hugging Face folder, with {MODULE} for PyTorch. {_write_releases(model, folder / 'release')}"
    )


def _write_releases(distiller, folder) -> str:
    """The two files of the release's layout, as far as they can be written; returns a sentence on what was."""
    folder.mkdir()
    try:
        write_release(distiller, folder / "distiller.safetensors")
        write_release(distiller, folder / "distiller.bin")
    except UserError as error:
        if not any(folder.iterdir()):
            folder.rmdir()
        return str(error)
    return "The public release's layout is in release/."


# Small parts


def _distiller(config: DecoderConfig, params: Mapping, projection: str, tokenizer, before: str = " ") -> Distiller:
    llm_width = config.width if projection == "identity" else params["projection"]["kernel"].shape[1]
    params = jax.tree.map(jax.numpy.asarray, params)
    return Distiller(config, params, projection, llm_width, tokenizer, separator=before)


def _soft_prompt(params, where) -> SoftPrompt:
    vectors = np.asarray(_take(dict(params), "vectors", (None, None), where), np.float32)
    return SoftPrompt({"vectors": jax.numpy.asarray(vectors)})


def _take(tensors: dict, name: str, shape: tuple, where) -> np.ndarray:
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


def _contiguous(tensors: Mapping) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _write_json(path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(workdir: str, out: str, backbone: str = "") -> None:
    """The command."""
    print(export(workdir, out, backbone or None))


if __name__ == "__main__":
    from mend_jax.cli import run

    run(main)
