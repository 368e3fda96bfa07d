"""The rows of an experiment with what their answers say: scores, each row's comparison with another, tests of pairs.

Rows that answered the same items of the same tasks are one study, and are compared with each other: each with the row of Vanilla ICL
that has the same labels, or without one with the first row of its method. Rows of one hyperparameter are compared among themselves.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from mend_jax.cli.errors import UserError
from mend_jax.report.names import UNTRAINED, joined
from mend_jax.report.results import Result, Row
from mend_jax.scoring.answers import read_scores
from mend_jax.scoring.comparisons import Study, spread
from mend_jax.scoring.metrics import METRICS
from mend_jax.scoring.statistics import Comparison, Estimate, Resampled, estimate

BASELINE = "icl"
MOST_ROWS = 12  # of one method, of which all pairs are tested


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
    length: (
        float | None
    )  # positions of the prefix, the mean over tasks, seeds and trainings; None: an older version kept none


def scored_rows(result: Result) -> list[Scored]:
    """Every row, in the order of the table."""
    found: dict[tuple, Scored] = {}
    for rows, study in studies_of(result.rows):
        drawn = {metric: study.resampled(metric) for metric in ("score", *METRICS)}
        for row in rows:
            name, other, score = row_name(row), _baseline(row, rows), drawn["score"]
            comparison = None if other is None else study.compare(name, row_name(other), score, "score")
            metrics = {metric: estimate(drawn[metric][name]) for metric in METRICS}
            own = score[name]
            found[row.labels] = Scored(
                row, study, name, estimate(own), metrics, spread(own), own, other, comparison, _prefix_length(row)
            )
    return [found[row.labels] for row in result.rows]


def by_study(rows: Sequence[Scored]) -> list[list[Scored]]:
    """The rows of each study together."""
    parts: dict[int, list[Scored]] = {}
    for one in rows:
        parts.setdefault(id(one.study), []).append(one)
    return list(parts.values())


def studies_of(rows: Sequence[Row]) -> Iterator[tuple[list[Row], Study]]:
    """(rows, study) of rows that answered the same items of the same tasks."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        found = read_scores(row.sources[0].folder)
        tasks = tuple(found["methods"].get(row.sources[0].method, {}).get("per_task", ()))
        groups.setdefault((tasks, tuple(found["seeds"])), []).append(row)
    for group in groups.values():
        yield from _study_of(group)


def pairs_of_rows(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The pairs of a study's rows that are tested, the later row first.

    Methods under equal labels; where one was not trained, its labels of training equal all others; and each row with the first of its
    method. Where no two trained methods have
    equal labels, as in ablations, all rows if they are few, of one hyperparameter and setting each.
    """
    pairs = [(other, one) for one, other in itertools.combinations(rows, 2)]
    if any(_is_of_other_method(*pair) and _others(pair[0]) == _others(pair[1]) for pair in pairs):
        across = [pair for pair in pairs if _is_of_other_method(*pair) and _have_equal_labels(*pair)]
        first: dict[str, Row] = {}
        for row in rows:
            first.setdefault(row.label("method"), row)
        within = [pair for pair in pairs if pair[1] is first[pair[0].label("method")]]
        return [*across, *within]
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault((row.label("hyperparameter"), row.label("setting")), []).append(row)
    few = [part for part in parts.values() if len(part) <= MOST_ROWS]
    return [(other, one) for part in few for one, other in itertools.combinations(part, 2)]


def varied_labels(rows: Sequence[Row]) -> list[str]:
    """The names of the labels that differ between rows, and that of a hyperparameter's value; of a single row the first."""
    values: dict[str, set] = {}
    for row in rows:
        for name, value in row.labels:
            values.setdefault(name, set()).add(value)
    return [name for name, found in values.items() if len(found) > 1 or name == "hyperparameter"] or list(values)[:1]


def joined_labels(row: Row | None, names: Sequence[str]) -> str:
    """Some of a row's labels as one text; "" without a row."""
    return "" if row is None else joined((name, row.label(name)) for name in names)


def row_name(row: Row) -> str:
    """The row in its study."""
    return ", ".join(f"{name} {value}" for name, value in row.labels)


def _study_of(rows: list[Row]) -> Iterator[tuple[list[Row], Study]]:
    """One study of all rows, or where their items differ one for each set of labels without the method, or one for each row."""
    try:
        yield rows, Study.of({row_name(row): row.sources for row in rows})
        return
    except UserError:
        if len(rows) == 1:
            raise
    parts: dict[tuple, list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(_others(row).items()), []).append(row)
    split = list(parts.values()) if len(parts) > 1 else [[row] for row in rows]
    for part in split:
        yield from _study_of(part)


def _baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row to compare with: Vanilla ICL's of the same labels; for itself, or without one, the first row of the same method,
    hyperparameter and, if there are several, setting; or else the first."""
    if row.label("method") != BASELINE:
        for other in rows:
            if other.label("method") == BASELINE and _others(other) == _others(row):
                return other
    for names in (("method", "hyperparameter", "setting"), ("method", "hyperparameter")):
        same = [other for other in rows if all(other.label(name) == row.label(name) for name in names)]
        if len(same) > 1:
            break
    first = same[0] if len(same) > 1 or row.label("hyperparameter") else rows[0]
    return None if first is row else first


def _is_of_other_method(one: Row, other: Row) -> bool:
    return one.label("method") != other.label("method")


def _have_equal_labels(one: Row, other: Row) -> bool:
    ours, theirs = _others(one), _others(other)
    return ours.keys() == theirs.keys() and all(
        ours[name] == theirs[name] or UNTRAINED in (ours[name], theirs[name]) for name in ours
    )


def _others(row: Row) -> dict[str, str]:
    """The labels of a row but its method."""
    return {name: value for name, value in row.labels if name != "method"}


def is_trained(row: Row) -> bool:
    """Whether it has trainings, of its experiment or from elsewhere."""
    [entry, *_] = [read_scores(source.folder)["methods"].get(source.method) or {} for source in row.sources]
    return bool(entry.get("path"))


def _prefix_length(row: Row) -> float | None:
    costs = [read_scores(source.folder)["methods"][source.method].get("cost") for source in row.sources]
    lengths = [cost.get("prefix_length") if isinstance(cost, dict) else None for cost in costs]
    known = [length for length in lengths if isinstance(length, int | float)]
    return sum(known) / len(known) if known else None
