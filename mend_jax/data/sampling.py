"""The content of a context and a query: small pure functions over token ids (numpy arrays or lists).

D is the concatenation x1 y1 x2 y2 ... of K demonstrations, every x and y with the template's texts around it (paper, section 3.3).
"""

from typing import NamedTuple

import numpy as np

RELEASE_DISTILLER_TOKENS = 642  # the public release: fewer than 643 tokens for the distiller
RELEASE_TEACHER_TOKENS = 766  # and fewer than 767 for the teacher
EMPTY = -1  # in a context of chunks, a position without a token


def row_rng(seed: int, *position: int) -> np.random.Generator:
    """The random generator of one row or window, a function of the seed and its position alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *position))))


def cut_input(x, limit: int):
    """The first `limit` tokens of an input. An output is never cut."""
    return x[:limit]


def fit_demos(lengths, budget: int) -> int:
    """How many demonstrations, counted from the first, fit into `budget` tokens; the others are omitted (paper, section 4.1)."""
    return int(np.searchsorted(np.cumsum(lengths), budget, side="right"))


def sample_demos(rng: np.random.Generator, count: int, k: int) -> np.ndarray:
    """Indices of k distinct examples out of `count`, in random order: (k,) int64. Raises ValueError if k > count."""
    return rng.choice(count, size=k, replace=False)


def join_demos(pairs) -> np.ndarray:
    """The context D of (x, y) pairs of token ids: (N,) int32."""
    pieces = [piece for pair in pairs for piece in pair]
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces]) if pieces else np.zeros(0, np.int32)


class Packing(NamedTuple):
    """The layout of contexts that are read in chunks; a chunk is a row of `columns` tokens, `EMPTY` at its end."""

    columns: int  # tokens in a chunk, at most
    demos: int  # demonstrations in a chunk, at most
    chunks: int  # chunks in a context, at most; what does not fit is left out

    def chunk_of(self, lengths) -> list[int]:
        """The chunk of each demonstration, given their `lengths` in tokens; stops at the first that does not fit."""
        placed, chunk, free, room = [], -1, 0, 0
        for length in map(int, lengths):
            if length > self.columns:
                break
            if length > free or not room:
                chunk, free, room = chunk + 1, self.columns, self.demos
            if chunk >= self.chunks:
                break
            placed.append(chunk)
            free, room = free - length, room - 1
        return placed

    def pieces(self, length: int) -> list[int]:
        """The lengths of the pieces, one per chunk, that a text without demonstrations is cut into."""
        return [min(self.columns, length - start) for start in range(0, length, self.columns)]

    def buckets(self, sizes, *chunks: int) -> tuple[int, ...]:
        """The padded sizes of contexts: `sizes` in tokens, rounded up to whole chunks, and these numbers of `chunks`, of which the
        largest is the most that there are."""
        most = min(max(chunks), self.chunks)
        counts = {min(count, most) for count in (*(-(-size // self.columns) for size in sizes), *chunks)}
        return tuple(self.columns * count for count in sorted(counts))

    def length(self, lengths) -> int:
        """Columns of a context whose demonstrations have these lengths in tokens."""
        return self.columns * (max(self.chunk_of(lengths), default=-1) + 1)

    def lay_out(self, pieces) -> np.ndarray:
        """The context of demonstrations, each an array of token ids: (chunks * columns,) int32."""
        placed = self.chunk_of([len(piece) for piece in pieces])
        chunks = np.full((max(placed, default=-1) + 1, self.columns), EMPTY, np.int32)
        filled = [0] * len(chunks)
        for piece, chunk in zip(pieces, placed, strict=False):
            chunks[chunk, filled[chunk] : filled[chunk] + len(piece)] = piece
            filled[chunk] += len(piece)
        return chunks.reshape(-1)


def split_text(length: int, beta: float, budget: int) -> tuple[int, int]:
    """(context, continuation) lengths of a text: the share beta, at most `budget`, then the remaining share (1 - beta).

    Each side has at least one token (paper, section 3.2).
    """
    share = min(max(int(beta * length), 1), length - 1)
    return min(share, budget), length - share


def demo_budget(max_demo_tokens: int, llm_window: int, query_length: int, distiller_window: int, vectors: int) -> int:
    """The most tokens a context may have: the LLM also reads the query, and the distiller its l placeholders (`vectors`)."""
    return min(max_demo_tokens, llm_window - query_length, distiller_window - vectors)


def release_truncation(demos, budget: int, teacher_budget: int):
    """(distiller's, teacher's) contexts as the public release cuts them: the last example is cut to fit."""
    return demos[: min(budget, RELEASE_DISTILLER_TOKENS)], demos[: min(teacher_budget, RELEASE_TEACHER_TOKENS)]


def bucket(length: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `length`. Raises ValueError if none does."""
    for size in buckets:
        if length <= size:
            return size
    raise ValueError(f"{length} tokens fit no bucket of {buckets}")


def window_plan(demo_lengths, query_lengths, demo_buckets, query_buckets, batches: int, rng) -> np.ndarray:
    """Rows of one window grouped into batches of similar length, the batches in random order: (batches, B) row numbers.

    Rows are sorted by the context's bucket, then by the query's length: ascending in one bucket, descending in the next,
    so that a batch that spans two buckets has queries of similar length.
    """
    demo_bucket = np.searchsorted(demo_buckets, demo_lengths)
    direction = np.where(demo_bucket % 2, -1, 1)
    order = np.lexsort((demo_lengths, direction * np.searchsorted(query_buckets, query_lengths), demo_bucket))
    return order.reshape(batches, -1)[rng.permutation(batches)]
