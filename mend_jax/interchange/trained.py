"""What was trained, read back from any place it is kept in: a training workdir, an exported folder, the release's file.

The names in the release's file are GPT2Model's behind `hypernet.`, with `hypernet.init_prompt_weight` (l, width) and,
where the widths differ, `hypernet.adap_pooler.dense.{weight,bias}`, a Linear that is followed by tanh. export.py writes
that file and the exported folder.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data.tokenize import separator
from mend_jax.models import weights
from mend_jax.models.families import Config, from_hf_config
from mend_jax.models.folders import init_params, load_tokenizer, local_folder, read_weights
from mend_jax.prefixes.prefix import PROJECTIONS, Distiller, SoftPrompt, resolve_projection
from mend_jax.run import checkpoint
from mend_jax.run.sharding import Place

SETTINGS = "distiller_config.json"
TENSORS = "distiller.safetensors"
SOFT_PROMPT = "soft_prompt.safetensors"
HYPERNET = "hypernet."
PLACEHOLDERS = "init_prompt_weight"
PROJECTION = {"kernel": "adap_pooler.dense.weight", "bias": "adap_pooler.dense.bias"}


def load_distiller(path, llm, backbone=None) -> Distiller:
    """A trained distiller.

    Args:
        path: a training workdir, an exported folder, or the public release's own .safetensors / .bin file.
        llm: the LLM its vectors are for, of `load_llm`.
        backbone: the Hugging Face folder of its backbone (config.json and tokenizer): needed for the release's file, and
            for a workdir whose backbone has moved.
    Returns:
        A `Distiller` with float32 parameters; of a training workdir those of its best checkpoint.
    Raises:
        UserError: nothing there, a soft prompt or an LLM, files that are damaged, incomplete or of another model, no
            backbone where one is needed, or a distiller whose vectors are not as wide as the LLM's embeddings.
    """
    return _distiller_alone(load_trained(path, llm, backbone), path)


def load_trained(path, llm, backbone=None, place: Place | None = None) -> Distiller | SoftPrompt:
    """As `load_distiller`, and soft prompts too: what `evaluate` reads. `place` as in `read_trained`."""
    model = read_trained(path, backbone, place)
    if model.llm_width != llm.config.width:
        raise UserError(
            f"What was trained in {path} makes vectors of width {model.llm_width}, the LLM reads {llm.config.width}: take the"
            " LLM it was trained for."
        )
    return model


def read_distiller(path: str | Path, backbone: str | Path | None = None) -> Distiller:
    """A distiller from any place one is kept in; it learns its shape from the files.

    Args:
        path: a training workdir, an exported folder, or the public release's .safetensors or .bin file.
        backbone: the Hugging Face folder of its backbone (config.json, tokenizer): needed for the release's file, and
            for a workdir whose backbone has moved.
    Raises:
        UserError: nothing there, a soft prompt or an LLM, or files that are damaged, incomplete or of another model.
    """
    return _distiller_alone(read_trained(path, backbone), path)


def _distiller_alone(model: Distiller | SoftPrompt, path) -> Distiller:
    if isinstance(model, SoftPrompt):
        raise UserError(f"{path} holds a soft prompt, which reads no demonstrations: name the workdir of a distiller.")
    return model


def read_trained(
    path: str | Path, backbone: str | Path | None = None, place: Place | None = None
) -> Distiller | SoftPrompt:
    """As `read_distiller`, and soft prompts too: a workdir of PromptTuning, or an exported folder of one.

    With `place` (sharding.py) the parameters of a workdir and the backbone of an exported folder are read in parts to
    where it says.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if backbone is None:
            raise UserError(
                f"{path} holds no settings: read it with mend_jax.load_distiller(..., backbone=FOLDER), the folder of its "
                "backbone (config.json)."
            )
        return read_release(path, backbone)
    if (path / SETTINGS).exists():
        return _read_exported(path, place)
    if (path / SOFT_PROMPT).exists():
        vectors = {name: tensor[:] for name, tensor in weights.read_file(path / SOFT_PROMPT)}
        return _soft_prompt(vectors, path / SOFT_PROMPT)
    if not path.exists():
        raise UserError(f"{path} is not there: name a training workdir, an exported folder, or a release's file.")
    config, model, _ = read_workdir(path, backbone, place)
    if config["stage"] == "lm":
        raise UserError(
            f"{path} holds an LLM (stage lm), not a distiller: name the workdir of a pretrain or finetune run."
        )
    return model


def read_release(path: str | Path, backbone: str | Path) -> Distiller:
    """The distiller of the public release's own .safetensors or .bin file (read as weights only, never as a pickle)."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".bin"):
        raise UserError(f"{path} is neither .safetensors nor .bin: give the release's file, or a folder.")
    folder = local_folder(backbone)
    config = from_hf_config(folder)
    own = {}

    def backbone_tensors():  # one after another: the file is open only while it is walked through
        for raw_name, tensor in weights.read_file(path):
            name = raw_name.removeprefix(HYPERNET)
            if name == raw_name:
                raise UserError(
                    f"{path} holds {raw_name}, which is no part of a distiller (its names start with {HYPERNET})."
                )
            if name == PLACEHOLDERS or name in PROJECTION.values():
                own[name] = np.asarray(tensor[:], np.float32)
            else:
                yield name, tensor

    params = {"backbone": weights.from_tensors(backbone_tensors(), config, where=str(path))}
    params["placeholders"] = _take(own, PLACEHOLDERS, (None, config.width), path)
    if own:
        kernel = _take(own, PROJECTION["kernel"], (None, config.width), path).T
        bias = _take(own, PROJECTION["bias"], (kernel.shape[1],), path)
        params["projection"] = {"kernel": np.ascontiguousarray(kernel), "bias": bias}
    projection = "tanh" if "projection" in params else "identity"
    return _distiller(config, params, projection, load_tokenizer(folder))


def _read_exported(folder, place=None):
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
    own = {name: np.asarray(tensor[:], np.float32) for name, tensor in weights.read_file(where)}
    params = {"backbone": read_weights(folder, config, place=place)}
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


def read_workdir(workdir, backbone, place: Place | None = None) -> tuple[dict, Any, dict]:
    """(the run's config, its Distiller, SoftPrompt or (stage "lm") tree of LLM params, the checkpoint's numbers).

    `place` as in `read_trained`.
    """
    workdir = Path(workdir).expanduser()
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder: name a training workdir.")
    config = checkpoint.read_config(workdir)
    params, meta = checkpoint.load_best(workdir, place)
    if config["stage"] == "lm":
        return config, params, meta
    if config["prefix"]["kind"] == "soft_prompt":
        return config, _soft_prompt(params, workdir), meta
    folder = source_folder(config["prefix"]["backbone"], backbone, workdir)
    decoder = from_hf_config(folder).headless
    check_backbone(params["backbone"], decoder, folder, workdir)
    # The run's widths are in the parameters; what "auto" was decided with is not: equal widths, no projection.
    llm_width = params["projection"]["kernel"].shape[1] if "projection" in params else decoder.width
    projection = resolve_projection(config["prefix"]["projection"], decoder.width, llm_width)
    model = _distiller(decoder, params, projection, load_tokenizer(folder), separator(config["data"]["template"]))
    return config, model, meta


def lm_settings(config, folder) -> Config:
    """The settings of the LLM that a run of stage "lm" trains, which may have fewer or more layers than `folder`'s."""
    settings = from_hf_config(folder)
    return dataclasses.replace(settings, layers=config["llm"].get("layers") or settings.layers)


def check_backbone(params, config: Config, folder, workdir) -> None:
    """Raises UserError, naming the first parameter that differs, where `params` are not those of `config`'s model."""
    saved = checkpoint.shapes_of(params)
    wanted = checkpoint.shapes_of(jax.eval_shape(lambda: init_params(config, 0)))
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"{workdir} was trained with another model than {folder}: its parameter {name} is "
                f"{saved.get(name, 'absent')}, not {wanted.get(name, 'absent')}; give the one it was trained with."
            )


def source_folder(named: str, given, workdir) -> Path:
    """The folder that a run's config names (its backbone or LLM), or the one given in its place. Raises UserError."""
    try:
        return local_folder(given or named)
    except UserError as error:
        raise UserError(
            f"{workdir} was trained with {named}, which cannot be read ({error}): put it back there, or run `python -m "
            "mend_jax.export` with --backbone=FOLDER and use what it writes."
        ) from None


def _distiller(config: Config, params: Mapping, projection: str, tokenizer, before: str = " ") -> Distiller:
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
