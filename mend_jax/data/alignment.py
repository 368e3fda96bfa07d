"""Where two tokenisations of one text both end a token: a cut there gives two models the same text.

Such tokens are marked. The k-th marked token of one tokenisation ends where the k-th of the other ends. The end of the
text, which all tokenisations share, is not marked. So two rows of bits are enough, wherever the text is cut later.
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
    """Lengths, in both tokenisations, of the longest start of a text that is within both limits; (0, 0) if there is none."""
    if all(len(row) <= limit for row, limit in zip(marks, limits, strict=True)):
        return len(marks[0]), len(marks[1])
    ends = [np.flatnonzero(row) + 1 for row in marks]
    count = min(int(np.searchsorted(row, limit, side="right")) for row, limit in zip(ends, limits, strict=True))
    return (int(ends[0][count - 1]), int(ends[1][count - 1])) if count else (0, 0)


def _ends(offsets) -> tuple[np.ndarray, np.ndarray]:
    """(indices, positions) of the tokens after which the text can be cut: no later token reaches back before the position.

    Not every token is one: a character of several bytes may be several tokens, and a ligature several letters.
    """
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    reached = np.maximum.accumulate(ends)
    ahead = np.minimum.accumulate(starts[::-1])[::-1]
    numbers = np.flatnonzero((reached[:-1] <= ahead[1:]) & (reached[:-1] > 0))
    places = reached[numbers]
    last = np.diff(places, append=-1) != 0  # of several tokens that end at one position, the last
    return numbers[last], places[last]
