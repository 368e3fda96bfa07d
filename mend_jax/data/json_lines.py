"""Lines of JSON, the format of C4's and MetaICL's files."""

from mend_jax.cli.errors import UserError
from mend_jax.run.reading import Unreadable, described, parse_json

REMEDY = "correct or remove the line"


def parse_object(line: str, where: str, remedy: str = REMEDY) -> dict:
    """The JSON object of one line. Raises UserError for anything else; the message begins with `where` (file and line)."""
    try:
        return parse_json(line.rstrip(), dict)  # stripped, so that the error in a truncated line is at its end
    except Unreadable as error:
        raise UserError(f"{where} {error}: {remedy}.") from None


def text_field(row: dict, name: str, where: str) -> str:
    """The text in a field. Raises UserError, which begins with `where`, if there is none; it names what is there instead."""
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"{where} has no text in the field {name!r}{instead(value)}: {REMEDY}.")
    return value


def instead(value) -> str:
    """What stands in a text's place, and how to make it one: numbers and truth values only lack quotes."""
    if value is None:
        return ""
    quotes = f', which would be one in quotes, "{str(value).lower()}"' if isinstance(value, bool | int | float) else ""
    return f" but {described(value)}{quotes}"


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: half of a surrogate pair cannot, and no tokenizer reads it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
