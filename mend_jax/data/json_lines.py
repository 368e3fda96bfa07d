"""Lines of JSON, the format of C4's and MetaICL's files."""

import json

from mend_jax.cli.errors import UserError


def parse_object(line: str, where: str) -> dict:
    """The JSON object of one line. Raises UserError for anything else; the message begins with `where` (file and line)."""
    try:
        row = json.loads(line.rstrip())  # stripped, so that the error in a truncated line is at its end
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}): correct or remove the line."
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object, {{...}}: correct or remove the line.")
    return row
