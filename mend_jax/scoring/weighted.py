"""Accuracy and Macro-F1 of items that count several times, or not at all: many weights at once, as resamples need them.

The metrics are those of metrics.py. Axes: X rows of answers, N items, R weightings, C classes. Answers are numbers.
"""

import numpy as np
from scipy import sparse

LARGEST = 5_000_000  # numbers in the tally of some rows


def scores(gold: np.ndarray, predicted: np.ndarray, weights: np.ndarray, by_class: bool) -> np.ndarray:
    """(X,R): the accuracy or Macro-F1 of answers (X,N) to items that count `weights` (N,R) times."""
    there_are = present(gold, weights)
    parts = in_parts(len(predicted), there_are)
    return np.concatenate(
        [combined(*tally(gold, predicted[part], weights, by_class), there_are, by_class) for part in parts]
    )


def in_parts(rows: int, there_are: np.ndarray) -> list[slice]:
    """So many rows at a time that their tallies are small, even where every item has a class of its own."""
    step = max(1, LARGEST // there_are.size)
    return [slice(start, start + step) for start in range(0, rows, step)]


def tally(gold, predicted, weights, by_class):
    """(right, said): (X,R) correct answers and None; or by class, (X,C,R) correct answers and all, of classes among the golds."""
    if not by_class:
        return (predicted == gold) @ weights.astype(float), None
    classes, inside = np.unique(gold, return_inverse=True)
    place = np.searchsorted(classes, predicted).clip(max=len(classes) - 1)
    known = classes[place] == predicted

    def count(chosen):
        row, item = np.nonzero(chosen)
        at = row * len(classes) + place[row, item]
        shape = len(predicted) * len(classes), len(gold)
        table = sparse.csr_array((np.ones(len(row)), (at, item)), shape)
        return (table @ weights.astype(float)).reshape(len(predicted), len(classes), -1)

    return count(known & (place == inside)), count(known)


def present(gold, weights):
    """(C,R): how many items of each class there are."""
    _, inside = np.unique(gold, return_inverse=True)
    table = sparse.csr_array((np.ones(len(gold)), (inside, np.arange(len(gold)))))
    return table @ weights.astype(float)


def combined(right, said, there_are, by_class) -> np.ndarray:
    """(X,R) scores of a `tally` and of what is `present`."""
    if not by_class:
        return right / there_are.sum(0)
    there = there_are > 0
    f1 = np.divide(2 * right, said + there_are, out=np.zeros_like(right), where=there)
    return f1.sum(1) / there.sum(0)
