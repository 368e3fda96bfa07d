"""Symbol tuning: random words in the place of a task's labels, others in every context (Wei et al., 2023, arXiv:2305.08298).

Such a label says nothing by itself, and was met in no other context: which word answers which input can only be read from the
demonstrations.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data import sampling
from mend_jax.data.readers import Readers
from mend_jax.data.stores import TaskStore
from mend_jax.data.templates import chosen

MOST_LABELS = 20  # the outputs of a task that has more different ones are answers, not labels
WORD = re.compile("[a-z][a-z0-9]{2,}")
WORD_STARTS = "Ġ", "▁"  # what a token begins with if a space stands before it


class Renamed(NamedTuple):
    """The words that one context has in the place of its task's labels."""

    labels: np.ndarray  # (examples,) int64: the number of each example's label, of all examples of the task
    words: tuple[tuple[np.ndarray, ...], ...]  # for each tokenizer the ids of every label's word, as an output

    def output(self, example: int, reading: int = 0) -> np.ndarray:
        """The ids of an example's output, as `Reading.example` has them."""
        return self.words[reading][self.labels[example]]

    def gained(self, store: TaskStore, examples) -> np.ndarray:
        """The tokens by which examples of the task get longer: (examples, tokenizers) int64, negative where shorter."""
        lengths = [np.asarray([len(word) for word in own])[self.labels[examples]] for own in self.words]
        return np.stack(lengths, 1) - np.stack([own.lengths[examples, 1] for own in store.readings], 1)

    def can_be_read(self, demos, queries) -> bool:
        """Whether the label of every query is one that a demonstration shows."""
        return set(self.labels[queries]) <= set(self.labels[demos])


class Symbols:
    """Draws the words of a row's labels, as a function of (seed, row)."""

    def __init__(self, share: float, config, stores: Sequence[TaskStore], readers: Readers):
        """
        Args:
            share: of the rows of tasks with labels, 0 to 1.
            config: a whole run's.
        Raises:
            UserError: the LLM's vocabulary has not enough words.
        """
        self.share, self.seed = share, config.seed
        if share:
            self.labels = [label_numbers(store) for store in stores]
            tokenizers = [readers.tokenizer, readers.distiller_tokenizer][: len(stores[0].readings)]
            self.words = _as_outputs(tokenizers, chosen(config.data.template).answer)

    def draw(self, row: int, task: int) -> Renamed | None:
        """None: the row keeps the labels of the task with this number, or the task has none."""
        if not self.share or self.labels[task] is None:
            return None
        rng = sampling.row_rng(self.seed, 8, row)
        if rng.random() >= self.share:
            return None
        numbers = rng.choice(len(self.words[0]), self.labels[task].max() + 1, replace=False)
        return Renamed(self.labels[task], tuple(tuple(own[n] for n in numbers) for own in self.words))


def label_numbers(store: TaskStore) -> np.ndarray | None:
    """The number of each example's output among the task's different ones: (examples,) int64. None if there are more than
    `MOST_LABELS` or only one, or if most occur once: those are no labels."""
    own, numbers = store.readings[0], {}
    found = [numbers.setdefault(own.output(i).tobytes(), len(numbers)) for i in range(len(store))]
    return np.asarray(found) if 1 < len(numbers) <= min(MOST_LABELS, len(store) // 2) else None


def _as_outputs(tokenizers, answer: str) -> list[list[np.ndarray]]:
    """The words of the first tokenizer's vocabulary as outputs, in the ids of each tokenizer."""
    words = vocabulary_words(tokenizers[0])
    if len(words) < MOST_LABELS:
        raise UserError(
            f"config.data.symbols needs {MOST_LABELS} words in the LLM's vocabulary, of three or more letters, which has "
            f"{len(words)}: set it to 0."
        )
    read = [one([answer + word for word in words], add_special_tokens=False)["input_ids"] for one in tokenizers]
    return [[np.asarray(ids, np.int32) for ids in own] for own in read]


def vocabulary_words(tokenizer) -> list[str]:
    """The words of lower-case ASCII letters, and digits behind them, that begin a token after a space; without such tokens, as in
    a vocabulary of whole words, all that a token spells. Sorted."""
    tokens = list(tokenizer.get_vocab())
    starting = [token[1:] for token in tokens if token.startswith(WORD_STARTS)]
    return sorted({word for word in starting or tokens if WORD.fullmatch(word)})
