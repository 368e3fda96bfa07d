"""What each row of training data is: a pure function of (seed, row number), one class per stage.

Each has `lengths(row) -> (context tokens, tokens of each query)`, cheap, for planning; `tokens(row) -> (demos, queries,
teacher_demos or None)`, a query being (tokens, target_start); `describe(row)`, where it came from; and the padded sizes
`demo_buckets`, `query_buckets`; and for LLMs that read x and y apart `input_columns`,
the longest x, and `target_length(row)`.

Where the distiller has another tokenizer than the LLM (`two_readings`), `demos` are the distiller's tokens and
`teacher_demos` the LLM's of the very same text, `teacher_length(row)` many; everything else is in the LLM's tokens.
"""

import functools
import logging

import grain
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data import alignment, sampling
from mend_jax.data.stores import TaskStore, TextStore

MIN_TEXT_TOKENS = 32  # pretraining: shorter texts teach nothing about distilling
TRIES = 100  # draws until one fits
KEPT = 1 << 14  # draws remembered between planning a window and making its batches


class TextDraws:
    """Meta-distillation pretraining: the share beta of a text is the context, the rest the query."""

    input_columns = 0  # all of a query is said, there is no x

    def __init__(self, config, store: TextStore, documents: range, shuffle: bool, windows):
        self.config, self.store, self.windows = config.data, store, windows
        self.seed, self.length = config.seed, config.prefix.length
        self.documents = document_order(documents, config.seed, shuffle)
        self.count, self.first = len(documents), documents.start
        longest = min(self.config.max_text_tokens, int(store.lengths.max(initial=0)))
        if longest < MIN_TEXT_TOKENS:
            raise UserError(
                f"The longest text of {self.config.text} has {longest} tokens (config.data.max_text_tokens is "
                f"{self.config.max_text_tokens}), but pretraining needs {MIN_TEXT_TOKENS}."
            )
        self.two_readings = store.all_lengths.shape[1] == 2
        self.split = functools.lru_cache(KEPT)(self.split)
        _, longest_query = sampling.split_text(longest, self.config.beta, longest)
        self.query_buckets = buckets(self.config.query_buckets, longest_query)
        _check_window("A text's continuation", longest_query, self.length, windows[0])
        budget, *others = _largest_budgets(config, windows, self.two_readings)
        longest_context = max([sampling.split_text(longest, self.config.beta, budget)[0], *others])
        self.demo_buckets = buckets(self.config.demo_buckets, longest_context)

    def document(self, row: int) -> int:
        document = int(self.documents[row])
        rng = None
        for _ in range(TRIES):
            if self.store.lengths[document] >= MIN_TEXT_TOKENS and self.split(document)[0]:
                return document
            rng = rng or sampling.row_rng(self.seed, 2, row)
            document = self.first + int(rng.integers(self.count))
        raise UserError(
            f"Hardly any text of {self.config.text} has {MIN_TEXT_TOKENS} tokens: pretraining needs longer texts."
        )

    def split(self, document: int) -> tuple[int, int, int]:
        """(context tokens of the distiller, query tokens, context tokens of the LLM) of a document."""
        length = min(int(self.store.lengths[document]), self.config.max_text_tokens)
        _, query = sampling.split_text(length, self.config.beta, length)
        budget, *others = _budgets(self.config, self.windows, query, self.length, self.two_readings)
        context, query = sampling.split_text(length, self.config.beta, budget)
        if not self.two_readings:
            return context, query, context
        context, distillers = alignment.cut(self.store.readings(document)[1], (context, *others))
        return distillers, query, context

    def lengths(self, row: int) -> tuple[int, int]:
        return self.split(self.document(row))[:2]

    def teacher_length(self, row: int) -> int:
        return self.split(self.document(row))[2]

    def target_length(self, row: int) -> int:
        return self.lengths(row)[1]

    def tokens(self, row: int):
        document = self.document(row)
        distillers, query, context = self.split(document)
        (ids, *others), _ = self.store.readings(document)
        continuation = [(ids[context : context + query], 0)]
        if not others:
            return ids[:context], continuation, None
        return others[0][:distillers], continuation, ids[:context]

    def describe(self, row: int) -> str:
        return f"text {self.document(row)} of {self.config.text}"


class TaskDraws:
    """Finetuning: K demonstrations and a query of one task, drawn uniformly at random (paper, section 3.3).

    With data.queries > 1, more queries of the same task stand behind the same demonstrations.
    """

    def __init__(self, config, stores: list[TaskStore], windows):
        self.config, self.stores, self.windows, self.seed = config.data, stores, windows, config.seed
        self.vectors, self.input_columns = config.prefix.length, config.data.max_input_tokens
        self.contexts = config.prefix.kind != "soft_prompt" or bool(config.loss.kd)  # else nobody reads them
        self.draw = functools.lru_cache(KEPT)(self.draw)
        check_enough_examples(stores, self.config.k, self.config.queries)
        self.two_readings = len(stores[0].readings) == 2
        limit = min(max(self.config.query_buckets), windows[0] - self.vectors)
        self.cut = [store.cut_lengths(self.config.max_input_tokens) for store in stores]
        self.kept = [store.shared_inputs(self.config.max_input_tokens) for store in stores]
        self.shown = [  # tokens of each example as a demonstration, for each tokenizer
            kept + np.stack([own.lengths[:, 1] for own in store.readings], axis=1)
            for store, kept in zip(stores, self.kept, strict=True)
        ]
        self.queries = [np.flatnonzero(lengths <= limit) for lengths in self.cut]  # an output is never cut
        for store, queries in zip(stores, self.queries, strict=True):
            if not len(queries):
                raise UserError(
                    f"No example of task {store.task!r} fits {limit} tokens, the largest of config.data.query_buckets "
                    f"that the LLM's window of {windows[0]} allows: leave the task out or raise it."
                )
        self.query_buckets = buckets(self.config.query_buckets, limit)
        self.demo_buckets = (
            buckets(self.config.demo_buckets, max(_largest_budgets(config, windows, self.two_readings)))
            if self.contexts
            else (0,)
        )
        self.teacher_size = min(sampling.RELEASE_TEACHER_TOKENS, windows[0])

    def draw(self, row: int):
        """(task number, demonstrations' numbers, queries' numbers, budget) of a row."""
        rng = sampling.row_rng(self.seed, 1, row)
        for _ in range(TRIES):
            task = int(rng.integers(len(self.stores)))
            query = int(rng.choice(self.queries[task]))
            chosen = sampling.sample_demos(rng, len(self.stores[task]) - 1, self.config.k)
            chosen = chosen + (chosen >= query)  # any example but the query
            queries = self._with_others(row, task, chosen, query)
            longest = int(self.cut[task][queries].max())
            budgets = _budgets(self.config, self.windows, longest, self.vectors, self.two_readings)
            budget = min(budgets)
            if self.config.release_truncation or not self.contexts:
                return task, chosen, queries, budget
            fitting = min(map(sampling.fit_demos, self.shown[task][chosen].T, budgets))
            if fitting:
                return task, chosen[:fitting], queries, budget
        raise UserError(
            f"Not even one demonstration of task {self.stores[task].task!r} fits the context's budget of {budget} "
            "tokens: raise config.data.max_demo_tokens, lower config.data.max_input_tokens or leave the task out."
        )

    def _with_others(self, row: int, task: int, chosen, query: int) -> np.ndarray:
        """The query and data.queries - 1 others of its task, none a demonstration, none twice while there are enough."""
        count = self.config.queries - 1
        if not count:  # the draws of one query stay what they are
            return np.asarray([query])
        left = np.setdiff1d(self.queries[task], [*chosen, query])
        left = left if len(left) else np.asarray([query])  # all others are too long
        others = sampling.row_rng(self.seed, 6, row).choice(left, count, replace=len(left) < count)
        return np.asarray([query, *others])

    def lengths(self, row: int) -> tuple[int, ...]:
        task, chosen, queries, budget = self.draw(row)
        context = int(self.shown[task][chosen, -1].sum()) if self.contexts else 0
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
        teacher, demos = (self._context(task, chosen, reading) for reading in (0, -1))
        if not self.config.release_truncation:
            return demos, asked, teacher if self.two_readings else None
        longest = max(len(query) for query, _ in asked)
        demos, teacher = sampling.release_truncation(demos, budget, self.windows[0] - longest)
        return demos, asked, teacher

    def _context(self, task: int, chosen, reading: int) -> np.ndarray:
        own, kept = self.stores[task].readings[reading], self.kept[task]
        return sampling.join_demos([own.example(i, kept[i, reading]) for i in chosen])

    def describe(self, row: int) -> str:
        task, chosen, queries, _ = self.draw(row)
        asked = ", ".join(map(str, queries))
        return f"task {self.stores[task].task}: query {asked}, demonstrations {chosen.tolist()} (examples from 0)"


class SequenceDraws:
    """An ordinary LM's rows: plain text cut or packed to the sequence length, and in-context sequences of one task."""

    two_readings = False  # no distiller

    def __init__(self, config, store, documents, stores: list[TaskStore], shuffle: bool, windows, end_of_text):
        self.config, self.seed, self.rows = config.data, config.seed, config.train.batch_size
        self.store, self.stores = store, stores
        self.size = self.config.sequence_length
        _check_sequence_length(self.size, windows[0])
        self.share = self.config.text_share if store and stores else float(bool(store))
        self.documents = document_order(documents, self.seed, shuffle) if store else None
        self.range, self.end_of_text = documents, end_of_text
        self.demo_buckets, self.query_buckets = (0,), (self.size,)
        self.cut = [tasks.cut_lengths(self.config.max_input_tokens) for tasks in stores]
        self.draw = functools.lru_cache(KEPT)(self.draw)

    def text_number(self, row: int) -> int | None:
        """Which plain text this row is, counted from the first; None for an in-context sequence."""
        batch, place = divmod(row, self.rows)
        before, after = int(place * self.share + 1e-9), int((place + 1) * self.share + 1e-9)
        return batch * int(self.rows * self.share + 1e-9) + before if after > before else None

    def draw(self, row: int):
        """(task number, examples' numbers) of an in-context sequence: half have K+1 or all that fit, half fewer."""
        rng = sampling.row_rng(self.seed, 3, row)
        for _ in range(TRIES):
            task = int(rng.integers(len(self.stores)))
            full = min(self.config.k + 1, len(self.stores[task]))
            count = full if rng.random() < 0.5 else int(rng.integers(1, full + 1))
            chosen = sampling.sample_demos(rng, len(self.stores[task]), count)
            if fitting := sampling.fit_demos(self.cut[task][chosen], self.size):
                return task, chosen[:fitting]
        raise UserError(
            f"Not even one example of task {self.stores[task].task!r} fits "
            f"config.data.sequence_length = {self.size}: raise it."
        )

    def lengths(self, row: int) -> tuple[int, int]:
        if self.text_number(row) is not None:
            return 0, self.size
        task, chosen = self.draw(row)
        return 0, int(self.cut[task][chosen].sum())

    def tokens(self, row: int):
        number = self.text_number(row)
        if number is not None:
            return np.zeros(0, np.int32), [(self.text(row, number), 0)], None
        task, chosen = self.draw(row)
        examples = [self.stores[task].example(i, self.config.max_input_tokens) for i in chosen]
        return np.zeros(0, np.int32), [(sampling.join_demos(examples), 0)], None

    def text(self, row: int, number: int) -> np.ndarray:
        """A piece of one long document, or several short ones with the end-of-text token between them: (T,) int32."""
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
            return f"a text beginning in number {int(self.documents[number])} of {self.config.text}"
        task, chosen = self.draw(row)
        return f"task {self.stores[task].task}: examples {chosen.tolist()} (from 0)"


def document_order(documents: range, seed: int, shuffle: bool):
    """Documents by row number without end: every document once an epoch, each epoch in a new order where `shuffle`."""
    if not len(documents):
        raise UserError("There is no text at all: config.data.text holds no documents.")
    order = grain.MapDataset.range(documents.start, documents.stop)
    return (order.seed(seed).shuffle() if shuffle else order).repeat()


def check_enough_examples(stores: list[TaskStore], k: int, queries: int = 1) -> None:
    """Raises UserError for the first task with fewer examples than K demonstrations and a row's queries take."""
    needed, asked = k + queries, "a query" if queries == 1 else f"config.data.queries = {queries}"
    for store in stores:
        if len(store) < needed:
            raise UserError(
                f"Task {store.task!r} has {len(store)} examples, but config.data.k = {k} demonstrations and {asked} "
                f"take {needed}: lower {'k' if queries == 1 else 'k or queries'}, or leave the task out."
            )


def check_windows(config, llm, backbone=None) -> None:
    """Raises UserError where the lengths that a run's config asks for cannot fit together: before anything is loaded or read.

    Args:
        config: a whole run's config.
        llm, backbone: settings of the LLM and of the distiller's backbone (None: there is no distiller), each with a `window`.
    """
    data, stage, vectors = config.data, config.stage, config.prefix.length
    windows = llm.window, 2**31 if backbone is None else backbone.window
    if stage == "lm":
        _check_sequence_length(data.sequence_length, llm.window)
        return
    behind = f"behind prefix.length = {vectors} vectors"
    room = llm.window - vectors
    if room < 2:
        raise UserError(
            f"The LLM's window of {llm.window} tokens has no room for a query {behind}: lower prefix.length."
        )
    [budget] = _largest_budgets(config, windows, two_readings=False)  # two have no more room than this either
    _, continued = sampling.split_text(data.max_text_tokens, data.beta, data.max_text_tokens)
    if stage == "pretrain" and continued > room:
        fitting = (n for n in range(data.max_text_tokens, MIN_TEXT_TOKENS - 1, -1))
        most = next((n for n in fitting if sampling.split_text(n, data.beta, n)[1] <= room), None)
        lower = "lower prefix.length" if most is None else f"lower data.max_text_tokens to {most}, or prefix.length"
        raise UserError(
            f"A text of data.max_text_tokens = {data.max_text_tokens} is continued for {continued} tokens, which do not fit the "
            f"LLM's window of {llm.window} {behind}: {lower}."
        )
    if stage == "finetune" and data.max_input_tokens >= room:
        raise UserError(
            f"An input of data.max_input_tokens = {data.max_input_tokens} and its output do not fit the LLM's window of "
            f"{llm.window} {behind}: lower data.max_input_tokens to less than {room}, or prefix.length."
        )
    if data.max_demo_tokens > budget:
        logging.warning(
            "data.max_demo_tokens is %d, but the models have room for %d at most: demonstrations that do not fit are left out",
            data.max_demo_tokens, budget,
        )  # fmt: skip


def buckets(configured, largest: int) -> tuple[int, ...]:
    """The configured sizes below `largest`, then `largest`: every length up to it has a bucket."""
    return (*sorted({size for size in configured if size < largest}), largest)


def _budgets(data, windows, query: int, vectors: int, two_readings: bool) -> tuple[int, ...]:
    """Tokens a context may have beside a query of so many: of the LLM's and of the distiller's, or of those of both."""
    if not two_readings:
        return (sampling.demo_budget(data.max_demo_tokens, windows[0], query, windows[1], vectors),)
    return min(data.max_demo_tokens, windows[0] - query), min(data.max_demo_tokens, windows[1] - vectors)


def _largest_budgets(config, windows, two_readings: bool) -> tuple[int, ...]:
    """The most tokens a context can have, as _budgets. Raises UserError where there is no room for any."""
    budgets = _budgets(config.data, windows, 1, config.prefix.length, two_readings)
    if min(budgets) < 1:
        raise UserError(
            f"The distiller's window of {windows[1]} tokens has no room for demonstrations beside "
            f"config.prefix.length = {config.prefix.length} vectors: lower it or take another backbone."
        )
    if config.data.release_truncation:
        return tuple(min(budget, sampling.RELEASE_DISTILLER_TOKENS) for budget in budgets)
    return budgets


def _check_sequence_length(length: int, window: int) -> None:
    if length > window:
        raise UserError(
            f"config.data.sequence_length is {length}, but the LLM's window is {window} tokens: lower it to that at most."
        )


def _check_window(what: str, query: int, vectors: int, window: int) -> None:
    if query + vectors > window:
        raise UserError(
            f"{what} of {query} tokens does not fit the LLM's window of {window} beside config.prefix.length = "
            f"{vectors} vectors: lower config.data.max_text_tokens, raise config.data.beta or lower the length."
        )
