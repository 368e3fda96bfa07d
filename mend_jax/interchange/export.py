"""Exports a trained model as files that need nothing from this project (listed in mend_jax/export.py). trained.py reads them."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.interchange.model_card import again_card, llm_card, prefix_card
from mend_jax.interchange.trained import (
    check_backbone_params,
    is_exported,
    lm_settings,
    own_llm,
    read_trained,
    read_workdir,
    source_folder,
    trained_path,
)
from mend_jax.models.families import EncoderDecoderConfig
from mend_jax.models.folders import convert_model, save_model, settings_here
from mend_jax.prefixes import Kind
from mend_jax.run.files import whole_folder, write_text
from mend_jax.run.sealed import write_checksums


def export(
    workdir: str | Path, out: str | Path, backbone: str | Path | None = None, weights: str = "float32", llm: str = ""
) -> str:
    """Writes the model trained in `workdir` to the new folder `out`, completely or not at all; returns a sentence about it.

    Args:
        workdir: a workdir of mend_jax.train, of any stage; its best checkpoint is exported. Or an exported folder, a distiller of
            this package, or the release's file: written again, in other weights or with the name of its LLM.
        out: a folder that does not exist or is empty.
        backbone: the Hugging Face folder of the distiller's backbone (stage "lm": of the LLM), if it has moved; the
            release's file needs it.
        weights: of a distiller's backbone: "float32", "bfloat16", or "int8".
        llm: a name under which others have the LLM, such as "gpt2-large", in the place of the path that this run read it from.
    Raises:
        UserError: no such workdir, no complete checkpoint, a missing backbone, an `out` with content, a full disk.
    """
    out, path = new_folder(out), trained_path(workdir)
    if path.is_file() or is_exported(path):
        return _export_again(path, out, backbone, weights, llm)
    config, model, meta = read_workdir(workdir, backbone)
    with written(out) as folder:
        sentence = _write(folder, workdir, config, model, meta, backbone, weights, llm)
    return f"{sentence} Step {meta['step']} of {workdir} is in {out}."


def _export_again(path: Path, out: Path, backbone, weights: str, llm: str) -> str:
    """`export` of an exported folder, or of the release's file."""
    if backbone and path.is_dir():
        raise UserError(f"{path} holds its backbone: --backbone={backbone} is for training workdirs, leave it out.")
    model, llm = read_trained(path, backbone), llm or own_llm(path) or ""
    with written(out) as folder:
        sentence = _write_prefix(folder, model, weights, llm)
        write_text(folder / "README.md", again_card(path, model, llm, _encoder_decoder(llm)))
    return f"{sentence} What {path} holds is in {out}."


def export_llm(llm: str | Path, out: str | Path) -> str:
    """Writes the model of a GGUF file to the new folder `out` as a Hugging Face folder, whole or not at all; returns a
    sentence on it.

    Raises:
        UserError: a file that cannot be read, a full `out`, a full disk.
    """
    out = new_folder(out)
    with written(out) as folder:
        convert_model(llm, folder)
    return f"{llm} is in {out} as a Hugging Face folder: AutoModelForCausalLM.from_pretrained reads it."


def new_folder(out: str | Path) -> Path:
    """The absolute path of a folder to write. Raises UserError if it is there already and has content."""
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: name another folder.")
    return out


@contextlib.contextmanager
def written(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end of the block. Raises UserError where it cannot be written."""
    try:
        with whole_folder(out) as folder:
            yield folder
            write_checksums(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{out} was written by another command in the meantime: name another folder.") from error
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}): free some space, or name another folder."
        ) from error


def _write(folder, workdir, config, model, meta, backbone, weights, llm) -> str:
    """Fills the new folder; returns a sentence about it."""
    card = folder / "README.md"
    if config["stage"] == "lm":
        if weights != "float32" or llm:
            raise UserError(f"{workdir} holds an LLM: --weights and --llm are for distillers, leave them out.")
        source = source_folder(config["llm"]["path"], backbone, workdir)
        settings = lm_settings(config, source)
        check_backbone_params(model, settings, source, workdir)
        save_model(folder, settings, model, source)
        card.write_text(llm_card(config, meta, workdir))
        return "An LLM as a Hugging Face folder: AutoModelForCausalLM.from_pretrained reads it."
    sentence, encoder_decoder = _write_prefix(folder, model, weights, llm), _encoder_decoder(config["llm"]["path"])
    if llm:
        config = {**config, "llm": {**config["llm"], "path": llm}}
    card.write_text(prefix_card(config, meta, workdir, model, encoder_decoder))
    return sentence


def _write_prefix(folder: Path, model: Kind, weights: str, llm: str) -> str:
    """Writes all but the card; returns a sentence about it."""
    return f"{model.write(folder, weights, llm)} {model.write_release(folder / 'release')}".strip()


def _encoder_decoder(llm: str) -> bool | None:
    """Whether the LLM is one; None: this machine does not have it."""
    known = settings_here(llm) if llm else None
    return None if known is None else isinstance(known, EncoderDecoderConfig)
