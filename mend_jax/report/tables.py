"""The tables of an experiment whose rows are evaluations: every row with its intervals and tests, tasks, pairs of methods."""

from collections.abc import Sequence

from mend_jax.report.compact_tables import compact_tables, papers_score
from mend_jax.report.names import value_name
from mend_jax.report.results import Result, Row
from mend_jax.report.studies import (
    Scored,
    by_study,
    is_trained,
    joined_labels,
    pairs_of_rows,
    row_name,
    varied_labels,
)
from mend_jax.report.table import Table
from mend_jax.scoring.cells import (
    Cell,
    comparison_cells,
    in_percent,
    interval_cell,
    percent,
    percent_cell,
    task_cells,
    text_cell,
)
from mend_jax.scoring.comparisons import Study
from mend_jax.scoring.metrics import METRICS, TITLES
from mend_jax.scoring.statistics import Comparison, is_by_class

GROWS = 0.5  # of K's growth: a prefix that grows by less lacks demonstrations


def all_tables(result: Result, rows: Sequence[Scored]) -> list[Table]:
    """The compact ones, then every row with its numbers; then pairs and tasks, folded."""
    made = [*compact_tables(result, rows, labels_of(rows)), rows_table(result, rows)]
    return [*made, *pairs_table(result, rows), tasks_table(result, rows)]


def rows_table(result: Result, rows: Sequence[Scored]) -> Table:
    """Each row with its intervals, and its difference to the row that it is compared with; then what reads nothing."""
    labels, metrics = labels_of(rows), _metrics(rows)
    theirs = [papers_score(result, one.row) for one in rows]
    lines = []
    for one, value in zip(rows, theirs, strict=True):
        count = len(one.row.sources) if is_trained(one.row) else None
        line = [*_label_cells(one.row, labels), _trainings_cell(count)]
        line += [interval_cell("score [95%]", one.score, "score"), _seeds_cell(one.spread["std"])]
        line += [_papers_cell(value)] if any(theirs) else []
        line += [_length_cell(one.length), text_cell("compared with", joined_labels(one.baseline, labels))]
        line += comparison_cells(one.comparison)
        lines.append(line + [interval_cell(f"{TITLES[m]} [95%]", one.metrics[m], m) for m in metrics])
    references = reference_scores(rows)
    for study, found in references:
        for name, values in found.items():
            which = f"{name} ({len(study.tasks)} tasks, {study.tasks[0].name} ...)" if len(references) > 1 else name
            line = [text_cell(label, which if label == labels[0] else "") for label in labels]
            line += [_trainings_cell(None), _alone("score [95%]", values["score"], "score"), _seeds_cell(None)]
            line += [_papers_cell(None)] if any(theirs) else []
            line += [_length_cell(None), text_cell("compared with", ""), *comparison_cells(None)]
            lines.append(line + [_alone(f"{TITLES[m]} [95%]", values[m], m) for m in metrics])
    note, title = " ".join(prefix_notes(result, rows)), "Every row, with 95% intervals"
    return Table.of(f"{result.name}_rows", title, lines, labels=len(labels), note=note)


def tasks_table(result: Result, rows: Sequence[Scored]) -> Table:
    """Each task of each row: its metric, items and score, and its difference to the same task of the row compared with."""
    labels, lines = labels_of(rows), []
    for one in rows:
        for k, task in enumerate(one.study.tasks):
            metric = TITLES["macro_f1" if is_by_class(task, "score") else "accuracy"]
            line = [text_cell("task", task.name), *_label_cells(one.row, labels), text_cell("metric", metric)]
            line += [Cell("items", f"{task.items:,}", {"items": task.items})]
            line += [percent_cell("score", float(one.draws.mean[k]), "score")]
            line += [text_cell("compared with", joined_labels(one.baseline, labels))]
            found = one.comparison
            line += task_cells(found and found.per_task[task.name], found and found.adjusted[task.name])
            lines.append(line)
    return Table.of(f"{result.name}_tasks", "By task", lines, folded=True, labels=1 + len(labels))


def pairs_table(result: Result, rows: Sequence[Scored]) -> list[Table]:
    """Paired tests of the methods under equal labels, or of all rows of an experiment with few (studies.pairs_of_rows)."""
    labels, lines = labels_of(rows), []
    for own in by_study(rows):
        scored = {row_name(one.row): one for one in own}
        for one, other in pairs_of_rows([one.row for one in own]):
            equal = [name for name in labels if one.label(name) == other.label(name)]
            same = [name for name in equal if name != "hyperparameter"]  # it stands with its value
            differ = [name for name in labels if name not in same]
            names = joined_labels(one, differ), joined_labels(other, differ)
            found = _compared(scored[row_name(one)], scored[row_name(other)])
            line = [Cell("rows", " − ".join(names), dict(zip(("one", "other"), names, strict=True)))]
            lines.append([*line, text_cell("both", joined_labels(one, same)), *comparison_cells(found)])
    note = "p is of each pair alone, not corrected for the number of pairs."
    return [Table.of(f"{result.name}_pairs", "Paired tests", lines, folded=True, labels=2, note=note)] if lines else []


def prefix_notes(result: Result, rows: Sequence[Scored]) -> list[str]:
    """Where K grows and what the LLM reads does not, a sentence for each series."""
    found, constant = [], []
    for name, own in series_of(result, rows).items() if result.x == "K" else ():
        points = [(float(one.row.label("K")), one.length) for one in own if one.length]
        lengths = [length for _, length in points]
        if len(points) > 1 and max(lengths) == min(lengths):
            constant.append(name)
            continue
        for (k, length), (next_k, longer) in zip(points, points[1:], strict=False):
            if longer / length - 1 < GROWS * (next_k / k - 1):
                then = "stays as long" if lengths[-1] <= length else f"grows by less than K, to {lengths[-1]:,.0f}"
                found.append(
                    f"{name}: beyond K={k:g} the prefix, of {length:,.0f} positions, {then}: what does not fit"
                    " the window is left out, and a chunk has as many vectors for few demonstrations as for many."
                )
                break
    if constant:
        found.append(f"The prefix has the same length for every K: {'; '.join(constant)}.")
    return found


def series_of(result: Result, rows: Sequence[Scored]) -> dict[str, list[Scored]]:
    """The rows of each curve over the experiment's number, from the lowest on."""
    others, made = [name for name in labels_of(rows) if name != result.x], {}
    for one in sorted(rows, key=lambda one: float(one.row.label(result.x))):
        made.setdefault(joined_labels(one.row, others) or "score", []).append(one)
    return made


def labels_of(rows: Sequence[Scored]) -> list[str]:
    """The names of the labels that differ between rows."""
    return varied_labels([one.row for one in rows])


def reference_scores(rows: Sequence[Scored]) -> list[tuple[Study, dict[str, dict[str, float]]]]:
    """Of each study, the scores of answers that read nothing: {name: {metric: score}}."""
    found = []
    for study in (own[0].study for own in by_study(rows)):
        by_metric = {metric: study.references(metric) for metric in ("score", *METRICS)}
        names = by_metric["score"]
        found.append((study, {name: {metric: by_metric[metric][name] for metric in by_metric} for name in names}))
    return found


def _compared(one: Scored, other: Scored) -> Comparison:
    if one.baseline is other.row:
        return one.comparison
    draws = {scored.name: scored.draws for scored in (one, other)}
    return one.study.compare(one.name, other.name, draws, "score")


def _metrics(rows: Sequence[Scored]) -> list[str]:
    """The metrics that say more than the score does: it is Macro-F1 of classification and accuracy of the rest."""
    kinds = {is_by_class(task, "score") for own in by_study(rows) for task in own[0].study.tasks}
    return [metric for metric in METRICS if kinds != {metric == "macro_f1"}]


def _label_cells(row: Row, labels: Sequence[str]) -> list[Cell]:
    return [text_cell(name, value_name(name, row.label(name))) for name in labels]


def _trainings_cell(count: int | None) -> Cell:
    return Cell("trainings", "–" if count is None else str(count), {"trainings": count})


def _seeds_cell(std: float | None) -> Cell:
    return percent_cell("± over seeds", std, "std_over_seeds")


def _papers_cell(value: float | None) -> Cell:
    return Cell("paper", "" if value is None else f"{value:.2f}", {"paper": value})


def _length_cell(length: float | None) -> Cell:
    text = "" if length is None else f"{length:,.0f}"
    return Cell("prefix length", text, {"prefix_length": length})


def _alone(title: str, value: float, key: str) -> Cell:
    """A score without an interval, in a column of intervals."""
    return Cell(title, percent(value), {key: in_percent(value), f"{key}_low": None, f"{key}_high": None})
