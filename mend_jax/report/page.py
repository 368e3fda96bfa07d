"""The report's files: one page that needs no others, the same as Markdown, every figure as PNG, all data as CSV,
every config."""

import csv
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.cli.text import in_markdown, markdown, shown
from mend_jax.report.drawing import Drawing
from mend_jax.report.sections import Section
from mend_jax.report.table import Table
from mend_jax.run.files import whole_folder, write_text
from mend_jax.run.reading import is_inside

PAGE, MARKDOWN, FIGURES, DATA = "index.html", "report.md", "figures", "data"
FOOT = (
    "Intervals are 95%, for these tasks: test items, sets of demonstrations (seeds) and, where there are several, trainings are"
    " drawn anew. A difference is to the row that is named; p is of a test that exchanges the answers to an item, two-sided. p asks"
    " whether these trainings with these demonstrations would differ on other items; the interval also asks about other seeds and"
    " trainings, so it may hold 0 where p is small. “Of them sure” counts tasks, won : lost, whose p is below 0.05 after Holm's"
    " correction over tasks. “Smallest visible” is the difference that so many items show in four cases of five. The most frequent"
    " label and the random option read nothing. ± is the standard deviation over seeds, as in the paper. All scores x 100."
    " docs/statistics.md says how each number is made."
)


def write_report(folder: Path, title: str, notes: Sequence[str], sections: Sequence[Section]) -> None:
    """Writes the report's folder, complete or not at all; an earlier report in it is replaced.

    Raises UserError for a name from a result that no file in the folder can have.
    """
    _require_names(part.name for section in sections for part in (*section.drawings, *section.tables))
    _require_names(section.config_name for section in sections)
    shutil.rmtree(_beside(folder), ignore_errors=True)
    with whole_folder(_beside(folder), sync=False) as new:
        for name in (FIGURES, DATA):
            (new / name).mkdir()
        for section in sections:
            for drawing in section.drawings:
                (new / FIGURES / f"{drawing.name}.png").write_bytes(drawing.png())
            for part in (*section.drawings, *section.tables):
                (new / DATA / f"{part.name}.csv").write_text(as_csv(part), encoding="utf-8")
            if section.config:
                text = json.dumps(section.config, indent=1, sort_keys=True)
                (new / DATA / f"{section.config_name}.json").write_text(text + "\n", encoding="utf-8")
        write_text(new / PAGE, as_html(title, notes, sections))
        write_text(new / MARKDOWN, as_markdown(title, notes, sections))
    _replace(folder)


def as_html(title: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The page, with its figures inside."""
    from jinja2 import Environment

    visible = lambda value: shown(value, keep="\n") if type(value) is str else value  # noqa: E731  (not Markup: the figures)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=visible).from_string(
        resources.files("mend_jax.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    svg = {drawing.name: _unique(drawing) for section in sections for drawing in section.drawings}
    return template.render(title=title, notes=notes, sections=sections, svg=svg, foot=FOOT)


def as_markdown(title: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The same as Markdown, with links to the figures and, of folded tables, to their data."""
    parts = [f"# {title}", *map(in_markdown, notes)]
    for section in sections:
        parts.append(f"## {in_markdown(section.title + (f' ({section.paper})' if section.paper else ''))}")
        parts += section.notes
        for drawing in section.drawings:
            caption = in_markdown(drawing.caption)
            parts.append(f"![{caption}]({FIGURES}/{drawing.name}.png)\n\n{caption} [Data]({DATA}/{drawing.name}.csv).")
        for table in section.tables:
            parts += _table_as_markdown(table)
        facts = [f"- {name}: `{shown(value).replace('`', ' ')}`" for name, value in section.made]
        if section.config:
            file = f"{DATA}/{section.config_name}.json"
            facts.append(f"- config: [{file}]({file})")
        parts += ["\n".join(facts)] if facts else []
    return shown("\n\n".join([*parts, FOOT]), keep="\n") + "\n"


def as_csv(part: Table | Drawing) -> str:
    """The data of a table or a figure."""
    header, rows = (
        (part.data_header, part.data_rows) if isinstance(part, Table) else (part.header, part.rows)
    )  # texts of a table are for people
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _table_as_markdown(table: Table) -> list[str]:
    title, note = in_markdown(table.title), in_markdown(table.note)
    if table.folded:
        return [f"{title}: [{DATA}/{table.name}.csv]({DATA}/{table.name}.csv). {note}".rstrip()]
    rows = [[in_markdown(cell) for cell in row] for row in (table.header, *table.rows)]
    return [f"### {title}", markdown(rows[0], rows[1:]), *([note] if note else [])]


def _require_names(names: Iterable[str]) -> None:
    wrong = next((name for name in names if "/" in name or not is_inside(name)), None)
    if wrong is not None:
        raise UserError(
            f"A result names {wrong!r}, which is no name for a file: remove its experiment.json and run it again."
        )


def _unique(drawing: Drawing) -> str:
    """The figure's SVG with identifiers of its own: all stand in one page. It is named for those who cannot see it."""
    text = drawing.svg()
    mark = f"{drawing.name}-"
    for before in ('id="', 'href="#', "url(#"):
        text = text.replace(before, before + mark)
    label = drawing.caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _replace(folder: Path) -> None:
    """Puts the new report in the place of an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
    _beside(folder).rename(folder)


def _beside(folder: Path) -> Path:
    """Where a new report is complete before it replaces an earlier one."""
    return folder.with_name(f".{folder.name}.new")
