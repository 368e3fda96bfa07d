"""Files of demonstrations: JSON lines with "input" and "output", as MetaICL's are, or in a FILE.json a list of such objects; files
of queries are read in the same way (packs/queries.py)."""

from collections.abc import Iterator
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.data.json_lines import instead, parse_object
from mend_jax.packs.pack import SUFFIX
from mend_jax.run.reading import Unreadable, described, parse_json, read_lines, read_text

FORM = '{"input": "a great film", "output": "positive"}'
ANOTHER = "name another file"
ENDINGS = (".jsonl", ".json")


def demonstration_files(given: str) -> list[Path]:
    """The files that a command line names: one, several with commas between, or all *.jsonl and *.json of a folder.

    Raises UserError for one that is not there, and for two that would get one name.
    """
    files: list[Path] = []
    for path in _named(given):
        found = sorted(f for end in ENDINGS for f in path.glob(f"*{end}")) if path.is_dir() else [path]
        if not found or not path.exists():
            what = "has no *.jsonl or *.json file" if path.is_dir() else "is not there"
            raise UserError(f"{path} {what}: name a file of demonstrations, several with commas, or a folder of them.")
        files += found
    if not files:
        raise UserError(f"--demos is empty: name a file of lines like {FORM}.")
    names = [pack_name(file) for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"Two files of demonstrations would be {twice}: rename one, or make them one after the other.")
    return files


def names_folder(given: str) -> bool:
    """Whether a command line names a folder, alone or among others."""
    return any(path.is_dir() for path in _named(given))


def _named(given: str) -> list[Path]:
    return [Path(part).expanduser() for part in map(str.strip, given.split(",")) if part]


def pack_name(file: Path) -> str:
    """The name of the pack of a file."""
    name = next((file.name.removesuffix(end) for end in ENDINGS if file.name.endswith(end)), file.name)
    return name + SUFFIX


def read_demonstrations(file: Path) -> list[tuple[str, str]]:
    """The (x, y) pairs of a file. Raises UserError, with file and line or item, for anything else, and if there are none."""
    pairs = [pair_of(row, where) for where, row in objects_of(file, FORM)]
    if not pairs:
        raise UserError(f"{file} has no demonstrations: write a line for each.")
    return pairs


def objects_of(file: Path, form: str) -> Iterator[tuple[str, dict]]:
    """("FILE, line N", object) of each line that is not blank or, of a list in a FILE.json, ("FILE, item N", object) of each item.

    Raises UserError, with that place, for anything else; `form` is an object as it should be.
    """
    try:
        text = read_text(file, ANOTHER) if file.suffix == ".json" else None
        if text is not None and text.lstrip().startswith("["):
            yield from _items(text, file, form)
            return
        each = f"write an object on each line, {form}"
        for number, (where, line) in enumerate(read_lines(file, ANOTHER) if text is None else _lines(text, file)):
            if number == 0 and text is None and line.lstrip().startswith("["):
                raise UserError(
                    f"{where} begins a JSON list, which belongs into a FILE.json: rename the file, or {each}."
                )
            yield where, parse_object(line, where, each)
    except FileNotFoundError:
        raise UserError(f"{file} is not there: {ANOTHER}.") from None


def _items(text: str, file: Path, form: str) -> Iterator[tuple[str, dict]]:
    try:
        rows = parse_json(text, list)
    except Unreadable as error:
        raise UserError(f"{file} {error}: correct it.") from None
    for number, row in enumerate(rows, 1):
        where = f"{file}, item {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where} of the list, is no object, {form}, but {described(row)}: correct or remove it.")
        yield where, row


def _lines(text: str, file: Path) -> Iterator[tuple[str, str]]:
    """As `read_lines`, of a file that is read: a FILE.json may hold lines too."""
    return ((f"{file}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def pair_of(row: dict, where: str) -> tuple[str, str]:
    """The (x, y) of an object. Raises UserError, which begins with `where`, if it has none."""
    for name in ("input", "output"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise UserError(
                f'{where} has no text "{name}"{instead(row.get(name) or None)}: a demonstration has "input" and "output".'
            )
    return row["input"], row["output"]
