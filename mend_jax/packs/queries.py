"""Files of queries: JSON lines with "input" and, where one of several answers is to be chosen, "options"; or in a FILE.json a list
of such objects."""

import json
import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

from mend_jax.cli.errors import UserError
from mend_jax.data.json_lines import instead
from mend_jax.data.query import query_tokens
from mend_jax.data.templates import Template
from mend_jax.packs.demonstrations import objects_of
from mend_jax.run.files import write_text

FORM = '{"input": "a great film"}'


def read_queries(file: str | Path) -> list[tuple[str, dict]]:
    """("FILE, line N" or "FILE, item N", object) of each query of a file, which has a text "input". Raises UserError, with that place,
    for anything else."""
    found = []
    for where, row in objects_of(Path(file).expanduser(), FORM):
        if not isinstance(row.get("input"), str) or not row["input"].strip():
            raise UserError(f'{where} has no text "input"{instead(row.get("input") or None)}: a query has one.')
        found.append((where, row))
    if not found:
        raise UserError(f"{file} has no queries: write a line for each.")
    return found


def options_of(where: str, row: dict, default: str) -> list[str]:
    """The options of a query, its own or the `default`, with commas between.

    Raises UserError, with its place, if there are none, or if the default is a single one: commas may have been forgotten.
    """
    options = row.get("options") or [word for word in map(str.strip, default.split(",")) if word]
    other = next((o for o in options if not isinstance(o, str)), None) if isinstance(options, list) else None
    if other is not None:
        raise UserError(f'{where} has no text in its "options"{instead(other)}: correct it.')
    if not isinstance(options, list) or not options or not all(isinstance(o, str) and o.strip() for o in options):
        raise UserError(
            f'{where} has no options: give --options=good,bad or, in a file of queries, the list "options" of each.'
        )
    once = list(dict.fromkeys(options))
    if len(once) == 1 and not row.get("options"):
        raise UserError(
            f"--options={default} is one answer, which leaves nothing to choose: give several, with commas between."
        )
    if len(once) < len(options):
        logging.warning("%s lists an option more than once: it counts once, where it stands first.", where)
    return once


def query_item(llm, template: Template, x: str, options: Sequence[str]) -> SimpleNamespace:
    """A query as `score_items` takes it. Raises UserError for texts that make no tokens."""
    return SimpleNamespace(
        x_tokens=query_tokens(llm, x, "query", template.query),
        options_tokens=[query_tokens(llm, option, "option", template.output) for option in options],
    )


def require_writable(file: str | Path) -> None:
    """Raises UserError where `write_answers` could write no file, so that it is known before the answers are computed."""
    target = Path(file).expanduser()
    if target.is_dir():
        raise UserError(f"{target} is a folder: give another --out, a file.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): give another --out.") from None


def write_answers(file: str | Path, rows: Iterable[dict]) -> None:
    """Writes a line for each answer, the file whole or not at all. Raises UserError where it cannot be written."""
    target = Path(file).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): give another --out.") from None
