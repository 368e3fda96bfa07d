"""Cells of tables: what people read, and the same as numbers for programs.

A text has the interval beside the value, in percent, with a true minus sign; the numbers have a column for each, in ASCII, and are
in percent too where the text is.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mend_jax.scoring.statistics import ALPHA, Comparison, Difference, Estimate

Value = str | float | int | None  # None: an empty field


class Cell(NamedTuple):
    """A cell: its column's title, its text, and {column of the data: value}."""

    title: str
    text: str
    data: dict[str, Value]


def text_cell(title: str, text: str) -> Cell:
    """A cell whose data are its text."""
    return Cell(title, text, {title: text})


def percent_cell(title: str, value: float | None, key: str) -> Cell:
    """A fraction in percent; empty without one."""
    return Cell(title, "" if value is None else percent(value), {key: in_percent(value)})


def interval_cell(title: str, found: Estimate | None, key: str, plus: bool = False) -> Cell:
    """A value with its interval: the data are in `key`, `key`_low and `key`_high."""
    values = (None,) * 3 if found is None else (found.value, found.low, found.high)
    names = (key, f"{key}_low", f"{key}_high")
    text = "" if found is None else interval(found, plus)
    return Cell(title, text, {name: in_percent(value) for name, value in zip(names, values, strict=True)})


def p_cell(p: float | None, title: str = "p", key: str = "p") -> Cell:
    return Cell(title, "" if p is None else p_value(p), {key: p})


def comparison_cells(found: Comparison | None) -> list[Cell]:
    """A difference of two methods in all: empty cells where a row has none."""
    overall = found and found.overall
    return [
        interval_cell("difference [95%]", overall and overall.estimate, "difference", plus=True),
        p_cell(overall and overall.p),
        _counts("tasks won : lost", found and (found.wins, found.losses), "tasks"),
        _counts("of them sure", found and _sure(found), "sure"),
        percent_cell("smallest visible", overall and overall.visible, "smallest_visible"),
        text_cell("note", note(overall) if overall else ""),
    ]


def task_cells(found: Difference | None, adjusted: float | None, title: str = "difference [95%]") -> list[Cell]:
    """A difference of two methods on one task, with its p after Holm's correction; empty cells where a row has none."""
    return [
        interval_cell(title, found and found.estimate, "difference", plus=True),
        p_cell(adjusted, "p (Holm)", "p_holm"),
        percent_cell("smallest visible", found and found.visible, "smallest_visible"),
        text_cell("note", note(found) if found else ""),
    ]


def as_rows(lines: Sequence[Sequence[Cell]]) -> tuple[list[str], list[list[str]]]:
    """(titles, rows of texts) of lines that have the same columns."""
    return [cell.title for cell in lines[0]], [[cell.text for cell in line] for line in lines]


def as_data(lines: Sequence[Sequence[Cell]]) -> tuple[list[str], list[list[Value]]]:
    """(names of columns, rows of values) of lines that have the same columns."""
    names = [name for cell in lines[0] for name in cell.data]
    return names, [[value for cell in line for value in cell.data.values()] for line in lines]


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def in_percent(value: float | None) -> float | None:
    """A fraction as the number in percent that data hold."""
    return None if value is None else round(100 * value, 6)


def interval(found: Estimate, plus: bool = False) -> str:
    """`43.35 [41.20, 45.51]`, with `plus` of a difference: `+1.20 [−0.31, +2.70]`."""
    value, low, high = (f"{100 * x:{'+' if plus else ''}.2f}" for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]".replace("-", "−")


def p_value(p: float) -> str:
    return f"{p:.4f}" if p >= 0.001 else f"{p:.1g}"


def note(found: Difference) -> str:
    """A warning where there are too few items to show a difference of this size."""
    too_small = found.estimate.value and abs(found.estimate.value) < found.visible and found.p >= ALPHA
    return "too few items to tell" if too_small else ""


def _sure(found: Comparison) -> tuple[int, int]:
    """The tasks (won, lost) of which the test is sure."""
    values = [found.per_task[task].estimate.value for task, p in found.adjusted.items() if p < ALPHA]
    return sum(value > 0 for value in values), sum(value < 0 for value in values)


def _counts(title: str, counts: tuple[int, int] | None, key: str) -> Cell:
    won, lost = counts or (None, None)
    return Cell(title, f"{won} : {lost}" if counts else "", {f"{key}_won": won, f"{key}_lost": lost})
