"""Two tokenisations of one text, and where both end a token: there it can be cut so that two models read the same.

A mark stands at such a token. The k-th marked token of one tokenisation ends where the k-th of the other ends; the end
of the text, which is common to any two, is not marked. So two rows of bits say all, wherever the text is cut later.
"""

from collections.abc import Sequence

import numpy as np


def common_ends(first, second) -> tuple[np.ndarray, np.ndarray]:
    """Marks (T1,) and (T2,), bool, of one text's two tokenisations, each given as (start, end) characters per token."""
    (numbers1, places1), (numbers2, places2) = _ends(first), _ends(second)
    _, chosen1, chosen2 = np.intersect1d(places1, places2, assume_unique=True, return_indices=True)
    marks = np.zeros(len(first), bool), np.zeros(len(second), bool)
    marks[0][numbers1[chosen1]] = marks[1][numbers2[chosen2]] = True
    return marks


def cut(marks: Sequence[np.ndarray], limits: Sequence[int]) -> tuple[int, int]:
    """Tokens of the longest beginning of a text that is within both limits: (0, 0) where there is none."""
    if all(len(row) <= limit for row, limit in zip(marks, limits, strict=True)):
        return len(marks[0]), len(marks[1])
    ends = [np.flatnonzero(row) + 1 for row in marks]
    count = min(int(np.searchsorted(row, limit, side="right")) for row, limit in zip(ends, limits, strict=True))
    return (int(ends[0][count - 1]), int(ends[1][count - 1])) if count else (0, 0)


def _ends(offsets) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, places) of the tokens behind which the rest of the text begins: no later token reaches back.

    Not every token is one: a character of several bytes may be several tokens, a ligature several letters.
    """
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    reached = np.maximum.accumulate(ends)
    ahead = np.minimum.accumulate(starts[::-1])[::-1]
    numbers = np.flatnonzero((reached[:-1] <= ahead[1:]) & (reached[:-1] > 0))
    places = reached[numbers]
    last = np.diff(places, append=-1) != 0  # of several that end at one place
    return numbers[last], places[last]
