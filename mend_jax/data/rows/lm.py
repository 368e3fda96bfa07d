"""The rows of stage "lm": plain text and in-context sequences."""

import functools

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data import sampling
from mend_jax.data.readers import Readers
from mend_jax.data.rows.order import document_order
from mend_jax.data.rows.windows import KEPT, TRIES, buckets, check_sequence_length
from mend_jax.data.stores import TaskStore
from mend_jax.data.symbols import Symbols


class SequenceRows:
    """The rows of an ordinary LM: plain text cut or packed to the sequence length, and in-context sequences of one task.

    With data.symbols, a share of the sequences of training have other labels (symbols.py), where one of them occurs twice.
    """

    separate_teacher, packing = False, None  # no distiller

    def __init__(self, config, store, documents, stores: list[TaskStore], train: bool, readers: Readers):
        self.config, self.seed, self.rows = config.data, config.seed, config.train.batch_size
        self.store, self.stores = store, stores
        self.size = self.config.sequence_length
        check_sequence_length(self.size, readers.window)
        self.share = self.config.text_share if store and stores else float(bool(store))
        self.documents = document_order(documents, self.seed, train) if store else None
        self.range, self.end_of_text = documents, readers.tokenizer.eos_token_id
        self.demo_buckets = (0,)
        self.query_buckets = (self.size,) if store else buckets(self.config.query_buckets, self.size)
        self.cut = [tasks.cut_lengths(self.config.max_input_tokens) for tasks in stores]
        self.symbols = Symbols(self.config.symbols if train and stores else 0, config, stores, readers)
        self.counts_outputs = config.loss.clm_tokens == "outputs"
        self.draw = functools.lru_cache(KEPT)(self.draw)

    def text_number(self, row: int) -> int | None:
        """The number of this row's plain text, counted from 0; None for an in-context sequence."""
        batch, place = divmod(row, self.rows)
        before, after = int(place * self.share + 1e-9), int((place + 1) * self.share + 1e-9)
        return batch * int(self.rows * self.share + 1e-9) + before if after > before else None

    def draw(self, row: int):
        """(task number, example numbers, words for labels or None) of an in-context sequence; half have K+1 examples or as
        many as fit, half have fewer."""
        rng = sampling.row_rng(self.seed, 3, row)
        for _ in range(TRIES):
            task = int(rng.integers(len(self.stores)))
            full = min(self.config.k + 1, len(self.stores[task]))
            count = full if rng.random() < 0.5 else int(rng.integers(1, full + 1))
            chosen = sampling.sample_demos(rng, len(self.stores[task]), count)
            if (symbols := self.symbols.draw(row, task)) is not None:
                gained = symbols.gained(self.stores[task], chosen)[:, 0]
                shown = chosen[: sampling.fit_demos(self.cut[task][chosen] + gained, self.size)]
                if len(set(symbols.labels[shown])) < len(shown):
                    return task, shown, symbols
            if fitting := sampling.fit_demos(self.cut[task][chosen], self.size):
                return task, chosen[:fitting], None
        raise UserError(
            f"Not even one example of task {self.stores[task].task!r} fits "
            f"config.data.sequence_length = {self.size}: raise it."
        )

    def lengths(self, row: int) -> tuple[int, int]:
        if self.text_number(row) is not None:
            return 0, self.size
        return 0, sum(len(piece) for pair in self._examples(row) for piece in pair)

    def tokens(self, row: int):
        number = self.text_number(row)
        if number is not None:
            return np.zeros(0, np.int32), [(self.text(row, number), 0)], None
        return np.zeros(0, np.int32), [(sampling.join_demos(self._examples(row)), 0)], None

    def _examples(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        task, chosen, symbols = self.draw(row)
        pairs = [self.stores[task].example(i, self.config.max_input_tokens) for i in chosen]
        return pairs if symbols is None else [(x, symbols.output(i)) for i, (x, _) in zip(chosen, pairs, strict=True)]

    def counted(self, row: int) -> np.ndarray:
        """The tokens that L_CLM covers with loss.clm_tokens="outputs", (T,) bool: all of a text, of a sequence the outputs, but not
        a word that stands for a label for the first time, which nothing tells."""
        if self.text_number(row) is not None:
            return np.ones(self.size, bool)
        _, chosen, symbols = self.draw(row)
        labels = np.arange(len(chosen)) if symbols is None else symbols.labels[chosen]
        told = [symbols is None or label in labels[:i] for i, label in enumerate(labels)]
        pairs = zip(self._examples(row), told, strict=True)
        return np.concatenate([np.repeat([False, known], [len(x), len(y)]) for (x, y), known in pairs])

    def text(self, row: int, number: int) -> np.ndarray:
        """A piece of one long document, or several short documents separated by the end-of-text token: (T,) int32."""
        rng = sampling.row_rng(self.seed, 4, row)
        ids = self.store[int(self.documents[number])]
        if len(ids) >= self.size:
            start = int(rng.integers(len(ids) - self.size + 1))
            return ids[start : start + self.size]
        pieces, length = [ids], len(ids)
        between = [np.asarray([self.end_of_text], np.int32)] if self.end_of_text is not None else []
        while length < self.size:
            more = [*between, self.store[int(rng.integers(self.range.start, self.range.stop))]]
            pieces += more
            length += sum(map(len, more))
        return np.concatenate(pieces)[: self.size]

    def describe(self, row: int) -> str:
        number = self.text_number(row)
        if number is not None:
            return f"a text that begins in document {int(self.documents[number])} of {self.config.text}"
        task, chosen, symbols = self.draw(row)
        others = "" if symbols is None else ", with words for its labels"
        return f"task {self.stores[task].task}{others}: examples {chosen.tolist()} (from 0)"
