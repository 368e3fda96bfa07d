"""Reading text and JSON that may be damaged or hostile: every reader of the program goes through here.

What is refused, each in one sentence with the file and the place in it: what is no regular file (a pipe would wait for ever),
bytes that are not UTF-8, a line or a file beyond all sense, JSON that is nested too deeply, whole numbers of hundreds of
digits, half characters (lone surrogates, which no tokenizer and no file can take). A byte order mark, as spreadsheets write
it, is passed over.
"""

import codecs
import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mend_jax.cli.errors import UserError

LONGEST_LINE = 1 << 26  # bytes
LARGEST = 1 << 29  # bytes of a file that is read whole
PACKED = ".gz"
DEEPEST = 64  # lists and objects within each other
MOST_DIGITS = 100  # of a whole number: a float holds it, and nobody counts so far
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Unreadable(ValueError):
    """Why a text is not the JSON that was wanted: "is not valid JSON (...)", to stand behind its name."""


def parse_json(text: str, shape: type | None = None) -> Any:
    """The value of a JSON text. Raises Unreadable for all that is not JSON, and for a value of another `shape` (dict, list)."""
    try:
        value = json.loads(text, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip("\n") else ""
        raise Unreadable(f"is not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except RecursionError:
        raise Unreadable(f"is nested too deep, more than {DEEPEST} levels") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise Unreadable(f"is nested too deep, more than {DEEPEST} levels")
    if _SURROGATE.search(text) and (half := _half_character(value)):
        raise Unreadable(f"holds half of a character ({half}, a lone surrogate)")
    if shape is not None and not isinstance(value, shape):
        raise Unreadable(
            f"is not a JSON object, {{...}}, but {described(value)}" if shape is dict else "is no JSON list"
        )
    return value


def read_json(path: str | Path, remedy: str, shape: type | None = dict) -> Any:
    """The value in a JSON file, by default an object. `remedy` is what to do about one that cannot be read, "copy it again".

    Raises UserError for anything else; FileNotFoundError where there is no such file.
    """
    try:
        return parse_json(read_text(path, remedy), shape)
    except Unreadable as error:
        raise UserError(f"{path} {error}: {remedy}.") from None


def read_text(path: str | Path, remedy: str) -> str:
    """The text of a file, as one; of FILE.gz, what is packed in it. Raises UserError as `read_json`, and FileNotFoundError."""
    require_regular(path, remedy)
    too_large = UserError(f"{path} has more than {LARGEST:,} bytes, too many to be what it should: {remedy}.")
    if Path(path).stat().st_size > LARGEST:
        raise too_large
    packed = Path(path).suffix == PACKED
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            content = file.read(LARGEST + 1)  # a small file may unpack to any size
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}.") from None
    if len(content) > LARGEST:
        raise too_large
    pieces = list(_decoded(content.splitlines(keepends=True), path, remedy))
    return "".join(pieces).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path, remedy: str) -> Iterator[tuple[str, str]]:
    """("FILE, line N", text) of each line of a file that is not blank. Raises UserError as `read_json`."""
    require_regular(path, remedy)
    try:
        with open(path, "rb") as file:
            yield from lines_of(file, path, remedy)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {remedy}.") from None


def lines_of(file: BinaryIO, path: str | Path, remedy: str) -> Iterator[tuple[str, str]]:
    """As `read_lines`, of a file that is open."""
    number = 0
    for text in _decoded(_bytes_of_lines(file, path, remedy), path, remedy):
        for line in text.rstrip("\r\n").replace("\r\n", "\n").replace("\r", "\n").split("\n"):
            number += 1
            if line.strip():
                yield f"{path}, line {number}", line


def require_path(given, call: str) -> None:
    """Raises UserError where a caller gives something else for a path or a name, such as an LLM; `call` shows how it is done."""
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"A path or a name is needed, not {type(given).__name__}: the order is {call}.")


def require_regular(path: str | Path, remedy: str) -> None:
    """Raises UserError where a path names no regular file, such as a pipe; FileNotFoundError where it names nothing."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        if Path(path).is_symlink():
            raise UserError(f"{path} is a link to a file that is not there: {remedy}.") from None
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): {remedy}.") from None
    if not stat.S_ISREG(mode):
        what = next((w for is_one, w in _KINDS if is_one(mode)), "something else")
        raise UserError(f"{path} is no regular file but {what}: {remedy}.")


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def is_inside(name: str) -> bool:
    """Whether a name from data, with or without slashes, is that of something below the folder that it is joined to."""
    return "\0" not in name and not any(part in ("", ".", "..") for part in name.split("/"))


def described(value: Any) -> str:
    """What a JSON value is, in words: "a whole number (3)"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, int):
        return f"a whole number ({value})"
    if isinstance(value, float):
        return f"a number ({value})"
    if isinstance(value, str):
        return f"a text ({value[:40]!r})"
    what, text = "an object" if isinstance(value, dict) else "a list", json.dumps(value, ensure_ascii=False)
    return f"{what} ({text})" if len(text) <= 40 else f"{what} of {len(value)}"


def _decoded(lines, path, remedy: str) -> Iterator[str]:
    """The texts of lines, each with its end. Raises UserError, with line and column, for bytes that are not UTF-8."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            column = len(line[: error.start].decode("utf-8")) + 1
            byte = line[error.start]
            raise UserError(
                f"{path} is not UTF-8 (line {number}, column {column}: the byte 0x{byte:02x}): save it as UTF-8, or"
                f" {remedy}."
            ) from None


def _bytes_of_lines(file: BinaryIO, path, remedy: str) -> Iterator[bytes]:
    number = 1
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MiB, too long for a line: {remedy}."
            )
        yield line
        number += 1


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise Unreadable(f"holds a number that is too long, of {len(text)} digits")
    return int(text)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [
        inner for v in level if isinstance(v, dict | list) for inner in (v.values() if isinstance(v, dict) else v)
    ]:
        depth += 1
    return depth


def _half_character(value: Any) -> str:
    """The first lone surrogate in a value's texts, as JSON writes it; "" if there is none."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            found = re.search("[\ud800-\udfff]", one)
            if found:
                return f"\\u{ord(found[0]):04x}"
        elif isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            left += one
    return ""
