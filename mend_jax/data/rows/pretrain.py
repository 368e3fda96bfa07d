"""The rows of pretraining: the first share of a text is the context, the rest is the query."""

import functools

from mend_jax.cli.errors import UserError
from mend_jax.data import alignment, sampling
from mend_jax.data.readers import Readers
from mend_jax.data.rows.order import document_order
from mend_jax.data.rows.windows import KEPT, MIN_TEXT_TOKENS, TRIES, buckets, budgets, check_window, largest_budgets
from mend_jax.data.stores import TextStore


class TextRows:
    """Meta-distillation pretraining: the share beta of a text is the context, the rest is the query."""

    input_columns = 0  # the whole query is target: there is no x
    counts_outputs = False

    def __init__(self, config, store: TextStore, documents: range, shuffle: bool, readers: Readers):
        self.config, self.store, self.windows = config.data, store, readers.windows
        self.seed, self.packing = config.seed, readers.packing
        self.documents = document_order(documents, config.seed, shuffle)
        self.count, self.first = len(documents), documents.start
        longest = min(self.config.max_text_tokens, int(store.lengths.max(initial=0)))
        if longest < MIN_TEXT_TOKENS:
            raise UserError(
                f"The longest text of {self.config.text} has {longest} tokens (config.data.max_text_tokens is "
                f"{self.config.max_text_tokens}), but pretraining needs {MIN_TEXT_TOKENS}."
            )
        self.two_readings = store.all_lengths.shape[1] == 2
        self.separate_teacher = self.two_readings or self.packing is not None
        self.budgets = functools.partial(budgets, config, self.windows, two_readings=self.two_readings)
        self.split = functools.lru_cache(KEPT)(self.split)
        _, longest_query = sampling.split_text(longest, self.config.beta, longest)
        self.query_buckets = buckets(self.config.query_buckets, longest_query)
        check_window(
            "A text's continuation", longest_query, readers.positions(config), config.prefix.length, self.windows[0]
        )
        budget, *others = largest_budgets(config, self.windows, self.two_readings)
        longest_context = max([sampling.split_text(longest, self.config.beta, budget)[0], *others])
        self.demo_buckets = buckets(self.config.demo_buckets, longest_context)
        self.teacher_buckets = self.demo_buckets  # of whole contexts
        if self.packing is not None:
            self.demo_buckets = self.packing.buckets(self.demo_buckets, -(-longest_context // self.packing.columns))

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
        """(the distiller's context tokens, query tokens, the LLM's context tokens) of a document."""
        length = min(int(self.store.lengths[document]), self.config.max_text_tokens)
        _, query = sampling.split_text(length, self.config.beta, length)
        budget, *others = self.budgets(query)
        if self.packing is not None:  # the teacher does not see what fits no chunk either
            room = self.packing.columns * self.packing.chunks
            budget, others = min(budget, room), [min(other, room) for other in others]
        context, query = sampling.split_text(length, self.config.beta, budget)
        if not self.two_readings:
            return context, query, context
        context, distillers = alignment.cut(self.store.readings(document)[1], (context, *others))
        return distillers, query, context

    def lengths(self, row: int) -> tuple[int, int]:
        context, query, _ = self.split(self.document(row))
        return context if self.packing is None else self.packing.length(self.packing.pieces(context)), query

    def context_tokens(self, row: int) -> int:
        return self.split(self.document(row))[0]

    def teacher_length(self, row: int) -> int:
        return self.split(self.document(row))[2]

    def target_length(self, row: int) -> int:
        return self.lengths(row)[1]

    def tokens(self, row: int):
        document = self.document(row)
        distillers, query, context = self.split(document)
        (ids, *others), _ = self.store.readings(document)
        continuation = [(ids[context : context + query], 0)]
        own = (others[0] if others else ids)[:distillers]
        if self.packing is not None:
            starts = range(0, len(own), self.packing.columns)
            own = self.packing.lay_out([own[start : start + self.packing.columns] for start in starts])
        return own, continuation, ids[:context] if self.separate_teacher else None

    def describe(self, row: int) -> str:
        return f"text {self.document(row)} of {self.config.text}"
