"""Lines of JSON, the format of C4's and MetaICL's files."""

import json
import re

from mend_jax.cli.errors import UserError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of half of a character


def parse_object(line: str, where: str) -> dict:
    """The JSON object of one line. Raises UserError for anything else; the message begins with `where` (file and line)."""
    try:
        row = json.loads(line.rstrip())  # stripped, so that the error in a truncated line is at its end
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}): correct or remove the line."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a depth of thousands
        reason = "nested too deep" if isinstance(error, RecursionError) else "a number is too long"
        raise UserError(f"{where} cannot be read ({reason}): correct or remove the line.") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object, {{...}}: correct or remove the line.")
    if SURROGATE.search(line) and not is_text(json.dumps(row, ensure_ascii=False)):
        raise UserError(f"{where} holds half of a character (an escape such as \\ud800): correct or remove the line.")
    return row


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: half of a surrogate pair cannot, and no tokenizer reads it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
