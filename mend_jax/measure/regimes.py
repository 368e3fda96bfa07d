"""What a query costs after a prefix, in three regimes: FLOPs by formula and by the compiler, bytes, memory, seconds.

- (a) as the paper and its release: every option reads the prefix and the input again, and MEND distils for every query;
- (b) a query reads the prefix once, all its options share it;
- (c) the prefix is read once, all queries share its keys and values.

Axes: N demonstration tokens, L vectors, P prefix, T tokens of a row, R rows of a pass.
A program is compiled from the shapes of its arguments, so that no weights are needed; to time it, they are zeros.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import LLM
from mend_jax.measure.machine import median
from mend_jax.models.attention import BLOCK
from mend_jax.models.decoder import Cache
from mend_jax.models.families import Config
from mend_jax.models.folders import init_params
from mend_jax.prefixes import KINDS, Kind
from mend_jax.prefixes.prefix import Prefix
from mend_jax.scoring import costs

REGIMES = ("a", "b", "c")
ONE = ", for all"  # ends the name of a program whose prefix serves all queries
METHODS = ("zero_shot", "prompt_tuning", "icl", "mend")


class Shape(NamedTuple):
    """The lengths of a task, in the mean over its items."""

    name: str
    demos: int  # tokens of the demonstrations
    query: int  # of an input
    options: float  # answers to choose from
    target: int  # tokens of each

    @property
    def row(self) -> int:
        """Tokens that are read after the prefix for one option; its last token is predicted alone."""
        return self.query + self.target - 1

    @property
    def together(self) -> int:
        """Tokens that are read for all options in one row."""
        return self.query + round(self.options * (self.target - 1))


@dataclasses.dataclass(frozen=True)
class Models:
    """The models whose costs are computed, by their sizes alone."""

    llm: Config
    distiller: Config  # headless
    vectors: int  # that it makes of a context, or of each part that it reads alone
    dtype: str = "float32"
    readings: int = 1  # parts of a context
    join: str = "concat"  # prefix.join: what becomes of the parts' vectors
    projection: str = "auto"  # prefix.projection

    @property
    def positions(self) -> int:
        """Those of all vectors in the LLM."""
        return self.vectors * (self.readings if self.join == "concat" else 1)

    def prefix(self, method: str, shape: Shape) -> int:
        """Positions before a query."""
        return {"zero_shot": 0, "icl": shape.demos}.get(method, self.positions)

    def part(self, shape: Shape) -> int:
        """Tokens of the demonstrations that the distiller reads at once: all parts are alike, rounded up."""
        return -(-shape.demos // self.readings)

    def kind(self, shape: Shape) -> Kind:
        """What makes the vectors; its params are shapes."""
        prefix = {"projection": self.projection, "length": self.vectors, "dtype": self.dtype, "remat": False}
        prefix |= {"join": self.join, "chunk_demos": shape.demos, "chunk_tokens": self.part(shape)}
        kind = KINDS["distiller" if self.readings == 1 else "chunked"]
        return kind.sketch(ConfigDict(prefix), self.distiller, self.llm)

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize


def computed(config: Config, tokens: int, before: int = 0) -> int:
    """FLOPs of reading T tokens after `before` cached ones, as our programs compute them: attention leaves out the blocks of
    keys that come later (models/attention.py), which `costs.reading` counts."""
    if not tokens:
        return 0
    return round(costs.reading(config, tokens, before + _pairs(tokens) / tokens).forward)


def _pairs(tokens: int) -> int:
    """Pairs of T tokens in the blocks that attention computes."""
    ends = [min(start + BLOCK, tokens) for start in range(0, tokens, BLOCK)]
    return sum((end - start) * end for start, end in zip(range(0, tokens, BLOCK), ends, strict=True))


def distil_flops(models: Models, shape: Shape) -> int:
    N, L, config = models.part(shape), models.vectors, models.distiller
    left_out = (
        _pairs(N + L) - _pairs(L) - N * L
    )  # the placeholders read the demonstrations as a prefix in the last layer
    own = computed(config, N + L) - costs.not_wanted(config, N, left_out)
    return models.readings * (own + costs.projection(config.width, models.llm.width, L, models.projection))


def query_flops(models: Models, shape: Shape, method: str) -> dict[str, dict[str, float]]:
    """{regime: {"once": FLOPs before the first query, "query": FLOPs of each}} by formula."""
    llm, P = models.llm, models.prefix(method, shape)
    made = distil_flops(models, shape) if method == "mend" else 0
    reread = shape.options * (computed(llm, P + shape.row) + costs.head(llm, shape.target))
    item = computed(llm, shape.together, P) + costs.head(llm, _predicted(shape))
    read = made + computed(llm, P)
    return {
        "a": {"once": 0, "query": made + reread},
        "b": {"once": 0, "query": read + item},
        "c": {"once": read, "query": item},
    }


def as_the_paper_counts(models: Models, shape: Shape, method: str, limit: int = 643) -> float:
    """FLOPs of a query in regime (a) by the paper's count, as far as its figures tell: attention over all pairs, the head at
    every position, and a distiller that reads at most `limit` tokens of demonstrations, as in the release."""
    llm, T = models.llm, models.prefix(method, shape) + shape.row
    made = costs.distil(models.distiller, llm, min(limit, shape.demos), models.vectors) if method == "mend" else 0
    return made + shape.options * (costs.reading(llm, T).forward + costs.head(llm, T))


def held_bytes(models: Models, shape: Shape, method: str) -> dict[str, int]:
    """{"cache": of the prefix's keys and values, "stored": of what is kept of a task between calls without a cache}: the ids of
    demonstrations, or vectors."""
    llm, P = models.llm, models.prefix(method, shape)
    stored = 4 * shape.demos if method == "icl" else costs.vector_bytes(llm, P, models.itemsize)
    return {"cache": costs.cache_bytes(llm, P, models.itemsize), "stored": stored}


def pays_from(mend: dict[str, float], other: dict[str, float], distil: float) -> int | None:
    """The first number of queries for which MEND costs no more in all, its distillation counted once; None: for none.

    `mend`, `other`: {"once", "query"}; of MEND without the distillation.
    """
    saved, first = other["query"] - mend["query"], distil + mend["once"] - other["once"]
    if first <= saved:
        return 1
    return None if saved <= 0 else int(-(-first // saved))


class Program(NamedTuple):
    """A function with the shapes of its arguments; the last model's layers are `layers`, `alone` of them outside of the loop."""

    function: Callable
    arguments: tuple
    layers: int
    alone: int = 0


def distil_program(models: Models, shape: Shape, rows: int) -> Program:
    kind = models.kind(shape)
    arguments = kind.params, _ints(rows, models.readings * models.part(shape)), _ints(rows)
    return Program(lambda *a: kind.apply(*a).embeds, arguments, models.distiller.layers, alone=1)


def reread_program(models: Models, prefix: int, shape: Shape, rows: int) -> Program:
    """One option of each of R queries: prefix, input and option, with the head at the option."""
    llm, params = abstract_llm(models)
    row = shape.row

    def run(params, embeds, tokens):
        full = jnp.full((rows,), prefix, jnp.int32)
        query = Query(tokens, jnp.full((rows,), row, jnp.int32), jnp.full((rows,), shape.query, jnp.int32))
        states = llm.states(params, Prefix(embeds, full), query)
        return llm.logits(params, states[:, -shape.target :])

    return Program(run, (params, _floats(models, rows, prefix), _ints(rows, row)), models.llm.layers)


def read_program(models: Models, prefix: int, rows: int) -> Program:
    """The keys and values of a prefix for each of R rows."""
    llm, params = abstract_llm(models)
    reader = llm.model.clone(keep_cache=True)
    run = lambda params, embeds: reader.apply({"params": params}, embeds)[1]  # noqa: E731
    return Program(run, (params, _floats(models, rows, prefix)), models.llm.layers)


def item_program(models: Models, prefix: int, shape: Shape, rows: int, shared: bool) -> Program:
    """R queries with all their options after a cached prefix, one for all or one for each."""
    llm, params = abstract_llm(models)
    config, T = models.llm, shape.together
    columns = (prefix,) if shared else (rows, prefix)
    cache = jax.ShapeDtypeStruct((config.layers, *columns, config.kv_heads, config.head_width), models.dtype)
    places = tuple(_ints(rows, T) for _ in range(3))

    def run(params, keys, values, tokens, positions, segments):
        length = jnp.full(() if shared else (rows,), prefix, jnp.int32)
        states = llm.cached_states(params, Cache(keys, values, length), tokens, positions, segments)
        return llm.logits(params, states[:, -_predicted(shape) :])

    return Program(run, (params, cache, cache, *places), config.layers)


def programs(models: Models, shape: Shape, method: str, rows: int) -> dict[str, Program]:
    """What a method runs, by name; with one row, a prefix of each query's own is as one for all."""
    P, found = (
        models.prefix(method, shape),
        {"reread": reread_program(models, models.prefix(method, shape), shape, rows)},
    )
    for alone in {True, rows == 1}:
        if method == "mend":
            found[f"distil{ONE * alone}"] = distil_program(models, shape, 1 if alone else rows)
        if P:
            found[f"read{ONE * alone}"] = read_program(models, P, 1 if alone else rows)
        found[f"item{ONE * alone}"] = item_program(models, P, shape, rows, shared=alone)
    return found


def compilers_count(make: Callable[[Models], Program], models: Models) -> float:
    """FLOPs of a program by XLA's own analysis, which counts the body of a loop over layers once: here as often as it runs, by the
    difference to the same program of models without what is in the loop."""
    whole = make(models)
    ends = dataclasses.replace(
        models,
        llm=dataclasses.replace(models.llm, layers=whole.alone),
        distiller=dataclasses.replace(models.distiller, layers=whole.alone),
    )
    once, rest = _flops(whole), _flops(make(ends))
    return rest + (whole.layers - whole.alone) * (once - rest)


def compilers_query_flops(models: Models, shape: Shape, method: str, rows: int = 1) -> dict[str, dict[str, float]]:
    """`query_flops` by the compiler; so many rows to a pass."""
    P = models.prefix(method, shape)

    def count(make, *arguments):
        return compilers_count(lambda m: make(m, *arguments), models)

    made = count(distil_program, shape, rows) / rows if method == "mend" else 0
    reread = shape.options * count(reread_program, P, shape, rows) / rows
    read = made + (count(read_program, P, 1) if P else 0)
    item = count(item_program, P, shape, rows, True) / rows
    return {
        "a": {"once": 0, "query": made + reread},
        "b": {"once": 0, "query": read + item},
        "c": {"once": read, "query": item},
    }


def measured(program: Program, repeats: int) -> dict:
    """{"bytes": of the program's arguments, results and work, "seconds": the median of `repeats` runs; None without any}."""
    compiled = jax.jit(program.function).lower(*program.arguments).compile()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    found = {"bytes": held, "seconds": None}
    if repeats:
        arguments = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), program.arguments)
        jax.block_until_ready(compiled(*arguments))
        found["seconds"] = median([_seconds(compiled, arguments) for _ in range(repeats)])
    return found


def seconds_by_regime(found: dict[str, dict], shape: Shape, rows: int = 1) -> dict[str, dict[str, float]]:
    """{regime: {"once", "query"}} seconds of `measured` programs by their names; a query's are its share of a pass of R."""

    def seconds(name: str) -> float:
        return found.get(name, {"seconds": 0.0})["seconds"]

    def share(name: str) -> float:
        return seconds(name if name in found else name + ONE) / rows

    made = share("distil")
    return {
        "a": {"once": 0.0, "query": made + shape.options * share("reread")},
        "b": {"once": 0.0, "query": made + share("read") + share("item")},
        "c": {"once": seconds("distil" + ONE) + seconds("read" + ONE), "query": seconds("item" + ONE) / rows},
    }


def peak_bytes(found: dict[str, dict]) -> dict[str, int]:
    """{regime: bytes of the program that needs most}, of those of `programs`; a model counts where it is read."""
    used = {
        "a": ("distil", "reread"),
        "b": ("distil", "read", "item"),
        "c": ("distil" + ONE, "read" + ONE, "item" + ONE),
    }
    held = {name: one["bytes"] for name, one in found.items()}
    peaks = {}
    for regime, names in used.items():
        own = (name if name in held else name + ONE for name in names)
        peaks[regime] = max(held[name] for name in own if name in held)
    return peaks


@functools.cache
def abstract_llm(models: Models) -> tuple[LLM, dict]:
    """The LLM with shapes for parameters, and these."""
    shapes = jax.eval_shape(lambda: init_params(models.llm, 0))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(models.dtype)), shapes)
    return LLM(models.llm, params, None, "", models.dtype), params


def _predicted(shape: Shape) -> int:
    return 1 + shape.together - shape.query


def _flops(program: Program) -> float:
    return jax.jit(program.function).lower(*program.arguments).cost_analysis().get("flops", 0.0)


def _seconds(compiled, arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start


def _ints(*shape: int):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _floats(models: Models, rows: int, prefix: int):
    return jax.ShapeDtypeStruct((rows, prefix, models.llm.width), models.dtype)
