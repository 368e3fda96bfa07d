"""The tables that stand first, with few numbers: methods by what else is varied, the spread over orders, the change of template."""

from collections.abc import Sequence

import numpy as np

from mend_jax.experiments import paper
from mend_jax.report.names import UNTRAINED, method_name, value_name
from mend_jax.report.results import Result, Row
from mend_jax.report.studies import Scored
from mend_jax.report.table import Table
from mend_jax.scoring.cells import Cell, in_percent, interval_cell, p_cell, percent, percent_cell, text_cell
from mend_jax.scoring.metrics import percent as mean_and_spread
from mend_jax.scoring.statistics import Estimate, Resampled, estimate

AVERAGE = "mean over settings [95%]"


def compact_tables(result: Result, rows: Sequence[Scored], labels: Sequence[str]) -> list[Table]:
    """Those that the experiment has; `labels` are the names of those that differ between rows."""
    made = []
    if result.name == "order":
        made += orders_table(result, rows)
    if result.name == "templates":
        made += templates_table(result, rows)
    if len(labels) == 2 and "method" in labels:
        made.append(pivot_table(result, rows, labels))
    return made


def orders_table(result: Result, rows: Sequence[Scored]) -> list[Table]:
    """How far each method's score goes apart over the orders of the same demonstrations: those of one seed, since every seed has
    demonstrations and orders of its own."""
    lines = []
    for method in dict.fromkeys(one.row.label("method") for one in rows):
        own = [one.draws.values.mean(0) for one in rows if one.row.label("method") == method]
        if len({values.shape for values in own}) > 1:
            continue  # an order that lacks trainings or seeds
        values = np.stack(own)  # (orders, trainings, seeds)
        std = float(values.std(0, ddof=1).mean()) if len(values) > 1 else None
        low, high = (float(ends.mean()) for ends in (values.min(0), values.max(0)))
        mean = float(values.mean())
        spread = mean_and_spread({"mean": mean, "std": std})
        lines.append(
            [
                text_cell("method", method_name(method)),
                Cell("orders", str(len(values)), {"orders": len(values)}),
                Cell("mean ± over orders", spread, {"mean": in_percent(mean), "std_over_orders": in_percent(std)}),
                percent_cell("lowest", low, "lowest"),
                percent_cell("highest", high, "highest"),
                percent_cell("apart", high - low, "apart"),
            ]
        )
    note = (
        "± is the standard deviation over orders within one seed (a set of demonstrations) and training, then the mean over these;"
        " so are the lowest and the highest score and how far they are apart."
    )
    return [Table.of(f"{result.name}_spread", "Spread over orders", lines, note=note)] if lines else []


def templates_table(result: Result, rows: Sequence[Scored]) -> list[Table]:
    """For each trained method how much it loses when it is tested with another template than its own."""
    place = {tuple(one.row.label(name) for name in ("method", "trained", "tested")): one for one in rows}
    lines = []
    for (method, trained, tested), other in place.items():
        own = place.get((method, trained, trained))
        if trained == UNTRAINED or own is None or own is other or own.study is not other.study:
            continue
        draws = {one.name: one.draws for one in (own, other)}
        found = own.study.compare(other.name, own.name, draws, "score").overall
        lines.append(
            [
                text_cell("method", method_name(method)),
                text_cell("trained", trained),
                text_cell("tested", tested),
                percent_cell("score with its own", own.score.value, "own"),
                percent_cell("with the other", other.score.value, "other"),
                interval_cell("diff [95%]", found.estimate, "diff", plus=True),
                p_cell(found.p),
            ]
        )
    note = "diff: the score when tested with the other template minus that when tested with its own."
    title = "Tested with another template"
    return [Table.of(f"{result.name}_diff", title, lines, labels=3, note=note)] if lines else []


def pivot_table(result: Result, rows: Sequence[Scored], labels: Sequence[str]) -> Table:
    """Methods by what else is varied, with the paper's numbers below ours where it has them for this LLM."""
    (across,) = (name for name in labels if name != "method")
    columns, methods = (list(dict.fromkeys(one.row.label(name) for one in rows)) for name in (across, "method"))
    cells = {(one.row.label("method"), one.row.label(across)): one for one in rows}
    average, shown = across == "setting" and len(columns) > 1, [value_name(across, column) for column in columns]
    lines = []
    for method in methods:
        own = [cells.get((method, column)) for column in columns]
        line = [text_cell("method", method_name(method))]
        line += [_spread_cell(column, one and one.spread) for column, one in zip(shown, own, strict=True)]
        lines.append(line + ([_average_cell(own)] if average else []))
        theirs = [None if one is None else papers_score(result, one.row) for one in own]
        if any(theirs):
            line = [text_cell("method", f"{method_name(method)}, paper")]
            line += [_papers_cell(column, value) for column, value in zip(shown, theirs, strict=True)]
            lines.append(line + ([_papers_average(theirs)] if average else []))
    title = f"Score ± over seeds, by {across}"
    return Table.of(f"{result.name}_by_method", title, lines)


def average(own: Sequence[Scored]) -> Estimate | None:
    """The mean over settings, each of the same weight; None where their seeds or trainings do not go together.

    The draws of seeds are the same in all settings, and so are those of items for a task that is in several.
    """
    if len({one.draws.values.shape[1:] for one in own}) > 1:
        return None
    values, draws = ([getattr(one.draws, name).mean(0) for one in own] for name in ("values", "draws"))
    return estimate(Resampled(np.stack(values), np.stack(draws)))


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


def _spread_cell(column: str, spread: dict | None) -> Cell:
    mean, std = (None, None) if spread is None else (spread["mean"], spread["std"])
    text = "" if spread is None else mean_and_spread(spread)
    return Cell(column, text, {column: in_percent(mean), f"{column}_std": in_percent(std)})


def _papers_cell(column: str, value: float | None) -> Cell:
    return Cell(column, "" if value is None else f"{value:.2f}", {column: value, f"{column}_std": None})


def _average_cell(own: Sequence[Scored | None]) -> Cell:
    """Of a method that has all settings."""
    if not all(own):
        return interval_cell(AVERAGE, None, "mean")
    found = average(own)
    if found is not None:
        return interval_cell(AVERAGE, found, "mean")
    mean = float(np.mean([one.score.value for one in own]))
    return Cell(AVERAGE, percent(mean), {"mean": in_percent(mean), "mean_low": None, "mean_high": None})


def _papers_average(theirs: Sequence[float | None]) -> Cell:
    mean = sum(theirs) / len(theirs) if all(theirs) else None
    text = "" if mean is None else f"{mean:.2f}"
    return Cell(AVERAGE, text, {"mean": mean, "mean_low": None, "mean_high": None})
