"""Reads trained models from wherever they are stored: a training workdir, an exported folder, the release's file
(prefixes/release.py). export.py writes the exported folder."""

import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from mend_jax.cli.errors import UserError
from mend_jax.data.bos import NONE, bos_token
from mend_jax.data.tokenize import fingerprint as text_fingerprint
from mend_jax.llm.decoder_only import LLM, load_llm
from mend_jax.models.families import Config, from_hf_config
from mend_jax.models.folders import init_params, load_tokenizer, local_folder
from mend_jax.prefixes import KINDS, Chunked, Distiller, Kind, release
from mend_jax.prefixes.distiller_folder import SETTINGS, read_settings
from mend_jax.run import checkpoint, saved_config, saved_steps
from mend_jax.run.best import is_finished
from mend_jax.run.files import sha256_of
from mend_jax.run.reading import require_path
from mend_jax.run.sealed import require_unchanged
from mend_jax.run.sharding import Place

RELEASED = (".safetensors", ".bin")  # files of the public release
CARRIED = Path(__file__).parents[1] / "distillers"  # exported folders in this package, named after the LLM they are for


def trained_path(path: str | Path) -> Path:
    """The file or folder that `path` names: a distiller of this package by the name of its LLM ("smollm2-135m-instruct"),
    unless there is such a folder here."""
    here = Path(path).expanduser()
    carried = CARRIED / here.name
    return carried if str(path) == here.name and not here.exists() and carried.is_dir() else here


def _missing(path) -> str:
    names = ", ".join(sorted(folder.name for folder in CARRIED.iterdir()))
    return f"{path} does not exist: name a training workdir, an exported folder, a release's file, or a distiller of this package ({names})."


def is_exported(path: str | Path) -> bool:
    """Whether `path` names an exported folder, or a distiller of this package."""
    return any(kind.is_in(trained_path(path)) for kind in KINDS.values())


class MethodSpec(NamedTuple):
    """What stands behind NAME= in evaluate.methods: [KIND:][firstN:]PATH."""

    kind: str  # which kind of prefix it is used as; "": as it was trained
    first: int  # of its vectors, the first so many alone; 0: all
    path: str


def method_spec(text: str) -> MethodSpec:
    """The parts of what stands behind NAME=."""
    kind, colon, rest = text.partition(":")
    kind, rest = (kind, rest) if colon and kind in KINDS else ("", text)
    cut = re.match(r"first(\d+):", rest)
    return MethodSpec(kind, int(cut[1]) if cut else 0, rest[cut.end() :] if cut else rest)


def load_distiller(path, llm, backbone=None) -> Distiller:
    """A trained distiller.

    Args:
        path: a training workdir, an exported folder, or the public release's own .safetensors / .bin file.
        llm: the LLM, from `load_llm`, that its vectors are for.
        backbone: the Hugging Face folder of its backbone (config.json and tokenizer): needed for the release's file, and
            for a workdir whose backbone has moved.
    Returns:
        A `Distiller` with float32 parameters; for a training workdir those of its best checkpoint.
    Raises:
        UserError: nothing there, a distiller of chunks (`load_prefix` reads it), a soft prompt or an LLM, files that are
            damaged, incomplete or of another model, a missing backbone, or a distiller whose vectors are not as wide as the
            LLM's embeddings.
    """
    return _distiller_alone(load_trained(path, llm, backbone), path)


def load_prefix(path, llm, backbone=None) -> Kind:
    """As `load_distiller`, for a prefix of any kind: a soft prompt and a distiller of chunks too. Its `distill` makes the
    vectors."""
    return load_trained(path, llm, backbone)


def load_trained(path, llm, backbone=None, place: Place | None = None) -> Kind:
    """As `load_distiller`, for every kind that is trained; `evaluate` uses it. `place` is as in `read_trained`."""
    require_path(path, call := "load_prefix(PATH, llm), llm = load_llm(...)")
    if isinstance(llm, str | os.PathLike):
        raise UserError(f"The LLM is only named, {str(llm)!r}, but it must be loaded: {call}.")
    return fit_to(read_trained(path, backbone, place), llm, path)


def fit_to(model: Kind, llm, path) -> Kind:
    """The model read from `path` as one whose vectors `llm` reads. Raises UserError if it was trained for another LLM."""
    model = model.read_by(llm)
    if model.llm_width != llm.config.width:
        raise UserError(
            f"The model in {path} makes vectors of width {model.llm_width}, but the LLM's width is {llm.config.width}: use the"
            " LLM that it was trained for."
        )
    if model.bos is not None and bos_token(model.bos, llm.tokenizer, llm.path) != llm.bos:
        raise UserError(
            f"What was trained in {path} stands {'behind' if llm.bos is None else 'without'} the LLM's BOS, which is not how this LLM reads: set"
            f' --config.data.bos={model.bos}, or load_llm(..., bos="{model.bos}").'
        )
    return model


def read_distiller(path: str | Path, backbone: str | Path | None = None) -> Distiller:
    """A distiller from wherever one is stored; the files determine its shapes.

    Args:
        path: a training workdir, an exported folder, or the public release's .safetensors or .bin file.
        backbone: the Hugging Face folder of its backbone (config.json, tokenizer): needed for the release's file, and
            for a workdir whose backbone has moved.
    Raises:
        UserError: nothing there, a soft prompt or an LLM, or files that are damaged, incomplete or of another model.
    """
    return _distiller_alone(read_trained(path, backbone), path)


def _distiller_alone(model: Kind, path) -> Distiller:
    if isinstance(model, Chunked):
        raise UserError(
            f"{path} holds {model.title}, which mend_jax.load_prefix reads: call it with the same arguments."
        )
    if not isinstance(model, Distiller):
        raise UserError(f"{path} holds {model.title}, not a distiller: name the workdir of a distiller.")
    return model


def read_trained(path: str | Path, backbone: str | Path | None = None, place: Place | None = None) -> Kind:
    """As `read_distiller`, for every kind that is trained.

    With `place` (sharding.py), the parameters of a workdir and the backbone of an exported folder are read shard by shard
    to the devices that it gives.
    """
    path = trained_path(path)
    if path.is_file():
        if path.suffix not in RELEASED:
            raise UserError(
                f"{path} is neither .safetensors nor .bin: name a folder; if it is an archive of one, unpack it."
            )
        if backbone is None:
            raise UserError(
                f"{path} holds no settings: read it with mend_jax.load_distiller(..., backbone=FOLDER), the folder of its "
                "backbone (config.json); commands read what `python -m mend_jax.export` makes of it with --backbone=FOLDER."
            )
        return read_release(path, backbone)
    for kind in KINDS.values():
        if kind.is_in(path):
            require_unchanged(path)
            return kind.from_folder(path, place)
    if not path.exists():
        raise UserError(_missing(path))
    config, model, _ = read_workdir(path, backbone, place)
    if config["stage"] == "lm":
        raise UserError(
            f"{path} holds an LLM (stage lm), not a distiller: name the workdir of a pretrain or finetune run."
        )
    return model


def read_release(path: str | Path, backbone: str | Path) -> Distiller:
    """The distiller of the public release's own .safetensors or .bin file (read as weights only, never as a pickle)."""
    path = Path(path)
    if path.suffix not in RELEASED:
        raise UserError(f"{path} is neither .safetensors nor .bin: give the release's file, or a folder.")
    folder = local_folder(backbone)
    config = from_hf_config(folder)
    params = release.read_params(path, config)
    projection = "tanh" if "projection" in params else "identity"
    return Distiller.of(config, params, projection, load_tokenizer(folder))


def read_workdir(workdir, backbone, place: Place | None = None) -> tuple[dict, Any, dict]:
    """(the run's config, the trained `Kind` or (stage "lm") tree of LLM params, the checkpoint's metadata).

    `place` is as in `read_trained`.
    """
    workdir = Path(workdir).expanduser()
    if not workdir.is_dir():
        raise UserError(
            f"{workdir} is not a folder: name a training workdir." if workdir.exists() else _missing(workdir)
        )
    config = saved_config.read_config(workdir)
    params, meta = checkpoint.load_best(workdir, place)
    _warn_if_unfinished(config, workdir, meta)
    if config["stage"] == "lm":
        return config, params, meta
    kind, named = KINDS[config["prefix"]["kind"]], ConfigDict(config)
    folder = source_folder(kind.backbone(named), backbone, workdir) if kind.backbone(named) else None
    params = kind.restored(config, params, folder, place)
    own = kind.backbone_params(params)
    if folder is not None and own is not None:
        check_backbone_params(own, kind.reader_settings(config, from_hf_config(folder)), folder, workdir)
    return config, kind.from_run(config, params, folder), meta


def own_llm(path: str | Path) -> str | None:
    """The LLM that a training workdir was for, as its config names it, or that an exported distiller names; None if it does not.

    Raises UserError if there is no such path, or a folder of something else.
    """
    path = trained_path(path)
    if not path.exists():
        raise UserError(_missing(path))
    if (path / saved_steps.FOLDER).is_dir():
        return saved_config.read_config(path)["llm"]["path"]
    if path.is_dir() and not is_exported(path):
        below = (sorted(path.glob(f"{part}finetune/{saved_steps.FOLDER}")) for part in ("", "*/"))
        inside = next((found.parent for part in below for found in part), None)
        hint = f"is it {inside}?" if inside else "name a training workdir or an exported folder."
        raise UserError(f"{path} holds no trained model: {hint}")
    named = read_settings(path).get("llm") if (path / SETTINGS).is_file() else None
    return named if isinstance(named, str) else None


def llm_for(path: str | Path, llm: str = "") -> str:
    """The LLM that is named or, where none is, the one that the distiller in `path` ("": there is none) was trained for.

    Raises UserError if neither says one.
    """
    named = llm or (own_llm(path) if path else None)
    if not named:
        which = f"{path} does not say which LLM it is for" if path else "There is no LLM"
        raise UserError(f"{which}: add --llm=FOLDER, a hub name or a GGUF file.")
    return named


def load_both(path, llm: str, dtype: str = "float32", weights: str = "full", vectors: int = 0) -> tuple[LLM, Kind]:
    """(the LLM, what was trained for it in `path`), on the device, both in the arithmetic of `dtype`.

    The LLM reads behind its BOS if it did so in training. `vectors`: the first so many alone; 0: all. `llm` and `weights` are as
    in `load_llm`. Raises UserError as `load_prefix` and `load_llm`.
    """
    model = read_trained(path)
    model = model.first(vectors) if vectors else model
    loaded = load_llm(llm, dtype, weights=weights, bos=model.bos or NONE)
    return loaded, fit_to(model, loaded, path).placed(jax.device_put, dtype)


def trained_fingerprint(path: str | Path) -> str:
    """16 hexadecimal digits that change with anything that decides what `load_prefix` reads from a workdir, folder or file."""
    path = trained_path(path)
    if (path / saved_steps.FOLDER).is_dir():
        steps = [
            file
            for step in saved_steps.whole_steps(path)
            for name in (saved_steps.CHECKSUMS, saved_steps.SCORE)
            if (file := saved_steps.step_folder(path, step) / name).exists()
        ]
        return text_fingerprint((path / saved_config.CONFIG).read_bytes(), *(file.read_bytes() for file in steps))
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.glob("*") if file.suffix in (".json", ".safetensors"))
    )
    if not files:
        raise UserError(f"{path} holds no trained model: name a training workdir or an exported folder.")
    return text_fingerprint(*(part for file in files for part in (file.name, bytes.fromhex(sha256_of(file)))))


def _warn_if_unfinished(config: dict, workdir, meta: dict) -> None:
    newest = saved_steps.whole_steps(workdir)[-1]
    try:
        finished = is_finished(ConfigDict(config), workdir, newest)
    except UserError as error:  # it is no part of what is read
        logging.warning("Whether the training in %s has ended is not known: %s", workdir, error)
        return
    if not finished:
        logging.warning(
            "The training in %s has not ended (step %d of %d): its best checkpoint so far, of step %d, is taken.",
            workdir,
            newest,
            config["train"]["steps"],
            meta["step"],
        )


def lm_settings(config, folder) -> Config:
    """The settings of the LLM that a run of stage "lm" trains; it may have fewer or more layers than the LLM in `folder`."""
    settings = from_hf_config(folder)
    return dataclasses.replace(settings, layers=config["llm"].get("layers") or settings.layers)


def check_backbone_params(params, config: Config, folder, workdir) -> None:
    """Raises UserError, which names the first parameter that differs, if `params` do not belong to `config`'s model."""
    saved = checkpoint.shapes_of(params)
    wanted = checkpoint.shapes_of(jax.eval_shape(lambda: init_params(config, 0)))
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"{workdir} was trained with another model than {folder}: its parameter {name} is "
                f"{saved.get(name, 'absent')}, not {wanted.get(name, 'absent')}; give the model it was trained with."
            )


def source_folder(named: str, given, workdir) -> Path:
    """The folder that a run's config names (its backbone or LLM), or `given` instead. Raises UserError if it cannot be read."""
    try:
        return local_folder(given or named)
    except UserError as error:
        raise UserError(
            f"{workdir} was trained with {named}, which cannot be read ({error}): put it back there, or run `python -m "
            "mend_jax.export` with --backbone=FOLDER and use the exported folder."
        ) from None
