"""The tables and figures of an experiment whose rows are evaluations: scores with intervals, tests, the paper's beside ours.

Rows that answered the same items of the same tasks are compared with each other: each with the row of Vanilla ICL that has the
same labels, or without one with the first row.
"""

import dataclasses
from collections.abc import Sequence

from mend_jax.cli.errors import UserError
from mend_jax.experiments import paper
from mend_jax.report.figures import Bar, Drawing, bars, curves
from mend_jax.report.results import Result, Row
from mend_jax.scoring.answers import read_scores
from mend_jax.scoring.comparisons import Study, interval, note, p_value, percent, spread
from mend_jax.scoring.metrics import METRICS, TITLES, mean_and_std
from mend_jax.scoring.metrics import percent as mean_and_spread
from mend_jax.scoring.statistics import ALPHA, Comparison, Estimate, Resampled, estimate, is_by_class

BASELINE = "icl"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts; `folded` ones are closed at first."""

    name: str  # of its file
    title: str
    header: list[str]
    rows: list[list[str]]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Scored:
    """A row with what its answers say."""

    row: Row
    study: Study  # of all rows that answered the same
    name: str  # in the study
    score: Estimate
    metrics: dict[str, Estimate]
    spread: dict  # over seeds
    draws: Resampled
    baseline: Row | None
    comparison: Comparison | None  # with the baseline


def scored_rows(result: Result) -> list[Scored]:
    """Every row, in the order of the table."""
    found: dict[tuple, Scored] = {}
    for rows, study in _studies(result.rows):
        names = [_name(row) for row in rows]
        drawn = {metric: study.resampled(metric) for metric in ("score", *METRICS)}
        for row, name in zip(rows, names, strict=True):
            other = _baseline(row, rows)
            score = drawn["score"]
            comparison = None if other is None else study.compare(name, _name(other), score, "score")
            metrics = {metric: estimate(drawn[metric][name]) for metric in METRICS}
            own = score[name]
            found[row.labels] = Scored(row, study, name, estimate(own), metrics, spread(own), own, other, comparison)
    return [found[row.labels] for row in result.rows]


def main_tables(result: Result, rows: Sequence[Scored]) -> list[Table]:
    """The table as the paper has it, where two things are varied; then every row with its numbers; then the tasks."""
    labels = labels_of(rows)
    compact = [pivot_table(result, rows, labels)] if len(labels) == 2 and "method" in labels else []
    if result.name == "order":
        compact.insert(0, orders_table(result, rows))
    return [*compact, long_table(result, rows), task_table(result, rows)]


def orders_table(result: Result, rows: Sequence[Scored]) -> Table:
    """How far each method's score goes apart over the orders of the same demonstrations."""
    made = []
    for method in dict.fromkeys(one.row.label("method") for one in rows):
        scores = [one.score.value for one in rows if one.row.label("method") == method]
        mean, std = mean_and_std(scores)
        made.append([method, str(len(scores)), mean_and_spread({"mean": mean, "std": std})])
        made[-1] += [percent(value) for value in (min(scores), max(scores), max(scores) - min(scores))]
    header = ["method", "orders", "mean ± over orders", "lowest", "highest", "apart"]
    return Table(f"{result.name}_spread", "Spread over orders", header, made)


def pivot_table(result: Result, rows: Sequence[Scored], labels: Sequence[str]) -> Table:
    """Methods by what else is varied, with the paper's numbers below ours where it has them for this LLM."""
    (across,) = (name for name in labels if name != "method")
    columns, methods = (list(dict.fromkeys(one.row.label(name) for one in rows)) for name in (across, "method"))
    cells = {(one.row.label("method"), one.row.label(across)): one for one in rows}
    average = across == "setting" and len(columns) > 1
    made = []
    for method in methods:
        own = [cells.get((method, column)) for column in columns]
        line = [method, *("" if one is None else mean_and_spread(one.spread) for one in own)]
        if average:
            line.append(percent(sum(one.score.value for one in own) / len(own)) if all(own) else "")
        made.append(line)
        theirs = [None if one is None else papers_score(result, one.row) for one in own]
        if any(theirs):
            line = [f"{method}, paper", *("" if value is None else f"{value:.2f}" for value in theirs)]
            if average:
                line.append(f"{sum(theirs) / len(theirs):.2f}" if all(theirs) else "")
            made.append(line)
    title = "Score ± over seeds"
    return Table(f"{result.name}_by_method", title, ["method", *columns, *(["mean"] if average else [])], made)


def long_table(result: Result, rows: Sequence[Scored]) -> Table:
    """Each row with its intervals, and its difference to the row that it is compared with."""
    labels = labels_of(rows)
    theirs = [papers_score(result, one.row) for one in rows]
    papers = ["paper"] if any(theirs) else []
    header = [
        *labels,
        "trainings",
        "score ± over seeds",
        *papers,
        "score [95%]",
        "compared with",
        "difference [95%]",
        "p",
    ]
    header += ["tasks won : lost", "sure", "smallest visible", "", *(f"{title} [95%]" for title in TITLES.values())]
    made = []
    for one, value in zip(rows, theirs, strict=True):
        line = [*(one.row.label(name) for name in labels), _trainings(one), mean_and_spread(one.spread)]
        line += ["" if value is None else f"{value:.2f}"] if papers else []
        line += [interval(one.score), *_compared(one, labels), *(interval(found) for found in one.metrics.values())]
        made.append(line)
    references = _reference_rows(rows)
    for study, found in references:
        for name, values in found.items():
            which = f"{name} ({len(study.tasks)} tasks, {study.tasks[0].name} ...)" if len(references) > 1 else name
            score = percent(values["score"])
            line = [which, *[""] * (len(labels) - 1), "–", score, *[""] * len(papers), score, *[""] * 7]
            made.append([*line, *(percent(values[metric]) for metric in METRICS)])
    return Table(f"{result.name}_rows", "Every row, with 95% intervals", header, made)


def task_table(result: Result, rows: Sequence[Scored]) -> Table:
    """Each task of each row: its metric, items and score, and its difference to the same task of the row compared with."""
    labels = labels_of(rows)
    header = ["task", *labels, "metric", "items", "score", "difference [95%]", "p (Holm)", "smallest visible", ""]
    made = []
    for one in rows:
        for k, task in enumerate(one.study.tasks):
            metric = TITLES["macro_f1" if is_by_class(task, "score") else "accuracy"]
            line = [task.name, *(one.row.label(name) for name in labels), metric, f"{task.items:,}"]
            line.append(percent(one.draws.mean[k]))
            if one.comparison is not None:
                of_task = one.comparison.per_task[task.name]
                line += [interval(of_task.estimate, plus=True), p_value(one.comparison.adjusted[task.name])]
                line += [percent(of_task.visible), note(of_task)]
            made.append(line + [""] * (len(header) - len(line)))
    return Table(f"{result.name}_tasks", "By task", header, made, folded=True)


def score_figure(result: Result, rows: Sequence[Scored]) -> Drawing:
    """Curves over the experiment's number, or bars."""
    labels = labels_of(rows)
    references = _common_references(rows)
    if result.x:
        others = [name for name in labels if name != result.x]
        values = [_bar(one, one.row.label(result.x), _joined(one.row, others) or "score") for one in rows]
        caption = f"Score over {result.x}; bars are 95% intervals."
        return curves(result.name, caption, values, result.x, "score", references)
    series = "method" if "method" in labels and len(labels) > 1 else ""
    others = [name for name in labels if name != series]
    values = [_bar(one, _joined(one.row, others), one.row.label(series) if series else "score") for one in rows]
    xlabel = ", ".join(others)
    return bars(result.name, "Scores; bars are 95% intervals.", values, "score", references, xlabel=xlabel)


def labels_of(rows: Sequence[Scored]) -> list[str]:
    """The names of the labels that differ between rows; of a single row the first."""
    values: dict[str, set] = {}
    for one in rows:
        for name, value in one.row.labels:
            values.setdefault(name, set()).add(value)
    return [name for name, found in values.items() if len(found) > 1] or list(values)[:1]


def papers_score(result: Result, row: Row) -> float | None:
    """The paper's number for a row of the same LLM, in percent."""
    llm, method = result.llm, row.label("method")
    setting = row.label("setting") or result.partition
    if result.name in ("main_table", "methods"):
        return paper.TABLE_2.get(llm, {}).get(method, {}).get(setting)
    if llm != "gpt2-large":
        return None
    if result.name == "ablations":
        return paper.TABLE_4.get((row.label("pretraining"), row.label("finetuning")), {}).get(setting)
    if setting != "class_to_class":
        return None
    if result.name in ("perturbations", "retrieval"):
        return paper.TABLE_3.get(row.label("demonstrations"), {}).get(method)
    if result.name == "templates" and row.label("trained") in ("-", "space"):
        return paper.TABLE_7.get(row.label("tested"), {}).get(method)
    return None


def _studies(rows: Sequence[Row]):
    """(rows, study) of rows that answered the same items of the same tasks."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        found = read_scores(row.sources[0].folder)
        tasks = (
            tuple(found["methods"][row.sources[0].method]["per_task"])
            if row.sources[0].method in found["methods"]
            else ()
        )
        groups.setdefault((tasks, tuple(found["seeds"])), []).append(row)
    for group in groups.values():
        yield from _study_of(group)


def _study_of(rows: list[Row]):
    """One study of all rows, or where their items differ one for each set of labels without the method, or one for each row."""
    try:
        yield rows, Study.of({_name(row): row.sources for row in rows})
        return
    except UserError:
        if len(rows) == 1:
            raise
    parts: dict[tuple, list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(one for one in row.labels if one[0] != "method"), []).append(row)
    split = list(parts.values()) if len(parts) > 1 else [[row] for row in rows]
    for part in split:
        yield from _study_of(part)


def _name(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.labels)


def _baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row to compare with: Vanilla ICL's of the same labels; for itself, or without one, the first row of the same method or
    else the first."""
    others = [one for one in row.labels if one[0] != "method"]
    if row.label("method") != BASELINE:
        for other in rows:
            if other.label("method") == BASELINE and [one for one in other.labels if one[0] != "method"] == others:
                return other
    same = [other for other in rows if other.label("method") == row.label("method")]
    first = same[0] if len(same) > 1 else rows[0]
    return None if first is row else first


def _compared(one: Scored, labels: Sequence[str]) -> list[str]:
    found = one.comparison
    if found is None:
        return [""] * 7
    sure = [task for task, p in found.adjusted.items() if p < ALPHA]
    better = sum(found.per_task[task].estimate.value > 0 for task in sure)
    overall = found.overall
    return [
        _joined(one.baseline, labels),
        interval(overall.estimate, plus=True),
        p_value(overall.p),
        f"{found.wins} : {found.losses}",
        f"{better} : {len(sure) - better}",
        percent(overall.visible),
        note(overall),
    ]


def _reference_rows(rows: Sequence[Scored]) -> list[tuple[Study, dict[str, dict[str, float]]]]:
    """Of each study, the scores of answers that read nothing: {name: {metric: score}}."""
    found = []
    for study in {id(one.study): one.study for one in rows}.values():
        by_metric = {metric: study.references(metric) for metric in ("score", *METRICS)}
        names = by_metric["score"]
        found.append((study, {name: {metric: by_metric[metric][name] for metric in by_metric} for name in names}))
    return found


def _common_references(rows: Sequence[Scored]) -> dict[str, float]:
    """Those for a figure, in percent: where all rows answered the same."""
    found = _reference_rows(rows)
    return {name: 100 * values["score"] for name, values in found[0][1].items()} if len(found) == 1 else {}


def _trainings(one: Scored) -> str:
    return "–" if one.row.seeds == [None] else str(len(one.row.sources))


def _bar(one: Scored, group: str, series: str) -> Bar:
    return Bar(group, series, *(100 * value for value in (one.score.value, one.score.low, one.score.high)))


def _joined(row: Row, names: Sequence[str]) -> str:
    return ", ".join(row.label(name) for name in names if row.label(name))
