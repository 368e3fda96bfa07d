"""Methods beside each other as tables: scores with intervals, differences with tests, tasks with their numbers of items.

The numbers are those of scoring/statistics.py; docs/statistics.md says what each means.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from mend_jax.cli.text import in_markdown, markdown
from mend_jax.scoring.answers import Read, Source, differing, doubts, numbered, read_all
from mend_jax.scoring.cells import as_rows, comparison_cells, interval, percent, task_cells, text_cell
from mend_jax.scoring.metrics import METRICS, TITLES, mean_and_std
from mend_jax.scoring.metrics import percent as mean_and_spread
from mend_jax.scoring.statistics import (
    Answers,
    Comparison,
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
    warnings: tuple[str, ...] = ()  # sentences
    differs: tuple[str, ...] = ()  # in which settings the methods were evaluated differently; an experiment varies them

    @classmethod
    def of(cls, sources: Mapping[str, Sequence[Source]], read: Mapping[str, Sequence[Read]] | None = None) -> "Study":
        """Of {method: where the answers of its trainings are}; `read` are these answers, if they are already read, maybe others too.

        Raises UserError as `read_all` and `numbered` do.
        """
        read = read_all(sources) if read is None else {name: read[name] for name in sources}
        tasks, answers = numbered(read)
        differs = differing({name: found[0].facts for name, found in read.items()})
        counts = {name: len(found) for name, found in sources.items()}
        return cls(tasks, answers, counts, warnings=tuple(doubts(sources, read)), differs=tuple(differs))

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


def method_table(study: Study, shown: Mapping[str, str] | None = None) -> str:
    """A row for each method: the score with its spread over seeds and its interval, both metrics with theirs; then rows that
    read nothing. `shown`: other names for methods."""
    found = {metric: study.resampled(metric) for metric in ("score", *METRICS)}
    rows = []
    for name in study.answers:
        cells = [interval(estimate(found[metric][name])) for metric in ("score", *METRICS)]
        title = (shown or {}).get(name, name)
        rows.append([title, str(study.trainings[name]), mean_and_spread(spread(found["score"][name])), *cells])
    references = {metric: study.references(metric) for metric in ("score", *METRICS)}
    for name in REFERENCES:
        own = [percent(references[metric][name]) for metric in ("score", *METRICS)]
        rows.append([name, "–", own[0], *own])
    titles = [f"{title} [95%]" for title in ("score", *TITLES.values())]
    return markdown(["method", "trainings", "score ± over seeds", *titles], rows)


def pair_table(comparisons: Mapping[tuple[str, str], Comparison]) -> str:
    """A row for each pair of methods."""
    lines = [
        [text_cell("methods", in_markdown(f"{one} − {other}")), *comparison_cells(found)]
        for (one, other), found in comparisons.items()
    ]
    return markdown(*as_rows(lines))


def task_table(study: Study, metric: str, resampled: Mapping[str, Resampled], pair=None, found=None) -> str:
    """A row for each task: its metric, its items, every method's score, and the difference of one pair of methods."""
    lines = []
    for k, task in enumerate(study.tasks):
        by_class = is_by_class(task, metric)
        line = [text_cell("task", in_markdown(task.name))]
        line += [text_cell("metric", TITLES["macro_f1" if by_class else "accuracy"])]
        line += [text_cell("items", f"{task.items:,}")]
        line += [text_cell(name, percent(resampled[name].mean[k])) for name in study.answers]
        if pair:
            title = f"{pair[0]} − {pair[1]} [95%]"
            line += task_cells(found.per_task[task.name], found.adjusted[task.name], title)
        lines.append(line)
    return markdown(*as_rows(lines))


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs, the later method before the earlier: tables begin with the simplest methods."""
    return [(other, one) for one, other in itertools.combinations(names, 2)]
