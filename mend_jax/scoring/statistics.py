"""How sure a score is, and a difference: bootstrap intervals, paired tests, references that read nothing.

Axes: T trainings of a method, S seeds (sets of demonstrations), N test items, C classes, R resamples, X = T S rows of answers.
Everything is a function of its arguments and a seed: the same answers give the same numbers to the last bit. The formulas and
their sources are in docs/statistics.md. Texts of answers are numbers here: scoring/answers.py reads them from an evaluation.

- **Resamples** (Efron and Tibshirani, 1993): trainings and seeds are drawn with replacement, one fewer than there are, which
  makes the variance of their mean unbiased (Rao and Wu, 1988); items are drawn within each task. Seeds that ask the same items
  get the same draw of items. The tasks stay: the interval is for these tasks.
- **Swaps**: under the hypothesis that two methods are alike, the answers of both to one item can be exchanged.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special  # scipy.stats cannot be imported where PyTorch is hidden (cli/imports.py)

from mend_jax.scoring.weighted import combined, in_parts, present, scores, tally

RESAMPLES, SWAPS, GUESSES = 1000, 2000, 200
LEVEL = 0.95  # of an interval
ALPHA = 1 - LEVEL  # of a test
POWER = 0.8  # with which the smallest visible difference would be found
METRICS = ("score", "accuracy", "macro_f1")  # "score": each task by its own
BLOCK = 250  # resamples that are in memory at a time


class Task(NamedTuple):
    """What a task asks, with its seeds in the order of all answers to it."""

    name: str
    primary: str  # "macro_f1" or "accuracy"
    golds: tuple[np.ndarray, ...]  # for each seed (N,) int, the correct answers
    options: tuple[tuple[tuple[int, ...], ...], ...]  # for each seed and item, the different answers to choose from

    @property
    def groups(self) -> list[list[int]]:
        """The places of the seeds that ask the same items, together."""
        groups: list[list[int]] = []
        for s in range(len(self.golds)):
            same = (g for g in groups if self._asks_same(g[0], s))
            group = next(same, None)
            groups.append([s]) if group is None else group.append(s)
        return groups

    def _asks_same(self, a: int, b: int) -> bool:
        return self.options[a] == self.options[b] and np.array_equal(self.golds[a], self.golds[b])

    @property
    def items(self) -> int:
        """Different test items, over all seeds."""
        return sum(len(self.golds[group[0]]) for group in self.groups)


Answers = Mapping[str, Sequence[np.ndarray]]  # of one method: {task: for each seed (T,N) int}


class Estimate(NamedTuple):
    """A value with its interval; fractions, not percent."""

    value: float
    low: float
    high: float
    std_error: float


class Difference(NamedTuple):
    """How much higher one method scores than another."""

    estimate: Estimate
    p: float  # of the test by swaps, two-sided
    visible: float  # the smallest difference that such items would show: with POWER, at ALPHA


class Comparison(NamedTuple):
    """One method against another, in all and by task; `adjusted` are the tasks' p after Holm's correction over tasks."""

    overall: Difference
    per_task: dict[str, Difference]
    adjusted: dict[str, float]
    wins: int
    losses: int


class Resampled(NamedTuple):
    """One method's scores: as they are, and in each resample."""

    values: np.ndarray  # (K,T,S): task, training, seed
    draws: np.ndarray  # (K,R)

    @property
    def mean(self) -> np.ndarray:
        return self.values.mean((1, 2))


def resample(
    tasks: Sequence[Task], answers: Mapping[str, Answers], metric="score", seed=0, resamples=RESAMPLES
) -> dict[str, Resampled]:
    """Each method's scores in the same resamples of seeds and items; its trainings are drawn for it alone.

    What is drawn depends on the names and numbers of tasks and seeds alone, so that a method's interval is the same beside
    other methods.
    """

    def scored(task, gold, rows, weights):
        return scores(gold, rows, weights, is_by_class(task, metric))

    return _resample(tasks, answers, scored, seed, resamples)


def resample_means(
    tasks: Sequence[Task], values: Mapping[str, Answers], seed=0, resamples=RESAMPLES
) -> dict[str, Resampled]:
    """As `resample`, of a number for each item in the place of its answer: {method: {task: for each seed (T,N) float}}."""

    def mean(task, gold, rows, weights):
        return rows @ weights / weights.sum(0)

    return _resample(tasks, values, mean, seed, resamples)


def _resample(tasks, answers, scored, seed, resamples) -> dict[str, Resampled]:
    """`scored(task, golds (N,), rows (X,N), weights (N,R)) -> (X,R)`."""
    seeds = len(tasks[0].golds)
    of_seeds = _few(np.random.default_rng([seed, 1]), seeds, resamples)
    of_trainings = {}
    for name, own in answers.items():
        count = len(own[tasks[0].name][0])
        of_trainings[name] = _few(np.random.default_rng([seed, 2, _number(name)]), count, resamples)
    shapes = {name: (len(tasks), len(weights), seeds) for name, weights in of_trainings.items()}
    found = {name: Resampled(np.empty(shape), np.zeros((shape[0], resamples))) for name, shape in shapes.items()}
    for k, task in enumerate(tasks):
        for g, group in enumerate(task.groups):
            random = np.random.default_rng([seed, 3, _number(task.name), g])
            gold = task.golds[group[0]]
            rows = {name: _rows(own[task.name], group) for name, own in answers.items()}
            for name, predicted in rows.items():
                as_they_are = scored(task, gold, predicted, np.ones((len(gold), 1)))
                found[name].values[k][:, group] = as_they_are.reshape(-1, len(group))
            for start in range(0, resamples, BLOCK):
                part = slice(start, min(start + BLOCK, resamples))
                weights = random.multinomial(len(gold), np.full(len(gold), 1 / len(gold)), part.stop - start).T
                for name, predicted in rows.items():
                    drawn = scored(task, gold, predicted, weights)
                    drawn = drawn.reshape(-1, len(group), part.stop - start)
                    of_both = of_trainings[name][:, None, part] * of_seeds[None, group, part]
                    found[name].draws[k, part] += (of_both * drawn).sum((0, 1))
    return found


def estimate(of: Resampled, minus: Resampled | None = None, task: int | None = None, highest: float = 1.0) -> Estimate:
    """A score, or a difference of two methods in the same resamples; of one task or of the mean over all. No score is above
    `highest` or below 0."""
    pick = slice(None) if task is None else slice(task, task + 1)
    values, draws = of.values[pick].mean(0), of.draws[pick].mean(0)
    spreads = [_variance_of_mean(values.mean(1))]
    by_seed, lowest = values.mean(0), 0.0
    if minus is not None:
        others = minus.values[pick].mean(0)
        draws, by_seed, lowest = draws - minus.draws[pick].mean(0), by_seed - others.mean(0), -highest
        spreads.append(_variance_of_mean(others.mean(1)))
    value = float(by_seed.mean())
    return _interval(value, draws, [*spreads, _variance_of_mean(by_seed)], lowest, highest)


def compare(
    tasks: Sequence[Task], one: Answers, other: Answers, resampled: tuple[Resampled, Resampled], metric="score", seed=0
) -> Comparison:
    """Tests `one` against `other`, item by item; `resampled` are theirs from `resample`."""
    by_task, overall = swap_test(tasks, one, other, metric, seed)
    a, b = resampled
    per_task = {}
    for k, task in enumerate(tasks):
        found = estimate(a, b, k)
        per_task[task.name] = Difference(found, by_task[k], smallest_visible(found.std_error, task.items))
    found = estimate(a, b)
    visible = smallest_visible(found.std_error, sum(task.items for task in tasks))
    adjusted = dict(zip(per_task, holm(by_task), strict=True))
    differences = a.mean - b.mean
    wins, losses = (int((sign * differences > 1e-12).sum()) for sign in (1, -1))
    return Comparison(Difference(found, overall, visible), per_task, adjusted, wins, losses)


def swap_test(
    tasks: Sequence[Task], one: Answers, other: Answers, metric="score", seed=0, swaps=SWAPS
) -> tuple[list[float], float]:
    """(p of each task, p of the mean over tasks), two-sided: how often a difference as large arises if the answers to each item
    are exchanged by chance. All trainings and seeds of an item are exchanged together, since they are not independent."""
    nulls, seen = np.zeros((len(tasks), swaps)), np.zeros(len(tasks))
    for k, task in enumerate(tasks):
        by_class = is_by_class(task, metric)
        for g, group in enumerate(task.groups):
            gold = task.golds[group[0]]
            a, b = _alike_many(_rows(one[task.name], group), _rows(other[task.name], group), len(group))
            random = np.random.default_rng([seed, 4, _number(task.name), g])
            share = len(group) / len(task.golds)
            ones = np.ones((len(gold), 1))
            seen[k] += share * (scores(gold, a, ones, by_class) - scores(gold, b, ones, by_class)).mean()
            for start in range(0, swaps, BLOCK):
                count = min(BLOCK, swaps - start)
                nulls[k, start : start + count] += share * _exchanged(gold, a, b, by_class, random, count)
    by_task = [_p(null, value) for null, value in zip(nulls, seen, strict=True)]
    return by_task, _p(nulls.mean(0), seen.mean())


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: below ALPHA they hold for all tests together."""
    order = np.argsort(ps, kind="stable")
    steps = np.maximum.accumulate((len(ps) - np.arange(len(ps))) * np.asarray(ps, float)[order])
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(1, steps)
    return adjusted.tolist()


def smallest_visible(std_error: float, items: int) -> float:
    """The difference that a test at ALPHA finds with POWER (Cohen, 1988), and no less than six items of one sign, without which
    no test on single items finds anything."""
    factor = special.ndtri(1 - ALPHA / 2) + special.ndtri(POWER)  # the normal's quantiles
    return float(max(factor * std_error, 6 / items))


def is_by_class(task: Task, metric: str) -> bool:
    """Whether `metric` of this task is Macro-F1."""
    return (task.primary if metric == "score" else metric) == "macro_f1"


def most_frequent(task: Task) -> list[np.ndarray]:
    """The answers (1,N) for each seed of always naming the commonest correct answer of the test items, or, where items have
    options of their own, the place in the list that is correct most often."""
    found = []
    for gold, options in zip(task.golds, task.options, strict=True):
        if len({frozenset(one) for one in options}) == 1:
            words, counts = np.unique(gold, return_counts=True)
            found.append(np.full((1, len(gold)), words[counts.argmax()]))
        else:
            places = [one.index(int(answer)) for one, answer in zip(options, gold, strict=True)]
            place = int(np.bincount(places).argmax())
            found.append(np.array([[one[min(place, len(one) - 1)] for one in options]]))
    return found


def guesses(task: Task, seed=0, count=GUESSES) -> list[np.ndarray]:
    """Answers (count,N) for each seed, drawn from each item's options by chance."""
    found = []
    for s, options in enumerate(task.options):
        random = np.random.default_rng([seed, 5, _number(task.name), s])
        sizes, width = np.array([len(one) for one in options]), max(len(one) for one in options)
        table = np.array([[*one, *[0] * (width - len(one))] for one in options])
        drawn = random.integers(0, sizes, (count, len(options)))
        found.append(table[np.arange(len(options)), drawn])
    return found


def _exchanged(gold, a, b, by_class, random, count):
    """(count,) differences of the scores of `a` and `b` after answers to a random half of the items have been exchanged."""
    swapped = random.integers(0, 2, (len(gold), count))
    there_are, found = present(gold, np.ones((len(gold), 1))), []
    for part in in_parts(len(a), np.broadcast_to(there_are, (len(there_are), count))):
        (a_kept, a_given), (b_kept, b_given) = (
            [tally(gold, rows[part], weights, by_class) for weights in (1 - swapped, swapped)] for rows in (a, b)
        )
        of_a, of_b = (
            combined(*(None if x is None else x + y for x, y in zip(*both, strict=True)), there_are, by_class)
            for both in ((a_kept, b_given), (b_kept, a_given))
        )
        found.append(of_a - of_b)
    return np.concatenate(found).mean(0)


def _rows(answers, group) -> np.ndarray:
    """(X,N) of the seeds of a group: training by training."""
    return np.stack([answers[s] for s in group], 1).reshape(-1, answers[group[0]].shape[1])


def _alike_many(a, b, seeds: int):
    """Both with the trainings of the one that has more; the other's are taken in turn again."""
    rows = max(len(a), len(b))
    return tuple(
        each.reshape(-1, seeds, each.shape[1])[np.arange(rows // seeds) % (len(each) // seeds)].reshape(rows, -1)
        for each in (a, b)
    )


def _few(random, count: int, resamples: int) -> np.ndarray:
    """(count,R) weights, whose sum is 1, of a draw of one fewer than `count` with replacement; of a single one, of itself."""
    drawn = max(1, count - 1)
    return random.multinomial(drawn, np.full(count, 1 / count), resamples).T / drawn


def _variance_of_mean(values: np.ndarray) -> tuple[float, int]:
    """(variance of their mean, its degrees of freedom)."""
    count = len(values)
    return (float(values.var(ddof=1)) / count if count > 1 else 0.0), count - 1


def _half_width(total: float, parts: list[tuple[float, int]]) -> float:
    """How far an interval of LEVEL reaches to each side for a variance in which these parts are estimated from few values: a mean
    of the quantiles of Student's t and, for the rest, the normal's, weighted by the variances (Cochran and Cox, 1957), times
    the standard deviation. Degrees of freedom for the sum (Satterthwaite, 1946) would make it too narrow: a part that is small
    by chance would count for little."""
    tail = (1 + LEVEL) / 2
    few = sum(part for part, _ in parts)
    total = max(total, few)
    quantiles = sum(part * special.stdtrit(degrees, tail) for part, degrees in parts if part > 0)
    return float((quantiles + (total - few) * special.ndtri(tail)) / np.sqrt(total)) if total > 0 else 0.0


def _interval(
    value: float, draws: np.ndarray, parts: list[tuple[float, int]], lowest: float, highest: float
) -> Estimate:
    """The value, `_half_width` to both sides, and no less than to the middle LEVEL of the draws, which may be skew."""
    half, tail = _half_width(float(draws.var()), parts), (1 + LEVEL) / 2
    low, high = np.quantile(draws, [1 - tail, tail]) - draws.mean()
    low, high = value + min(low, -half), value + max(high, half)
    return Estimate(value, float(max(low, lowest)), float(min(high, highest)), float(draws.std()))


def _p(null: np.ndarray, value: float) -> float:
    """Share of the swaps, the data themselves among them, with a difference at least as large (Phipson and Smyth, 2010)."""
    return float((1 + (np.abs(null) >= abs(value) - 1e-12).sum()) / (len(null) + 1))


def _number(name: str) -> int:
    return zlib.crc32(name.encode())
