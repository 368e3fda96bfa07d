"""Lines of JSON: what C4's and MetaICL's files are made of."""

import json

from mend_jax.cli.errors import UserError


def parse_object(line: str, where: str) -> dict:
    """The object of one line. Raises UserError, which begins with `where` (file and line), for anything else."""
    try:
        row = json.loads(line.rstrip())  # so that a line that ends too early is wrong at its end
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}): correct or remove the line."
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object, {{...}}: correct or remove the line.")
    return row
