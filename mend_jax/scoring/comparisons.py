"""Methods beside each other as tables: scores with intervals, differences with tests, tasks with their numbers of items.

The numbers are those of scoring/statistics.py; docs/statistics.md says what each means.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from mend_jax.cli.text import in_markdown, markdown
from mend_jax.scoring.answers import Source, gather
from mend_jax.scoring.metrics import METRICS, TITLES, mean_and_std
from mend_jax.scoring.metrics import percent as mean_and_spread
from mend_jax.scoring.statistics import (
    ALPHA,
    Answers,
    Comparison,
    Difference,
    Estimate,
    Resampled,
    Task,
    compare,
    estimate,
    guesses,
    is_by_class,
    most_frequent,
    resample,
)

REFERENCES = {"most frequent label": most_frequent, "random option": guesses}  # rows that read nothing


@dataclasses.dataclass(frozen=True)
class Study:
    """What several methods answered to the same tasks."""

    tasks: list[Task]
    answers: dict[str, Answers]
    trainings: dict[str, int]
    seed: int = 0  # of the resamples

    @classmethod
    def of(cls, sources: Mapping[str, Sequence[Source]], seed: int = 0) -> "Study":
        """Of {method: where the answers of its trainings are}. Raises UserError as `gather` does."""
        tasks, answers = gather(sources)
        return cls(tasks, answers, {name: len(found) for name, found in sources.items()}, seed)

    def resampled(self, metric: str) -> dict[str, Resampled]:
        return resample(self.tasks, self.answers, metric, self.seed)

    def references(self, metric: str) -> dict[str, float]:
        """The scores of answers that read nothing."""
        return {
            name: float(resample(self.tasks, {name: own}, metric, self.seed, 1)[name].mean.mean())
            for name, own in self.reference_answers().items()
        }

    def reference_answers(self) -> dict[str, Answers]:
        return {name: {task.name: make(task) for task in self.tasks} for name, make in REFERENCES.items()}

    def compare(self, one: str, other: str, resampled: Mapping[str, Resampled], metric: str) -> Comparison:
        pair = resampled[one], resampled[other]
        return compare(self.tasks, self.answers[one], self.answers[other], pair, metric, self.seed)


def spread(found: Resampled) -> dict:
    """{"mean", "std"} over seeds, as the paper gives it: of the mean over tasks and trainings."""
    mean, std = mean_and_std(found.values.mean((0, 1)).tolist())
    return {"mean": mean, "std": std}


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def interval(found: Estimate, plus: bool = False) -> str:
    """`43.35 [41.20, 45.51]`, with `plus` of a difference: `+1.20 [−0.31, +2.70]`."""
    value, low, high = (f"{100 * x:{'+' if plus else ''}.2f}" for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]".replace("-", "−")


def method_table(study: Study) -> str:
    """A row for each method: the score with its spread over seeds and its interval, both metrics with theirs; then rows that
    read nothing."""
    found = {metric: study.resampled(metric) for metric in ("score", *METRICS)}
    rows = []
    for name in study.answers:
        cells = [interval(estimate(found[metric][name])) for metric in ("score", *METRICS)]
        rows.append([name, str(study.trainings[name]), mean_and_spread(spread(found["score"][name])), *cells])
    references = {metric: study.references(metric) for metric in ("score", *METRICS)}
    for name in REFERENCES:
        own = [percent(references[metric][name]) for metric in ("score", *METRICS)]
        rows.append([name, "–", own[0], *own])
    titles = [f"{title} [95%]" for title in ("score", *TITLES.values())]
    return markdown(["method", "trainings", "score ± over seeds", *titles], rows)


def pair_table(comparisons: Mapping[tuple[str, str], Comparison]) -> str:
    """A row for each pair of methods."""
    rows = []
    for (one, other), found in comparisons.items():
        sure = [
            task
            for task, difference in found.per_task.items()
            if found.adjusted[task] < ALPHA and difference.estimate.value
        ]
        better = sum(found.per_task[task].estimate.value > 0 for task in sure)
        rows.append(
            [f"{one} − {other}", interval(found.overall.estimate, plus=True), p_value(found.overall.p)]
            + [f"{found.wins} : {found.losses}", f"{better} : {len(sure) - better}"]
            + [percent(found.overall.visible), note(found.overall)]
        )
    header = ["difference", "points [95%]", "p", "tasks won : lost", "of them sure", "smallest visible", ""]
    return markdown(header, rows)


def task_table(study: Study, metric: str, resampled: Mapping[str, Resampled], pair=None, found=None) -> str:
    """A row for each task: its metric, its items, every method's score, and the difference of one pair of methods."""
    header = ["task", "metric", "items", *study.answers]
    if pair:
        header += [f"{pair[0]} − {pair[1]} [95%]", "p (Holm)", "smallest visible", ""]
    rows = []
    for k, task in enumerate(study.tasks):
        by_class = is_by_class(task, metric)
        row = [in_markdown(task.name), TITLES["macro_f1" if by_class else "accuracy"], f"{task.items:,}"]
        row += [percent(resampled[name].mean[k]) for name in study.answers]
        if pair:
            of_task = found.per_task[task.name]
            row += [interval(of_task.estimate, plus=True), p_value(found.adjusted[task.name])]
            row += [percent(of_task.visible), note(of_task)]
        rows.append(row)
    return markdown(header, rows)


def note(found: Difference) -> str:
    """A warning where there are too few items to show a difference of this size."""
    too_small = found.estimate.value and abs(found.estimate.value) < found.visible and found.p >= ALPHA
    return "too few items to tell" if too_small else ""


def p_value(p: float) -> str:
    return f"{p:.4f}" if p >= 0.001 else f"{p:.1g}"


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs, the later method before the earlier: tables begin with the simplest methods."""
    return [(other, one) for one, other in itertools.combinations(names, 2)]
