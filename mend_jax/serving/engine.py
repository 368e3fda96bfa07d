"""What the server computes: packs of demonstrations, and answers to the queries of several requests at once.

Everything here runs in the one thread that uses the device (worker.py). Of each request the answer is the same whoever else
is in its batch: each query is a row, and reads its own prefix alone.

Axes: U prefixes, P their columns, D width.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.data.query import query_tokens
from mend_jax.data.templates import SPACE, Template
from mend_jax.generation.generate import Answer, Wanted, answer_rows, read_query
from mend_jax.models.programs import program
from mend_jax.packs.make import packs_of
from mend_jax.packs.pack import Pack, pack_of
from mend_jax.prefixes.context import bucket, bucket_rows, demo_tokens
from mend_jax.prefixes.kind import Kind
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.prefix import Prefix
from mend_jax.scoring.options import check_rows, lay_out
from mend_jax.scoring.several import after, score_several
from mend_jax.serving.examples import Example
from mend_jax.serving.kept import Kept
from mend_jax.serving.limits import Limits

TOGETHER = 2**30  # bytes of keys and values that a batch of different prefixes takes, at most
DISTIL, TAKE_IN, SCORE, GENERATE = "distil", "take_in", "score", "generate"  # kinds of jobs


class Before(NamedTuple):
    """What stands before the queries of a request: a pack, demonstrations, or nothing."""

    template: Template
    pack: Pack | None = None
    demos: tuple[tuple[str, str], ...] = ()
    key: str | None = None  # under which the LLM's keys and values are kept; None: they are not


class Asked(NamedTuple):
    """Queries of a request, for scores of options or for answers."""

    before: Before
    inputs: list[str]
    options: list[str] | None = None
    wanted: Wanted | None = None


class Answered(NamedTuple):
    """What comes of it."""

    prefix: int  # positions of the LLM that stand before each query
    queries: list[int]  # positions of each query
    found: list[np.ndarray] | list[Answer]  # scores of the options, or an answer, of each


class _Read(NamedTuple):
    """A request as tokens."""

    number: int
    before: Before
    rows: list  # of its queries
    length: int  # of its prefix
    queries: list[int]
    content: np.ndarray | None  # what is read: vectors (L,D) or tokens (N,); None: nothing

    @property
    def columns(self) -> int:
        """The padded length of its prefix."""
        return bucket(self.length) if self.length else 0


class Engine:
    """An LLM and, where there is one, a distiller."""

    def __init__(self, llm, distiller: Kind | None, facts: dict, batch_size: int, limits: Limits):
        """`facts` are those of the distiller's packs (packs/make.py)."""
        self.llm, self.distiller, self.batch_size, self.limits = llm, distiller, batch_size, limits
        self.facts = facts
        self.caches: Kept[Any] = Kept(limits.cache_bytes, _bytes)
        self._sizes: dict[int, int] = {}  # bytes of the keys and values of so many columns

    def answer(self, kind: tuple[Hashable, ...], asked: Sequence) -> Sequence:
        """An answer, or a UserError, to each request of a kind."""
        return {DISTIL: self.distil, TAKE_IN: self.take_in, SCORE: self.score, GENERATE: self.generate}[kind[0]](asked)

    def distil(self, sets: Sequence[Sequence[tuple[str, str]]]) -> list[Pack | UserError]:
        """A pack of each set of demonstrations."""
        return packs_of(self.llm, self.distiller, sets, self.facts)

    def take_in(self, files: Sequence[bytes]) -> list[Pack | UserError]:
        """The pack in each file's content, which is for this LLM."""
        return [_or_error(self._pack, content) for content in files]

    def score(self, asked: Sequence[Asked]) -> list[Answered | UserError]:
        """The scores of options."""
        return self._together(asked, self._read_options, self._score)

    def generate(self, asked: Sequence[Asked]) -> list[Answered | UserError]:
        """Answers in the LLM's own words; all are drawn or none is."""
        return self._together(asked, self._read_queries, self._generate)

    def warm_up(self, example: Example, rows: int = 1) -> None:
        """Compiles what questions like the example need, of up to so many requests at once: other lengths are compiled when they come.

        After packs, where there is a distiller, and, for one request, after the demonstrations and after nothing. The user sees how far
        it is: of a large model it takes minutes.
        """
        template = SPACE if self.distiller is None else self.distiller.template
        demos, wanted = list(example.demonstrations), Wanted(16, 0.0, 1.0, (), 0, template.answer)
        sets = [[Before(template, key="")], [Before(template, demos=tuple(demos))]]
        made = [] if self.distiller is None else [demos, demos[1:]]
        packs = [self.distil([some])[0] for some in _counted(made, "pack", "compiling what makes packs")]
        befores = [Before(template, pack, key=f"warm up {i}") for i, pack in enumerate(packs) if isinstance(pack, Pack)]
        for power in range(bucket_rows(rows).bit_length() if befores else 0):
            sets += [befores[:1] * 2**power, (befores * 2**power)[: 2**power]]
        words, scored = [example.input], {"options": list(example.options)}
        asked = [(self.score, some, scored) for some in sets] + [
            (self.generate, some, {"wanted": wanted}) for some in sets
        ]
        for answer, some, fields in _counted(asked, "question", "compiling what answers"):
            # An example that does not fit is an error, which tells nobody anything.
            answer([Asked(one, words, **fields) for one in some])
        for one in befores:
            self.caches.remove(one.key)

    def _pack(self, content: bytes) -> Pack:
        pack = pack_of(content)
        pack.check(self.llm, "The file")
        return pack

    # Requests as tokens

    def _read(self, number: int, asked: Asked, rows: Callable) -> _Read:
        before = asked.before
        if before.pack is not None:
            content = before.pack.vectors
        elif before.demos:
            llm = self.llm
            tokens, _ = demo_tokens(before.demos, llm.tokenizer, llm.config, llm.window, "LLM", before.template)
            content = np.asarray(tokens[0])
        else:
            content = None
        length = 0 if content is None else len(content)
        tokens, queries = rows(asked, length)
        most = self.limits.max_query_tokens
        if max(queries) > most:
            raise UserError(f"An input has {max(queries)} tokens, this server reads {most}: shorten it.")
        return _Read(number, before, tokens, length, queries, content)

    def _read_options(self, asked: Asked, length: int):
        llm, template = self.llm, asked.before.template
        options = [query_tokens(llm, option, "option", template.output) for option in asked.options]
        inputs = [query_tokens(llm, x, "query", template.query) for x in asked.inputs]
        rows = [lay_out(x, options, llm.start_token) for x in inputs]
        check_rows(llm, length, rows)
        return rows, list(map(len, inputs))

    def _read_queries(self, asked: Asked, length: int):
        rows = [read_query(self.llm, x, asked.before.template, length, asked.wanted) for x in asked.inputs]
        return [(row, number, asked.wanted) for number, row in enumerate(rows)], list(map(len, rows))

    # Several requests at once

    def _together(self, asked: Sequence[Asked], rows: Callable, answer: Callable) -> list:
        found = [_or_error(self._read, number, one, rows) for number, one in enumerate(asked)]
        read = [one for one in found if isinstance(one, _Read)]
        for group in self._groups(read):
            cache, of = self._prefixes(group)
            values = iter(answer(cache, of, [row for one in group for row in one.rows]))
            for one in group:
                answers = [next(values) for _ in one.rows]
                found[one.number] = Answered(one.length, one.queries, answers)
        return found

    def _groups(self, read: Iterable[_Read]) -> Iterable[list[_Read]]:
        """Requests whose prefixes have one padded length, so few together that their keys and values fit."""
        alike: dict[Hashable, list[_Read]] = {}
        for one in read:
            alike.setdefault((one.columns, one.before.key is None), []).append(one)
        for group in alike.values():
            most = min(self.batch_size, TOGETHER // max(1, self._cache_bytes(group[0].columns)))
            while group:
                count, rows = 1, len(group[0].rows)
                while count < len(group) and rows + len(group[count].rows) <= most:
                    rows += len(group[count].rows)
                    count += 1
                yield group[:count]
                group = group[count:]

    def _prefixes(self, group: list[_Read]):
        """(the one prefix of a group, or several, as keys and values; the number of each row's)."""
        if group[0].before.key is None and len(group) > 1:
            cache = self._read_all(group)
            return cache, [number for number, one in enumerate(group) for _ in one.rows]
        names = list(dict.fromkeys(one.before.key for one in group))
        firsts = [next(one for one in group if one.before.key == name) for name in names]
        caches = [self._kept(one) for one in firsts]
        of = [names.index(one.before.key) for one in group for _ in one.rows]
        return (caches[0] if len(caches) == 1 else _join(caches)), of

    def _kept(self, one: _Read):
        """The keys and values of one prefix, which are kept from one request to the next if they have a key."""
        key = one.before.key
        if key is not None and (cache := self.caches.get(key)) is not None:
            return cache
        cache = _one(self.llm, self.llm.params, *self._padded([one]))
        if key is not None:
            self.caches.put(key, cache)
        return cache

    def _read_all(self, group: list[_Read]):
        return _all(self.llm, self.llm.params, *self._padded(group))

    def _padded(self, group: list[_Read]):
        """(vectors (U,P,D) or tokens (U,P), lengths (U,)) of like prefixes; U is a power of two."""
        first, count = group[0].content, bucket_rows(len(group))
        length = np.asarray([one.length for one in group] + [group[0].length] * (count - len(group)), np.int32)
        if first is None:
            return no_prefix(1, self.llm.config.width).embeds, length
        columns = min(self.llm.window, group[0].columns)
        rows = np.zeros((count, columns, *first.shape[1:]), first.dtype)
        for i, one in enumerate(group):
            rows[i, : one.length] = one.content
        return rows, length

    def _cache_bytes(self, columns: int) -> int:
        """Bytes of the keys and values of a prefix of so many columns."""
        if columns not in self._sizes:
            llm = self.llm
            prefix = Prefix(jnp.zeros((1, min(columns, llm.window), llm.config.width)), jnp.zeros(1, jnp.int32))
            self._sizes[columns] = _bytes(jax.eval_shape(llm.prefix_cache, llm.params, prefix))
        return self._sizes[columns]

    def _score(self, cache, of, rows) -> list[np.ndarray]:
        return score_several(self.llm, cache, of, rows, self.batch_size)

    def _generate(self, cache, of, rows) -> list[Answer]:
        found, llm = [], self.llm
        for start in range(0, len(rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            tokens, numbers, wanted = zip(*rows[part], strict=True)
            own = after(cache, of[part], bucket_rows(len(tokens)))
            room = bucket_rows(max(one.max_tokens for one in wanted))
            found += answer_rows(llm, llm.params, own, tokens, numbers, wanted, room)
        return found


def _counted(todo: Sequence, unit: str, what: str) -> Iterable:
    """Each of what is to do, while the user sees how many are done."""
    if todo:
        with Progress(len(todo), unit, what=what) as bar:
            for one in todo:
                yield one
                bar.update()


def _or_error(function: Callable, *args):
    """What a function returns, or the UserError that it raises."""
    try:
        return function(*args)
    except UserError as error:
        return error


def _bytes(cache) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))


def _join(caches: Sequence):
    """Several prefixes as one argument; as many as a power of two, because each number is compiled."""
    return type(caches[0]).join([*caches, *[caches[0]] * (bucket_rows(len(caches)) - len(caches))])


def _prefix(llm, params, content, length) -> Prefix:
    return Prefix(content if content.ndim == 3 else llm.embed(params, content), length)


@program
def _one(llm, params, content, length):
    return llm.prefix_cache(params, _prefix(llm, params, content, length))


@program
def _all(llm, params, content, length):
    return llm.prefix_caches(params, _prefix(llm, params, content, length))
