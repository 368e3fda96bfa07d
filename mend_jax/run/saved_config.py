"""The config of a training's workdir: what the run was begun with, under a checksum."""

from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.run.sealed import read_sealed, write_sealed

CONFIG = "config.json"


def write_config(workdir, config):
    """Writes the resolved configuration to <workdir>/config.json."""
    content = config.to_dict() if hasattr(config, "to_dict") else config
    write_sealed(Path(workdir) / CONFIG, content, sort_keys=True)


def read_config(workdir):
    """The resolved configuration (nested dict) of a training workdir. Raises UserError if there is none."""
    path = Path(workdir) / CONFIG
    try:
        config = read_sealed(path, "restore it, or use another workdir")
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a training workdir: it has no {CONFIG}.") from None
    sections = ("llm", "prefix", "loss", "data", "train")
    if not isinstance(config.get("stage"), str) or not all(isinstance(config.get(name), dict) for name in sections):
        raise UserError(f"{path} is not the config of a training: name the workdir of one.")
    return config
