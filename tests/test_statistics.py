"""Intervals that cover, tests that hold their level, metrics that are those of scoring/metrics.py."""

import math

import numpy as np
import pytest
from scipy import stats

from mend_jax.scoring import metrics
from mend_jax.scoring import statistics as st
from mend_jax.scoring.weighted import scores

RUNS = 400
LEAST = 0.925  # that 95% intervals cover of so many, but for one time in a hundred


def task_of(golds, options=None, name="t", primary="accuracy"):
    """A task whose items all have the same options unless given."""
    golds = tuple(np.asarray(gold) for gold in golds)
    same = tuple(range(int(max(map(np.max, golds))) + 1))
    return st.Task(name, primary, golds, options or tuple(tuple(same for _ in gold) for gold in golds))


def simulated(random, tasks=3, seeds=5, items=40, right=0.6, **settings):
    """(tasks, answers to them, the true accuracy); the items are the same for all seeds."""
    golds = [random.integers(0, 2, items) for _ in range(tasks)]
    made = [task_of([gold] * seeds, name=f"task {k}") for k, gold in enumerate(golds)]
    return made, answered(random, made, right, **settings), right


def answered(random, tasks, right, trainings=1, spread=0.08, trained=0.0, hard=0.15):
    """One method's answers, where a seed and a training shift the chance that an item is answered correctly; items differ in how
    hard they are. Each of the three by its standard deviation."""
    seeds = len(tasks[0].golds)
    of_seed, of_training = random.normal(0, spread, seeds), random.normal(0, trained, trainings)
    answers = {}
    for task in tasks:
        gold = task.golds[0]
        chance = right + random.normal(0, hard, len(gold)) + of_seed[:, None] + of_training[:, None, None]
        correct = random.random((trainings, seeds, len(gold))) < chance
        answers[task.name] = [np.where(correct[:, s], gold, 1 - gold) for s in range(seeds)]
    return answers


def test_weighted_scores_are_those_of_the_repeated_items():
    random = np.random.default_rng(1)
    gold, predicted = random.integers(0, 4, 30), random.integers(0, 5, (3, 30))  # class 4 is never correct
    weights = random.multinomial(30, np.full(30, 1 / 30), 6).T
    for by_class, expected in ((True, metrics.macro_f1), (False, metrics.accuracy)):
        found = scores(gold, predicted, weights, by_class)
        for x in range(3):
            for r in range(6):
                rows = np.repeat(np.arange(30), weights[:, r])
                texts = [[str(w) for w in values[rows]] for values in (predicted[x], gold)]
                assert found[x, r] == pytest.approx(expected(*texts), abs=1e-12)


def test_same_answers_same_numbers_whatever_stands_beside_them():
    random = np.random.default_rng(2)
    tasks, a, _ = simulated(random)
    b = {name: [1 - rows for rows in own] for name, own in a.items()}
    alone, both = st.resample(tasks, {"a": a}), st.resample(tasks, {"b": b, "a": a})
    assert np.array_equal(alone["a"].draws, both["a"].draws)
    assert st.estimate(alone["a"]) == st.estimate(both["a"])
    assert st.swap_test(tasks, a, b) == st.swap_test(tasks, a, b)
    assert not np.array_equal(alone["a"].draws, st.resample(tasks, {"a": a}, seed=1)["a"].draws)


@pytest.mark.parametrize("hard", [0.05, 0.4])
@pytest.mark.parametrize(
    ("seeds", "trainings", "spread", "trained"),
    [(2, 1, 0.15, 0), (2, 1, 0.03, 0), (3, 1, 0.15, 0), (5, 1, 0.08, 0), (2, 3, 0.1, 0.1), (5, 4, 0.08, 0.06)],
)
def test_the_interval_covers_the_truth(seeds, trainings, spread, trained, hard):
    random, found, truth = (
        np.random.default_rng(3),
        [],
        0.5,
    )  # half, so that chances that are cut at 0 and 1 shift nothing
    for _ in range(RUNS):
        tasks, answers, _ = simulated(
            random, 3, seeds, right=truth, trainings=trainings, spread=spread, trained=trained, hard=hard
        )
        found.append(st.estimate(st.resample(tasks, {"a": answers}, resamples=250)["a"]))
    assert np.mean([one.low <= truth <= one.high for one in found]) >= LEAST
    # Half as wide again as one that takes Student's t times the true standard deviation, at most: the bootstrap of both seeds and
    # items sees the chance in single answers up to three times.
    half = np.median([one.high - one.low for one in found]) / 2
    fewest = min(seeds, trainings) if trainings > 1 else seeds
    assert half <= 1.5 * stats.t.ppf(0.975, fewest - 1) * np.std([one.value for one in found])


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_interval_of_a_difference_covers_it(seeds):
    random, inside = np.random.default_rng(4), []
    for _ in range(RUNS):
        tasks, answers, _ = simulated(random, 3, seeds, right=0.5, spread=0.15)
        both = st.resample(tasks, {"a": answers, "b": answered(random, tasks, 0.5, spread=0.15)}, resamples=250)
        found = st.estimate(both["a"], both["b"])
        inside.append(found.low <= 0 <= found.high)
        assert -1 <= found.low <= found.value <= found.high <= 1
    assert np.mean(inside) >= LEAST


def test_a_score_near_the_end_stays_a_score():
    gold = np.zeros(40, int)
    answers = {"t": [np.array([[0] * 39 + [1]]), np.zeros((1, 40), int)]}
    found = st.estimate(st.resample([task_of([gold] * 2, options=(((0, 1),) * 40,) * 2)], {"a": answers})["a"])
    assert 0 <= found.low < 0.95 and found.high == 1


def test_the_variance_of_few_seeds_is_not_too_small():
    gold = np.zeros(20, int)
    right = np.array([10, 12, 14, 16, 18])  # of 20
    rows = [np.array([[0] * n + [1] * (20 - n)]) for n in right]
    # With many copies of the items the spread over seeds alone is left.
    task = task_of([np.repeat(gold, 100)] * 5)
    answers = {"t": [np.repeat(row, 100, axis=1) for row in rows]}
    found = st.resample([task], {"a": answers}, resamples=1500)["a"]
    assert found.draws.var() == pytest.approx(
        np.var(right / 20, ddof=1) / 5, rel=0.12
    )  # that of five draws of five is 0.8 of it
    # Student's t with 4 degrees of freedom, not the normal's 1.96
    width = st.estimate(found).high - st.estimate(found).low
    assert width == pytest.approx(2 * stats.t.ppf(0.975, 4) * found.draws.std(), rel=0.12)


def test_trainings_that_differ_make_the_interval_wider():
    random = np.random.default_rng(5)
    tasks, answers, _ = simulated(random, trainings=3, trained=0.2, spread=0.01)
    one = {name: [rows[:1] for rows in own] for name, own in answers.items()}
    wide, narrow = (st.estimate(st.resample(tasks, {"a": own})["a"]) for own in (answers, one))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_seeds_with_the_same_items_share_a_draw_and_others_do_not():
    random = np.random.default_rng(6)
    gold, other = random.integers(0, 2, 50), random.integers(0, 2, 50)
    answer = random.integers(0, 2, (1, 50))
    shared, own = task_of([gold] * 4), task_of([gold, other, other[::-1], 1 - gold])
    assert shared.groups == [[0, 1, 2, 3]] and shared.items == 50
    assert own.groups == [[0], [1], [2], [3]] and own.items == 200
    # The same answers of all seeds are no more items than one seed's.
    same = st.resample([shared], {"a": {"t": [answer] * 4}})["a"]
    assert same.draws.std() == pytest.approx(math.sqrt(same.mean[0] * (1 - same.mean[0]) / 50), rel=0.1)


@pytest.mark.parametrize("primary", ["accuracy", "macro_f1"])
def test_p_is_uniform_where_methods_are_alike(primary):
    random, ps = np.random.default_rng(7), []
    for _ in range(200):
        gold = random.integers(0, 3, 60)
        task = task_of([gold] * 2, primary=primary)
        a, b = (
            [np.where(random.random((1, 60)) < 0.5, gold, random.integers(0, 3, 60)) for _ in range(2)] for _ in "ab"
        )
        ps.append(st.swap_test([task], {"t": a}, {"t": b}, swaps=199)[1])
    below = [np.mean(np.array(ps) <= level) for level in (0.05, 0.2, 0.5)]
    assert below[0] <= 0.1 and 0.12 <= below[1] <= 0.29 and 0.4 <= below[2] <= 0.6


def test_a_difference_is_found_and_its_sign_is_right():
    random = np.random.default_rng(8)
    tasks, good, _ = simulated(random, right=0.8)
    bad = {
        name: [np.where(random.random(rows.shape) < 0.4, 1 - rows, rows) for rows in own] for name, own in good.items()
    }
    drawn = st.resample(tasks, {"good": good, "bad": bad})
    found = st.compare(tasks, good, bad, (drawn["good"], drawn["bad"]))
    assert found.overall.p < 0.01 and found.overall.estimate.low > 0 and (found.wins, found.losses) == (3, 0)
    assert found.overall.estimate.value == pytest.approx(drawn["good"].mean.mean() - drawn["bad"].mean.mean())
    assert all(found.adjusted[task.name] >= found.per_task[task.name].p for task in tasks)
    nothing = st.compare(tasks, good, good, (drawn["good"], drawn["good"]))
    assert (
        nothing.overall.p == 1
        and nothing.overall.estimate[:3] == (0, 0, 0)
        and (nothing.wins, nothing.losses) == (0, 0)
    )


def test_a_method_trained_once_is_compared_with_one_trained_thrice():
    random = np.random.default_rng(9)
    tasks, answers, _ = simulated(random, trainings=3)
    one = {name: [rows[:1] for rows in own] for name, own in answers.items()}
    drawn = st.resample(tasks, {"three": answers, "one": one})
    found = st.compare(tasks, answers, one, (drawn["three"], drawn["one"]))
    assert 0 < found.overall.p <= 1 and found.overall.estimate.low <= found.overall.estimate.value


def test_holm_by_hand():
    # .005 x 4, .01 x 3, .03 x 2, and no less than the one before: .04 x 1 becomes .06.
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.5, 0.9]) == [1, 1]
    assert st.holm([0.02]) == [0.02]


def test_a_small_test_set_cannot_show_a_small_difference():
    assert st.smallest_visible(0.01, 1000) == pytest.approx(0.01 * (1.959964 + 0.841621), rel=1e-5)
    assert st.smallest_visible(0.0, 30) == pytest.approx(0.2)  # six items of thirty


def test_references_read_nothing():
    gold = np.array([0, 0, 0, 1, 2, 0])
    task = task_of([gold], primary="macro_f1")
    assert st.most_frequent(task)[0].tolist() == [[0] * 6]
    # Items with options of their own: the place that is correct most often.
    own = task_of([np.array([4, 5, 8])], options=(((3, 4), (6, 5), (8, 7)),))
    assert st.most_frequent(own)[0].tolist() == [[4, 5, 7]]
    drawn = st.guesses(task_of([np.arange(2).repeat(300)]))[0]
    assert set(np.unique(drawn)) == {0, 1} and drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert all(
        set(column) <= set(options) for column, options in zip(st.guesses(own)[0].T, own.options[0], strict=True)
    )
