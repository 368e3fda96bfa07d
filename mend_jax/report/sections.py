"""A section of the report for each experiment: its tables and figures, and what made it."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mend_jax.cli.config_files import base_config
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import dotted_fields
from mend_jax.cli.text import counted
from mend_jax.report.attention import attention_parts
from mend_jax.report.costs import cost_parts
from mend_jax.report.drawing import Drawing
from mend_jax.report.figures import lines
from mend_jax.report.results import Result
from mend_jax.report.score_figures import score_figures
from mend_jax.report.studies import by_study, scored_rows
from mend_jax.report.table import Table
from mend_jax.report.tables import all_tables
from mend_jax.report.trainings import Found, read_trainings

MOST = 8  # curves of one figure: more could not be told apart
# Of a training: {name in metrics.jsonl: (title, unit, the factor that makes the unit of it)}.
METRICS = {
    "loss": ("Loss", "loss", 1),
    "dev_score": ("Validation score", "score x 100", 100),
    "recovered": ("What the prefix recovers of the demonstrations", "recovered, %", 100),
    "recovered_outputs": ("What the prefix recovers at the outputs alone", "recovered, %", 100),
}
Parts = tuple[list[Table], list[Drawing], list[str]]  # the last are notes


@dataclasses.dataclass(frozen=True)
class Section:
    """What stands below one heading."""

    name: str
    title: str
    paper: str  # what it is in the paper, as part of a sentence, or ""
    made: list[tuple[str, str]]  # what made it: command, LLM, commit, machine, date
    config: dict
    notes: list[str]
    tables: list[Table]
    drawings: list[Drawing]

    @property
    def config_name(self) -> str:
        """Of the file that holds the whole config."""
        return f"{self.name}_config"

    @property
    def changed_config(self) -> str:
        """The fields of the config that differ from configs/base.py, a line each."""
        base = base_config()
        defaults = {} if base is None else dotted_fields(json.loads(base.to_json()))
        own = dotted_fields(self.config)
        return "\n".join(
            f"{name} = {json.dumps(own[name])}"
            for name in sorted(own)
            if name not in defaults or own[name] != defaults[name]
        )


def section_of(result: Result) -> Section:
    """The section of an experiment's result."""
    own = {"cost": cost_parts, "attention": attention_parts}.get(result.name)
    tables, drawings, notes = _scores(result) if own is None else _own_section(own, result)
    head = result.head
    made = {name: head[name] for name in ("command", "commit", "machine", "date")}
    partitions = dict.fromkeys(row.label("setting") or result.partition for row in result.rows)
    made |= {"LLM": result.llm, "partition": ", ".join(partitions) or result.partition}  # the config has the LLM's path
    facts = [(name, str(value)) for name, value in made.items() if value]
    papers = _of_the_paper(head["paper"] or "")
    return Section(result.name, head["title"], papers, facts, head["config"], notes, tables, drawings)


def trainings_section(workdir: str | Path, results: Sequence[Result]) -> Section | None:
    """The losses and the numbers of validation of all trainings of a workdir; None without one."""
    stages = read_trainings(workdir, results)
    drawings = [drawing for stage, found in stages.items() for drawing in _training_figures(stage, found)]
    if not drawings:
        return None
    notes = [f"{counted(sum(map(len, stages.values())), 'training')}, named after the rows that use them."]
    heads = [result.head for result in results if any(seed is not None for row in result.rows for seed in row.seeds)]
    made = {
        name: ", ".join(dict.fromkeys(head[name] for head in heads if head[name])) for name in ("command", "commit")
    }
    facts = [(name, text) for name, text in made.items() if text]
    return Section("trainings", "Trainings", "", facts, {}, notes, [], drawings)


def _training_figures(stage: str, trainings: Found) -> list[Drawing]:
    """The curves of one stage, a few to a figure."""
    drawn = []
    for metric, (title, unit, factor) in METRICS.items():
        series = {name: _points(of, metric, factor) for name, of in trainings.values()}
        series = {name: points for name, points in series.items() if len(points) > 1}
        parts = range(0, len(series), MOST)
        for start in parts:
            name = f"training_{stage}_{metric}" + (f"_{start // MOST + 1}" if len(parts) > 1 else "")
            part = dict(list(series.items())[start : start + MOST])
            drawn.append(lines(name, f"{title} in training, stage {stage}.", part, "step", unit))
    return drawn


def _points(found: Sequence[dict], name: str, factor: float) -> list[tuple[float, float]]:
    """The (step, value) pairs of a metric; of more than 200, means of neighbours."""
    points = [(line["step"], line[name] * factor) for line in found if name in line]
    parts = np.array_split(np.array(points, float), min(len(points), 200)) if points else []
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def _scores(result: Result) -> Parts:
    """Of an experiment whose rows are evaluations. Raises UserError where it has none."""
    rows = scored_rows(result)
    if not rows:
        raise UserError(f"The result of {result.name} has no rows: remove its experiment.json and run it again.")
    seeds = sorted({seed for one in rows for seed in one.row.seeds if seed is not None})
    studies = [own[0].study for own in by_study(rows)]
    counts, items = ([len(study.tasks) for study in studies], [sum(t.items for t in s.tasks) for s in studies])
    text = f"{_range(counts, 'task')}, {_range(items, 'test item')} in all."
    text += f" Training seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}." if seeds else ""
    return all_tables(result, rows), score_figures(result, rows), [text]


def _own_section(make: Callable, result: Result) -> Parts:
    """Of an experiment with numbers of its own. Raises UserError where its file lacks some: older ones hold no checksum."""
    try:
        return make(result)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"The result of {result.name} is damaged ({type(error).__name__}: {error}): remove its experiment.json and run the"
            " experiment again."
        ) from error


def _of_the_paper(text: str) -> str:
    """`Table 3` as `the paper's Table 3`; what is neither a table, a figure nor a question of the paper is none of its parts."""
    return f"the paper's {text}" if text.startswith(("Table", "Figure", "open question")) else ""


def _range(values: Sequence[int], thing: str) -> str:
    low, high = min(values), max(values)
    return counted(low, thing) if low == high else f"{low:,} to {counted(high, thing)}"
