"""The benchmark's workload and our side of it: random weights of known sizes, one train step, one scored task.

Axes: B batch, N demonstration tokens, L vectors, P prefix, Q query tokens, D width, V vocabulary.
"""

import concurrent.futures
import dataclasses
import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mend_jax.cli.errors import UserError
from mend_jax.data.batches import Batch
from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import LLM
from mend_jax.llm.encoder_decoder import EncoderDecoderLLM
from mend_jax.measure import machine as measure
from mend_jax.models.families import Config, DecoderConfig
from mend_jax.models.weights import from_tensors, key_table
from mend_jax.prefixes import KINDS, Kind
from mend_jax.prefixes.prefix import Prefix
from mend_jax.scoring import costs
from mend_jax.scoring.options import cache_prefix, score_items
from mend_jax.step import init_state, make_loss_fn, make_optimizer, make_train_step

LEARNING_RATE, STEPS, CLIP, CHUNK = 5e-5, 30_000, 1.0, 512
LLM_SEED, DISTILLER_SEED, BATCH_SEED = 1, 2, 3
PAPERS_OBJECTIVE = {"objective": "forward_kl", "temperature": 1.0, "mix": 0.5, "top_k": 64}
KIND = "distiller"  # of prefix, that is measured
DRAWS = 16  # parts of a tensor that are drawn at the same time, each by a generator of its own
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative, between two computations that must agree


@dataclasses.dataclass(frozen=True)
class Settings:
    """One workload; both sides make the same weights and the same batch from it."""

    llm: Config
    distiller: Config  # headless
    dtype: str  # of the LLM and of the distiller's arithmetic; trained weights are float32
    rows: int  # B
    demos: int  # N, no padding
    query: int  # Q, no padding
    target: int  # tokens of y, the end of the query; in `inference` tokens of each option
    vectors: int  # L
    attention: str = "auto"
    remat: bool = False
    weights: str = "full"  # the LLM's: "full" (in `dtype`) or "int8"
    queries: int = 1  # R, that share a row's context


class Item(NamedTuple):
    """A test item, in the form that scoring reads."""

    x_tokens: list[int]
    options_tokens: list[list[int]]


def random_params(config: Config, seed: int, dtype: str = "float32", int8: bool = False) -> dict:
    """A model's tree of random weights (NumPy) on GPT-2's scale, including biases and norms, in `dtype` or in 8 bits.

    They do not depend on the number of cores, which share the work: one would draw for minutes at 7B parameters.
    """
    generators = np.random.default_rng(seed).spawn(DRAWS)

    def tensor(entry):
        mean = float(entry.path[-1] == "scale")
        values = np.empty(math.prod(entry.shape), np.float32)
        list(pool.map(draw, generators, np.array_split(values, DRAWS), [mean] * DRAWS))
        return values.reshape(entry.shape)

    def draw(random, part, mean):
        random.standard_normal(out=part, dtype=np.float32)
        part *= np.float32(0.02)
        part += np.float32(mean)

    with concurrent.futures.ThreadPoolExecutor(DRAWS) as pool:
        table = key_table(config)
        return from_tensors(((name, tensor(entry)) for name, entry in table.items()), config, dtype, int8)


def sketch(settings: Settings) -> Kind:
    """The distiller that is measured; its params are shapes."""
    prefix = {"projection": "auto", "length": settings.vectors, "dtype": settings.dtype, "remat": settings.remat}
    return KINDS[KIND].sketch(ConfigDict(prefix), settings.distiller, settings.llm)


def distiller_params(settings: Settings) -> dict:
    """Random weights (NumPy) of the distiller: backbone, placeholders and, if the widths differ, the projection."""
    shapes = sketch(settings).params
    random = np.random.default_rng(DISTILLER_SEED + 100)

    def draw(shape):
        return random.standard_normal(shape.shape, np.float32) * np.float32(0.02 * (len(shape.shape) > 1))

    own = {name: jax.tree.map(draw, shapes[name]) for name in sorted(shapes) if name != "backbone"}
    return {"backbone": random_params(settings.distiller, DISTILLER_SEED), **own}


def batch_tokens(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Random demonstrations (B,N) and queries (B*R,Q), int32."""
    random = np.random.default_rng(BATCH_SEED)
    shapes = (settings.rows, settings.demos), (settings.rows * settings.queries, settings.query)
    demos, query = (random.integers(0, settings.llm.vocab_size, shape, np.int32) for shape in shapes)
    return demos % settings.distiller.vocab_size, query


class Side:
    """What the two workloads on our side share: the models, the device, its memory and its matmul speed."""

    def __init__(self, settings: Settings):
        self.settings, self.device = settings, jax.devices()[0]
        weights = random_params(settings.llm, LLM_SEED, settings.dtype, settings.weights == "int8")
        params = jax.tree.map(jnp.asarray, weights)
        kind = LLM if isinstance(settings.llm, DecoderConfig) else EncoderDecoderLLM
        attention = self._attention(settings.llm)
        self.llm = kind(settings.llm, params, None, "random", settings.dtype, attention, settings.remat)

    def _attention(self, config: Config) -> str:
        if not isinstance(config, DecoderConfig):
            return "xla"  # its attention scores have a bias
        if self.settings.attention == "auto":
            return "cudnn" if self.device.platform == "gpu" and self.settings.dtype == "bfloat16" else "xla"
        return self.settings.attention

    def make_distiller(self) -> Kind:
        params = jax.tree.map(jnp.asarray, distiller_params(self.settings))
        attention = self._attention(self.settings.distiller)
        return dataclasses.replace(sketch(self.settings), params=params, attention=attention)

    def description(self) -> dict:
        return {"platform": self.device.platform, "device": self.device.device_kind, "attention": self.llm.attention}

    def reset_peak(self) -> int:
        """Resets the memory peak; returns the memory in use now, in bytes."""
        measure.reset_peak()
        return self.peak_bytes()

    def peak_bytes(self) -> int:
        stats = self.device.memory_stats() or {}
        return stats.get("peak_bytes_in_use", measure.peak_bytes() if self.device.platform == "cpu" else 0)

    def matmul_flops(self) -> float:
        """FLOP/s of a large square product of this dtype: the best of five."""
        size = 2048 if self.device.platform == "cpu" else 8192
        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.random.normal(key, (size, size)).astype(self.settings.dtype) for key in keys)
        product = jax.jit(jnp.matmul)
        product(a, b).block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            product(a, b).block_until_ready()
            times.append(time.perf_counter() - start)
        return 2 * size**3 / min(times)


def start_report(arguments, settings: Settings) -> dict:
    """The start of a report: the arguments and the machine."""
    return {
        "arguments": vars(arguments),
        "settings": dataclasses.asdict(settings),
        "machine": measure.machine(),
    }


def check_fits(reader: str, tokens: int, config: Config) -> None:
    """Raises UserError if a workload is longer than a model's window."""
    if tokens > config.window:
        raise UserError(
            f"The {reader} would read {tokens} tokens, but its window is {config.window}: choose smaller sizes."
        )


def step_config() -> ConfigDict:
    """The part of a config that the train step reads: finetuning with both losses, Table 5's optimizer."""
    config = ConfigDict()
    config.stage = "finetune"
    config.loss = {"kd": 1.0, "pred": 1.0, "clm": 0.0, "kd_tokens": "all", "chunk": CHUNK, **PAPERS_OBJECTIVE}
    config.optimizer = {"learning_rate": LEARNING_RATE, "warmup_steps": 0, "weight_decay": 0.0}
    config.optimizer.update({"b1": 0.9, "b2": 0.999, "clip": CLIP})
    config.train = {"steps": STEPS, "accumulate": 1}
    return config


class StepSide(Side):
    """The train step of finetuning as `train.py` runs it: L_distill + L_pred, clipping, AdamW."""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        config = step_config()
        self.distiller, self.optimizer = self.make_distiller(), make_optimizer(config)
        self.train_step = make_train_step(config, make_loss_fn(config, self.llm, self.distiller), self.optimizer)
        self.step = jax.jit(self.train_step, donate_argnums=0)
        self.state = self._fresh_state(self.distiller.params)
        self._read_batch()

    def resize(self, rows: int) -> None:
        """From now on steps have `rows` rows. The weights stay, and the trained ones begin anew if a step that failed took them."""
        self.settings = dataclasses.replace(self.settings, rows=rows)
        if any(array.is_deleted() for array in jax.tree.leaves(self.state)):
            self.state = self._fresh_state(self.make_distiller().params)
        self.__dict__.pop("compiled", None)
        self._read_batch()

    def _fresh_state(self, params):
        return jax.jit(init_state, static_argnums=1, donate_argnums=0)(params, self.optimizer)

    def _read_batch(self) -> None:
        self.batch = step_batch(self.settings)
        chunks = -(-self.settings.rows * self.settings.queries * self.settings.query // CHUNK)
        self.flops = costs.count_products(self.train_step, self.state, self.llm.params, self.batch, while_trips=chunks)

    @functools.cached_property
    def compiled(self):
        return self.step.lower(self.state, self.llm.params, self.batch).compile()

    def description(self) -> dict:
        return super().description() | {"counted_flops": self.flops}

    def reset_peak(self) -> int:
        _ = self.compiled  # compilation must not count as the step's memory
        return super().reset_peak()

    def run(self) -> dict[str, float]:
        """Runs one step; returns its seconds, losses and gradient norm."""
        start, cpu = time.perf_counter(), time.process_time()
        self.state, metrics = self.compiled(self.state, self.llm.params, self.batch)
        jax.block_until_ready((self.state, metrics))
        times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        return times | {name: float(metrics[name]) for name in ("loss", "kd", "pred", "grad_norm")}


class InferenceSide(Side):
    """One method on one task: the work done once, then test items with all their options.

    `method` is "icl" or "mend". With `reuse` the prefix is made and read once per task and its cache is shared. Without it,
    as the paper and the release count, every item makes its prefix and every option reads it again.
    """

    def __init__(self, settings: Settings, method: str, reuse: bool, items: int, options: int):
        super().__init__(settings)
        self.reuse, self.distiller = reuse, self.make_distiller() if method == "mend" else None
        self.make_prefix = jax.jit(self._prefix)
        self.reread = jax.jit(self._reread)
        self.count, self.options = items, options
        self.resize(settings.demos)

    def resize(self, demos: int) -> None:
        """From now on the task has demonstrations of `demos` tokens, and other items."""
        settings = self.settings = dataclasses.replace(self.settings, demos=demos)
        random = np.random.default_rng(BATCH_SEED)
        vocabulary = min(settings.llm.vocab_size, settings.distiller.vocab_size)

        def draw(count):
            return random.integers(0, vocabulary, count).tolist()

        self.demos, self.cache = jnp.asarray([draw(demos)], jnp.int32), None
        options = range(self.options)
        self.items = [Item(draw(settings.query), [draw(settings.target) for _ in options]) for _ in range(self.count)]

    def once(self) -> float:
        """Seconds of a task's one-time work: the prefix and its keys and values; 0 without reuse."""
        if not self.reuse:
            return 0.0
        start = time.perf_counter()
        self.cache = cache_prefix(self.llm, self.make_prefix(*self._params(), self.demos))
        jax.block_until_ready(self.cache)
        return time.perf_counter() - start

    def score(self) -> tuple[float, list[list[float]]]:
        """Seconds of scoring all items, and each item's option scores."""
        start = time.perf_counter()
        if self.reuse:
            scores = score_items(self.llm, self.cache, self.items, self.settings.rows)
        else:
            scores = [self._score_rereading(item) for item in self.items]
        return time.perf_counter() - start, [[float(s) for s in row] for row in scores]

    def _params(self):
        return self.llm.params, None if self.distiller is None else self.distiller.params

    def _prefix(self, llm_params, params, demos) -> Prefix:
        length = jnp.full((len(demos),), demos.shape[1], jnp.int32)
        if self.distiller is None:
            return Prefix(self.llm.embed(llm_params, demos), length)
        return self.distiller.apply(params, demos, length)

    def _score_rereading(self, item):
        prefix = self.make_prefix(*self._params(), self.demos)
        tokens = np.asarray([item.x_tokens + option for option in item.options_tokens], np.int32)
        return np.asarray(self.reread(self.llm.params, prefix, tokens))

    def _reread(self, llm_params, prefix, tokens):
        """Mean log-probability (options,) of the last `target` tokens of rows x + option."""
        rows, count = tokens.shape
        target = self.settings.target
        embeds = jnp.broadcast_to(prefix.embeds, (rows, *prefix.embeds.shape[1:]))
        shared = Prefix(embeds, jnp.broadcast_to(prefix.length, (rows,)))
        read = jnp.full((rows,), count - 1, jnp.int32)
        states = self.llm.states(llm_params, shared, Query(tokens[:, :-1], read, read - target))
        log_probs = jax.nn.log_softmax(self.llm.logits(llm_params, states[:, -target:]))
        return jnp.take_along_axis(log_probs, tokens[:, -target:, None], 2)[..., 0].mean(1)


def step_batch(settings: Settings) -> Batch:
    """The batch of `batch_tokens`: every row is full, and y is its last `target` tokens."""
    demos, query = batch_tokens(settings)
    rows, x = (settings.rows, settings.queries), settings.query - settings.target
    separate = (None, None) if isinstance(settings.llm, DecoderConfig) else (x, settings.target)
    arrays = query.reshape(*rows, -1), np.full(rows, settings.query, np.int32), np.full(rows, x, np.int32)
    query = Query(*(array[:, 0] if settings.queries == 1 else array for array in arrays), *separate)
    return Batch(demos, np.full(settings.rows, settings.demos, np.int32), query, np.arange(settings.rows))
