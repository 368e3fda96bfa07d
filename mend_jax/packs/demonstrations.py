"""Files of demonstrations: JSON lines with "input" and "output", as MetaICL's are, or in a FILE.json a list of such objects."""

from collections.abc import Iterator
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.data.json_lines import instead, parse_object
from mend_jax.packs.pack import SUFFIX
from mend_jax.run.reading import described, read_json, read_lines, read_text

FORM = 'write an object on each line, {"input": "a great film", "output": "positive"}'
ANOTHER = "name another file"
ENDINGS = (".jsonl", ".json")


def demonstration_files(given: str) -> list[Path]:
    """The files that a command line names: one, several with commas between, or all *.jsonl of a folder.

    Raises UserError for one that is not there, and for two that would get one name.
    """
    files: list[Path] = []
    for part in filter(None, map(str.strip, given.split(","))):
        path = Path(part).expanduser()
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not path.exists():
            what = "has no *.jsonl file" if path.is_dir() else "is not there"
            raise UserError(f"{path} {what}: name a file of demonstrations, several with commas, or a folder of them.")
        files += found
    if not files:
        raise UserError('--demos is empty: name a file of lines like {"input": "a great film", "output": "positive"}.')
    names = [pack_name(file) for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"Two files of demonstrations would be {twice}: rename one, or make them one after the other.")
    return files


def pack_name(file: Path) -> str:
    """The name of the pack of a file."""
    name = next((file.name.removesuffix(end) for end in ENDINGS if file.name.endswith(end)), file.name)
    return name + SUFFIX


def read_demonstrations(file: Path) -> list[tuple[str, str]]:
    """The (x, y) pairs of a file. Raises UserError, with file and line, for anything else, and if there are none."""
    pairs = list(_pairs(file))
    if not pairs:
        raise UserError(f"{file} has no demonstrations: write a line for each.")
    return pairs


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    if file.suffix == ".json" and file.is_file() and read_text(file, ANOTHER).lstrip().startswith("["):
        for number, row in enumerate(read_json(file, "correct it", list), 1):
            where = f"{file}, item {number} of the list,"
            if not isinstance(row, dict):
                raise UserError(
                    f'{where} is no object {{"input": "a great film", "output": "positive"}} but {described(row)}: correct or remove it.'
                )
            yield pair_of(row, where)
        return
    for where, line in lines_of(file):
        yield pair_of(parse_object(line, where, FORM), where)


def lines_of(file: Path) -> Iterator[tuple[str, str]]:
    """("FILE, line N", text) of each line that is not blank. Raises UserError for a file that is no UTF-8 text."""
    try:
        yield from read_lines(file, ANOTHER)
    except FileNotFoundError:
        raise UserError(f"{file} is not there: {ANOTHER}.") from None


def pair_of(row: dict, where: str) -> tuple[str, str]:
    """The (x, y) of a line's object. Raises UserError, which begins with `where`, if it has none."""
    for name in ("input", "output"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise UserError(
                f'{where} has no text "{name}"{instead(row.get(name) or None)}: a demonstration has "input" and "output".'
            )
    return row["input"], row["output"]
