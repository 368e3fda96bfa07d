"""Finetuning's rows: demonstrations and queries of one task."""

import functools
import logging
from typing import NamedTuple

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data import sampling
from mend_jax.data.readers import Readers
from mend_jax.data.rows.windows import KEPT, TRIES, buckets, budgets, largest_budgets
from mend_jax.data.stores import TaskStore
from mend_jax.data.symbols import Renamed, Symbols


class Drawn(NamedTuple):
    """What stands in a row: numbers of examples of one task."""

    task: int
    demos: np.ndarray
    queries: np.ndarray
    budget: int  # tokens that the demonstrations may have
    symbols: Renamed | None = None  # the words in the place of the task's labels


class TaskRows:
    """Finetuning: K demonstrations and a query of one task, drawn uniformly at random (paper, section 3.3).

    With data.queries > 1, several queries of the same task follow the same demonstrations. With data.symbols, a share of the
    rows of `train` have other labels (symbols.py), where the label of every query is among the demonstrations.
    """

    counts_outputs = False

    def __init__(self, config, stores: list[TaskStore], train: bool, readers: Readers):
        windows = readers.windows
        self.config, self.stores, self.windows, self.seed = config.data, stores, windows, config.seed
        self.input_columns = stores[0].input_columns(config.data.max_input_tokens)
        self.contexts = readers.reads_demos or bool(config.loss.kd)  # else no model reads them
        self.packing = readers.packing
        self.draw = functools.lru_cache(KEPT)(self.draw)
        check_enough_examples(stores, self.config.k, self.config.queries)
        self.two_readings = len(stores[0].readings) == 2
        self.separate_teacher = self.two_readings or self.packing is not None
        self.budgets = functools.partial(budgets, config, windows, two_readings=self.two_readings)
        limit = self.limit = min(max(self.config.query_buckets), windows[0] - readers.positions(config))
        self.cut = [store.cut_lengths(self.config.max_input_tokens) for store in stores]
        self.kept = [store.shared_inputs(self.config.max_input_tokens) for store in stores]
        self.shown = [store.shown_lengths(kept) for store, kept in zip(stores, self.kept, strict=True)]
        self.queries = [np.flatnonzero(lengths <= limit) for lengths in self.cut]  # an output is never cut
        self.readable = self._readable()
        if train:
            self._warn_of_long_examples()
        for store, queries in zip(stores, self.queries, strict=True):
            if not len(queries):
                raise UserError(
                    f"No example of task {store.task!r} fits {limit} tokens, the largest of config.data.query_buckets "
                    f"that the LLM's window of {windows[0]} allows: leave the task out or raise that bucket."
                )
        self.query_buckets = buckets(self.config.query_buckets, limit)
        self.demo_buckets = (
            buckets(self.config.demo_buckets, max(largest_budgets(config, windows, self.two_readings)))
            if self.contexts
            else (0,)
        )
        self.teacher_buckets = self.demo_buckets  # of whole contexts
        if self.packing is not None:
            k = self.config.k  # chunks at least, and at most
            self.demo_buckets = self.packing.buckets(self.demo_buckets, -(-k // self.packing.demos), k)
        self.teacher_size = min(sampling.RELEASE_TEACHER_TOKENS, windows[0])
        self.symbols = Symbols(self.config.symbols if train and self.contexts else 0, config, stores, readers)

    def draw(self, row: int) -> Drawn:
        rng = sampling.row_rng(self.seed, 1, row)
        for _ in range(TRIES):
            task = int(rng.integers(len(self.stores)))
            query = int(rng.choice(self.queries[task]))
            others = self.readable[task][self.readable[task] != query]  # any example but the query
            chosen = others[sampling.sample_demos(rng, len(others), min(self.config.k, len(others)))]
            queries = self._with_others(row, task, chosen, query)
            symbols = self.symbols.draw(row, task)
            if symbols is not None:
                drawn = self._fitted(task, chosen, queries, symbols)
                if symbols.can_be_read(drawn.demos, queries) and self._asked(drawn).max() <= self.limit:
                    return drawn
            drawn = self._fitted(task, chosen, queries)
            if len(drawn.demos):
                return drawn
        raise UserError(
            f"Not even one demonstration of task {self.stores[task].task!r} fits the context's budget of {drawn.budget} "
            f"tokens{self._or_a_chunk()}: raise config.data.max_demo_tokens{', config.prefix.chunk_tokens' * bool(self.packing)}, "
            "lower config.data.max_input_tokens or leave the task out."
        )

    def _or_a_chunk(self) -> str:
        return "" if self.packing is None else f" and a chunk of {self.packing.columns}"

    def _readable(self) -> list[np.ndarray]:
        """The examples of each task that can be demonstrations: of chunks those that fit one, else all."""
        if self.packing is None or not self.contexts:
            return [np.arange(len(store)) for store in self.stores]
        return [np.flatnonzero(shown[:, -1] <= self.packing.columns) for shown in self.shown]

    def _warn_of_long_examples(self) -> None:
        left_out = [len(store) - len(fits) for store, fits in zip(self.stores, self.readable, strict=True)]
        if any(left_out):
            most = int(np.argmax([count / len(store) for count, store in zip(left_out, self.stores, strict=True)]))
            logging.warning(
                "%d of %d examples, in %d tasks, fit no chunk of %d tokens and are no demonstrations in training; most of task %s, "
                "%d of %d (prefix.chunk_tokens, data.max_input_tokens).",
                sum(left_out),
                sum(map(len, self.stores)),
                np.count_nonzero(left_out),
                self.packing.columns,
                self.stores[most].task,
                left_out[most],
                len(self.stores[most]),
            )

    def _fitted(self, task: int, chosen, queries, symbols: Renamed | None = None) -> Drawn:
        """The row with as many of the chosen demonstrations as fit, counted from the first."""
        whole = Drawn(task, chosen, queries, 0, symbols)
        allowed = self.budgets(int(self._asked(whole).max()))
        whole = whole._replace(budget=min(allowed))
        if self.config.release_truncation or not self.contexts:
            return whole
        shown = self._shown(whole)
        if symbols is not None and self.packing is not None:  # their labels may be longer
            fits = shown[:, -1] <= self.packing.columns
            whole, chosen, shown = whole._replace(demos=chosen[fits]), chosen[fits], shown[fits]
        fitting = min(map(sampling.fit_demos, shown.T, allowed))
        if self.packing is not None:  # the teacher does not see what fits no chunk either
            fitting = len(self.packing.chunk_of(shown[:fitting, -1]))
        return whole._replace(demos=chosen[:fitting])

    def _asked(self, drawn: Drawn) -> np.ndarray:
        """The length of each query, in the LLM's tokens."""
        lengths = self.cut[drawn.task][drawn.queries]
        return lengths if drawn.symbols is None else lengths + self._gained(drawn, drawn.queries)[:, 0]

    def _shown(self, drawn: Drawn) -> np.ndarray:
        """The length of each demonstration: (demonstrations, tokenizers)."""
        lengths = self.shown[drawn.task][drawn.demos]
        return lengths if drawn.symbols is None else lengths + self._gained(drawn, drawn.demos)

    def _gained(self, drawn: Drawn, examples) -> np.ndarray:
        return drawn.symbols.gained(self.stores[drawn.task], examples)

    def _with_others(self, row: int, task: int, chosen, query: int) -> np.ndarray:
        """The query and data.queries - 1 others of its task: no demonstration, and none twice if there are enough examples."""
        count = self.config.queries - 1
        if not count:  # rows with one query do not depend on this
            return np.asarray([query])
        left = np.setdiff1d(self.queries[task], [*chosen, query])
        left = left if len(left) else np.asarray([query])  # all others are too long
        others = sampling.row_rng(self.seed, 6, row).choice(left, count, replace=len(left) < count)
        return np.asarray([query, *others])

    def lengths(self, row: int) -> tuple[int, ...]:
        drawn = self.draw(row)
        shown, asked = self._shown(drawn)[:, -1], map(int, self._asked(drawn))
        context = int(shown.sum()) if self.contexts else 0
        if self.packing is not None:
            return self.packing.length(shown), *asked
        if self.config.release_truncation:
            context = min(context, drawn.budget, sampling.RELEASE_DISTILLER_TOKENS)
        return context, *asked

    def context_tokens(self, row: int) -> int:
        return int(self._shown(self.draw(row))[:, -1].sum()) if self.contexts else 0

    def teacher_length(self, row: int) -> int:
        return int(self._shown(self.draw(row))[:, 0].sum())

    def target_length(self, row: int) -> int:
        drawn = self.draw(row)
        return max(len(self._example(drawn, query, 0, 0)[1]) for query in drawn.queries)

    def tokens(self, row: int):
        drawn, limit = self.draw(row), self.config.max_input_tokens
        asked = [self._example(drawn, query, 0, limit) for query in drawn.queries]
        asked = [(np.concatenate([x, y]).astype(np.int32), len(x)) for x, y in asked]
        teacher, demos = self._context(drawn, 0), self._context(drawn, -1, self.packing)
        if not self.config.release_truncation:
            return demos, asked, teacher if self.separate_teacher else None
        longest = max(len(query) for query, _ in asked)
        demos, teacher = sampling.release_truncation(demos, drawn.budget, self.windows[0] - longest)
        return demos, asked, teacher

    def _example(self, drawn: Drawn, i: int, reading: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        x, y = self.stores[drawn.task].readings[reading].example(i, limit)
        return x, y if drawn.symbols is None else drawn.symbols.output(i, reading)

    def _context(self, drawn: Drawn, reading: int, packing=None) -> np.ndarray:
        kept = self.kept[drawn.task]
        examples = [self._example(drawn, i, reading, kept[i, reading]) for i in (drawn.demos if self.contexts else [])]
        return (
            sampling.join_demos(examples) if packing is None else packing.lay_out([np.concatenate(e) for e in examples])
        )

    def describe(self, row: int) -> str:
        drawn = self.draw(row)
        asked = ", ".join(map(str, drawn.queries))
        others = "" if drawn.symbols is None else ", with words for its labels"
        return f"task {self.stores[drawn.task].task}{others}: query {asked}, demonstrations {drawn.demos.tolist()} (examples from 0)"


def check_enough_examples(stores: list[TaskStore], k: int, queries: int = 1) -> None:
    """Raises UserError for the first task that has fewer examples than K demonstrations and a row's queries need."""
    needed, asked = k + queries, "a query" if queries == 1 else f"config.data.queries = {queries}"
    for store in stores:
        if len(store) < needed:
            raise UserError(
                f"Task {store.task!r} has {len(store)} examples, but config.data.k = {k} demonstrations and {asked} "
                f"need {needed}: lower {'k' if queries == 1 else 'k or queries'}, or leave the task out."
            )
