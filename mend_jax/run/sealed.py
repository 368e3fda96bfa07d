"""Files that hold a checksum of themselves, and folders of one of their files: a changed bit in what the program wrote is noticed."""

import hashlib
import json
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.run.files import sha256_of, write_json
from mend_jax.run.reading import read_json

FIELD = "checksum"
LIST = "checksums.json"  # in a folder: {file: SHA-256}


def write_sealed(path: str | Path, content: dict, **options) -> None:
    """Writes or replaces a JSON file of an object, whole or not at all; `options` are those of `write_json`."""
    plain = json.loads(json.dumps(content))  # as it will be read: lists, and names that are texts
    write_json(path, {FIELD: checksum(plain), **plain}, **options)


def read_sealed(path: str | Path, remedy: str, only: bool = False) -> dict:
    """The object in a file of `write_sealed`, without its checksum. A file without one is believed, since an older version wrote
    it, but not if it shall be `only` such a file.

    Raises UserError for a file that cannot be read, or has changed since it was written; FileNotFoundError.
    """
    content = read_json(path, remedy)
    known = content.pop(FIELD, None)
    if known is None and only:
        raise UserError(f"{path} has no checksum: {remedy}.")
    if known is not None and known != checksum(content):
        raise UserError(
            f"{path} has changed since it was written: {remedy}, or, if you changed it yourself, take its"
            f' "{FIELD}" out.'
        )
    return content


def checksum(content) -> str:
    """16 hexadecimal digits of a JSON value."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def checksum_of_text(text: str) -> str:
    """16 hexadecimal digits of a file's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_checksums(folder: Path) -> None:
    """Writes LIST, of the files in a folder that decide what is read from it: settings, weights, vocabularies."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".txt", ".model"))
    write_json(folder / LIST, {file.name: sha256_of(file) for file in files})


def require_unchanged(folder: Path) -> None:
    """Raises UserError, which names the file, where one of a folder has changed since LIST was written, or is gone."""
    if not folder.is_dir():  # a GGUF file
        return
    try:
        known = read_json(folder / LIST, "write the folder again")
    except FileNotFoundError:  # of an older version, or of another program
        return
    for name, digest in known.items():
        file = folder / Path(name).name
        if not file.is_file() or sha256_of(file) != digest:
            what = "has changed since it was written" if file.is_file() else "is missing"
            raise UserError(
                f"{file} {what}: write the folder again, or, if you changed it yourself, delete {folder / LIST}."
            )
