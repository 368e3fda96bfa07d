"""The figures of an experiment whose rows are evaluations: curves over its number, or bars."""

from collections.abc import Sequence

import numpy as np

from mend_jax.report.drawing import Bar, Drawing
from mend_jax.report.figures import bars, curves, panels
from mend_jax.report.names import value_name
from mend_jax.report.results import Result
from mend_jax.report.studies import Scored, joined_labels
from mend_jax.report.tables import labels_of, prefix_notes, reference_scores, series_of

INTERVALS = "with 95% intervals."


def score_figures(result: Result, rows: Sequence[Scored]) -> list[Drawing]:
    """Those of an experiment."""
    if result.name == "domains":
        return domain_figures(result, rows)
    if result.name == "hyperparameters":
        return [score_bars(result.name, rows), *rank_figures(rows)]
    return [score_curves(result, rows) if result.x else score_bars(result.name, rows)]


def score_curves(result: Result, rows: Sequence[Scored]) -> Drawing:
    """Scores over the experiment's number."""
    values = [
        _bar(one, one.row.label(result.x), series) for series, own in series_of(result, rows).items() for one in own
    ]
    caption = " ".join([f"Score over {result.x}, {INTERVALS}", *prefix_notes(result, rows)])
    return curves(result.name, caption, values, result.x, "score", _common_references(rows))


def score_bars(name: str, rows: Sequence[Scored]) -> Drawing:
    """Scores, a series for each method."""
    labels = labels_of(rows)
    series = "method" if "method" in labels and len(labels) > 1 else ""
    others = [label for label in labels if label != series]
    values = [
        _bar(one, _group(one, others), value_name(series, one.row.label(series)) if series else "score") for one in rows
    ]
    references, xlabel = _common_references(rows), ", ".join(others)
    return bars(name, f"Scores, {INTERVALS}", values, "score", references, xlabel=xlabel)


def domain_figures(result: Result, rows: Sequence[Scored]) -> list[Drawing]:
    """The tasks without noise as bars; then curves over the share of noisy demonstrations, a panel for each kind of noise."""
    clean = [one for one in rows if one.row.label("demonstrations") == "none"]
    noisy = [one for one in rows if one.row.label("demonstrations") != "none"]
    drawn = [score_bars(result.name, clean)] if clean else []
    maps: dict[str, list[Bar]] = {}
    for kind in dict.fromkeys(one.row.label("demonstrations") for one in noisy):
        own = [one for one in noisy if one.row.label("demonstrations") == kind]
        tasks = {one.row.label("tasks") for one in own}
        own += [one for one in clean if one.row.label("tasks") in tasks]
        maps[kind] = [_bar(one, _in_percent(one.row.label("share")), joined_labels(one.row, ["method"])) for one in own]
    if maps:
        caption = f"Score over the share of demonstrations that are noisy, a panel for each kind of noise, {INTERVALS}"
        across = "share of the demonstrations, percent"
        drawn.append(panels(f"{result.name}_noise", caption, maps, across, "score", _common_references(noisy)))
    return drawn


def rank_figures(rows: Sequence[Scored]) -> list[Drawing]:
    """For each hyperparameter the average rank of its values over tasks, as the paper's Figures 6 and 7; 1 is the best."""
    found = []
    for name in dict.fromkeys(one.row.label("hyperparameter") for one in rows):
        own = [one for one in rows if one.row.label("hyperparameter") == name]
        if len(own) < 2 or len({len(one.study.tasks) for one in own}) > 1:
            continue
        ranks = np.mean([_ranks(np.array(scores)) for scores in zip(*(one.draws.mean for one in own), strict=True)], 0)
        values = [
            Bar(f"{name} = {one.row.label('value')}", "rank", float(rank)) for one, rank in zip(own, ranks, strict=True)
        ]
        caption = f"Average rank over tasks of the values of {name}; 1 is the best."
        found.append(bars(f"hyperparameters_rank_{name}", caption, values, "average rank"))
    return found


def _common_references(rows: Sequence[Scored]) -> dict[str, float]:
    """What reads nothing, in percent: where all rows answered the same."""
    found = reference_scores(rows)
    return {name: 100 * values["score"] for name, values in found[0][1].items()} if len(found) == 1 else {}


def _bar(one: Scored, group: str, series: str) -> Bar:
    return Bar(group, series, *(100 * value for value in (one.score.value, one.score.low, one.score.high)))


def _group(one: Scored, names: Sequence[str]) -> str:
    """What stands below a bar; of a single label, which the axis names, the value alone."""
    if len(names) == 1:
        return value_name(names[0], one.row.label(names[0]))
    return joined_labels(one.row, names)


def _in_percent(share: str) -> str:
    return f"{100 * float(share):g}"


def _ranks(scores: np.ndarray) -> np.ndarray:
    """The rank (n,) of each of n scores, 1 for the best; equal ones share the mean of their ranks."""
    better = (scores[None] > scores[:, None]).sum(1)
    return better + ((scores[None] == scores[:, None]).sum(1) + 1) / 2
