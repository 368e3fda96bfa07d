"""Finetuning's rows: demonstrations and queries of one task."""

import functools

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data import sampling
from mend_jax.data.readers import Readers
from mend_jax.data.rows.windows import KEPT, TRIES, buckets, budgets, largest_budgets
from mend_jax.data.stores import TaskStore


class TaskRows:
    """Finetuning: K demonstrations and a query of one task, drawn uniformly at random (paper, section 3.3).

    With data.queries > 1, several queries of the same task follow the same demonstrations.
    """

    def __init__(self, config, stores: list[TaskStore], readers: Readers):
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
        limit = min(max(self.config.query_buckets), windows[0] - readers.positions(config))
        self.cut = [store.cut_lengths(self.config.max_input_tokens) for store in stores]
        self.kept = [store.shared_inputs(self.config.max_input_tokens) for store in stores]
        self.shown = [store.shown_lengths(kept) for store, kept in zip(stores, self.kept, strict=True)]
        self.queries = [np.flatnonzero(lengths <= limit) for lengths in self.cut]  # an output is never cut
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
            self.demo_buckets = self.packing.buckets(self.demo_buckets[-1])
        self.teacher_size = min(sampling.RELEASE_TEACHER_TOKENS, windows[0])

    def draw(self, row: int):
        """(task number, demonstration numbers, query numbers, budget) of a row."""
        rng = sampling.row_rng(self.seed, 1, row)
        for _ in range(TRIES):
            task = int(rng.integers(len(self.stores)))
            query = int(rng.choice(self.queries[task]))
            chosen = sampling.sample_demos(rng, len(self.stores[task]) - 1, self.config.k)
            chosen = chosen + (chosen >= query)  # any example but the query
            queries = self._with_others(row, task, chosen, query)
            longest = int(self.cut[task][queries].max())
            allowed = self.budgets(longest)
            budget = min(allowed)
            if self.config.release_truncation or not self.contexts:
                return task, chosen, queries, budget
            fitting = min(map(sampling.fit_demos, self.shown[task][chosen].T, allowed))
            if self.packing is not None:  # the teacher does not see what fits no chunk either
                fitting = len(self.packing.chunk_of(self.shown[task][chosen[:fitting], -1]))
            if fitting:
                return task, chosen[:fitting], queries, budget
        raise UserError(
            f"Not even one demonstration of task {self.stores[task].task!r} fits the context's budget of {budget} "
            "tokens: raise config.data.max_demo_tokens, lower config.data.max_input_tokens or leave the task out."
        )

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
        task, chosen, queries, budget = self.draw(row)
        shown = self.shown[task][chosen, -1]
        context = int(shown.sum()) if self.contexts else 0
        if self.packing is not None:
            return self.packing.length(shown), *map(int, self.cut[task][queries])
        if self.config.release_truncation:
            context = min(context, budget, sampling.RELEASE_DISTILLER_TOKENS)
        return context, *map(int, self.cut[task][queries])

    def teacher_length(self, row: int) -> int:
        task, chosen, _, _ = self.draw(row)
        return int(self.shown[task][chosen, 0].sum())

    def target_length(self, row: int) -> int:
        task, _, queries, _ = self.draw(row)
        return int(self.stores[task].lengths[queries, 1].max())

    def tokens(self, row: int):
        task, chosen, queries, budget = self.draw(row)
        store, limit = self.stores[task], self.config.max_input_tokens
        asked = [store.example(query, limit) for query in queries]
        asked = [(np.concatenate([x, y]).astype(np.int32), len(x)) for x, y in asked]
        chosen = chosen if self.contexts else []
        teacher, demos = self._context(task, chosen, 0), self._context(task, chosen, -1, self.packing)
        if not self.config.release_truncation:
            return demos, asked, teacher if self.separate_teacher else None
        longest = max(len(query) for query, _ in asked)
        demos, teacher = sampling.release_truncation(demos, budget, self.windows[0] - longest)
        return demos, asked, teacher

    def _context(self, task: int, chosen, reading: int, packing=None) -> np.ndarray:
        own, kept = self.stores[task].readings[reading], self.kept[task]
        examples = [own.example(i, kept[i, reading]) for i in chosen]
        return (
            sampling.join_demos(examples) if packing is None else packing.lay_out([np.concatenate(e) for e in examples])
        )

    def describe(self, row: int) -> str:
        task, chosen, queries, _ = self.draw(row)
        asked = ", ".join(map(str, queries))
        return f"task {self.stores[task].task}: query {asked}, demonstrations {chosen.tolist()} (examples from 0)"


def check_enough_examples(stores: list[TaskStore], k: int, queries: int = 1) -> None:
    """Raises UserError for the first task that has fewer examples than K demonstrations and a row's queries need."""
    needed, asked = k + queries, "a query" if queries == 1 else f"config.data.queries = {queries}"
    for store in stores:
        if len(store) < needed:
            raise UserError(
                f"Task {store.task!r} has {len(store)} examples, but config.data.k = {k} demonstrations and {asked} "
                f"need {needed}: lower {'k' if queries == 1 else 'k or queries'}, or leave the task out."
            )
