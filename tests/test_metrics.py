"""Metrics against values computed by hand."""

import math

import pytest
from facts import says

from mend_jax.scoring.metrics import accuracy, aggregate, macro_f1, mean_and_std, percent, task_scores


def test_accuracy_ignores_surrounding_spaces():
    assert accuracy(["a", " b", "c", "a"], ["a", "b ", "a", "c"]) == 0.5


def test_macro_f1_by_hand():
    # a: TP 2, FP 1, FN 1 -> 4/6; b: TP 1, FP 1, FN 1 -> 2/4; c: TP 0, FN 1, FP 1 -> 0.
    golds = ["a", "a", "a", "b", "b", "c"]
    predictions = ["a", "a", "b", "b", "c", "a"]
    assert macro_f1(predictions, golds) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)


def test_macro_f1_counts_gold_classes_only():
    # b is predicted once and never gold: it costs a its recall, and adds no zero of its own (MetaICL's rule).
    assert macro_f1(["a", "b"], ["a", "a"]) == pytest.approx(2 / 3)


def test_macro_f1_equals_metaicl_precision_and_recall():
    golds, predictions = list("aabbbcd"), list("abbbacc")
    expected = []
    for label in sorted(set(golds)):
        hits = sum(p == g == label for p, g in zip(predictions, golds, strict=True))
        precision, recall = hits / max(1, predictions.count(label)), hits / golds.count(label)
        expected.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    assert macro_f1(predictions, golds) == pytest.approx(sum(expected) / len(expected))


def test_majority_guess_is_worth_less_in_macro_f1():
    scores = task_scores(["x"] * 10, ["x"] * 9 + ["y"], classification=True)
    assert scores["accuracy"] == 0.9
    assert scores["primary"] == "macro_f1"
    assert scores["score"] == scores["macro_f1"] == pytest.approx((18 / 19) / 2)
    assert task_scores(["x"], ["x"], classification=False)["primary"] == "accuracy"


def test_std_is_the_samples():
    mean, std = mean_and_std([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, std) == (3.0, pytest.approx(math.sqrt(2.5)))
    assert mean_and_std([0.7]) == (0.7, None)


def test_aggregate_is_the_mean_over_tasks_spread_over_seeds():
    def entry(f1, acc, classification):
        primary = "macro_f1" if classification else "accuracy"
        return {"macro_f1": f1, "accuracy": acc, "primary": primary, "score": f1 if classification else acc}

    result = aggregate(
        {
            "topic": {13: entry(0.4, 0.9, True), 21: entry(0.6, 0.9, True)},
            "choice": {13: entry(0.1, 0.2, False), 21: entry(0.1, 0.4, False)},
        }
    )
    assert result["score"]["per_seed"] == pytest.approx({13: 0.3, 21: 0.5})
    assert result["score"]["mean"] == pytest.approx(0.4)
    assert result["score"]["std"] == pytest.approx(math.sqrt(0.02))
    assert result["accuracy"]["mean"] == pytest.approx((0.9 + 0.2 + 0.9 + 0.4) / 4)
    assert result["per_task"]["topic"]["score"]["mean"] == pytest.approx(0.5)
    assert result["per_task"]["choice"]["primary"] == "accuracy"
    assert percent(result["score"]) == "40.00 ± 14.14"
    assert percent({"mean": 0.5, "std": None}) == "50.00"


def test_what_cannot_be_aggregated_is_said():
    one = {"macro_f1": 1.0, "accuracy": 1.0, "primary": "accuracy", "score": 1.0}
    with says("no task"):
        aggregate({})
    with says("Task b", "seed 21"):
        aggregate({"a": {13: one, 21: one}, "b": {13: one}})
    with says("no items"):
        accuracy([], [])
