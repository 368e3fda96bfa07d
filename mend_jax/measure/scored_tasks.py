"""Tasks to score after a cached prefix (real tasks, or random tokens with the shapes of real ones), and our side of it.

Axes: P prefix, X tokens of an input, V vocabulary.
"""

import collections
import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data import evaluation, metaicl, sampling
from mend_jax.data.templates import chosen
from mend_jax.llm.decoder_only import LLM, load_llm
from mend_jax.measure import machine as measure
from mend_jax.measure.jax_side import BATCH_SEED, LLM_SEED, Item, random_params
from mend_jax.models.families import Config
from mend_jax.models.folders import has_weights, load_tokenizer
from mend_jax.prefixes.context import bucket
from mend_jax.prefixes.prefix import Prefix
from mend_jax.scoring.options import cache_prefix, lay_out, plan, score_rows
from mend_jax.scoring.tasks import COMPILED

# The length at which an input is cut, a context's budget, and the padded lengths of contexts (configs/base.py).
INPUT_TOKENS, DEMO_TOKENS, DEMO_BUCKETS = 256, 900, (256, 384, 512, 640, 768, 900)

# Tokens of the demonstrations, of ten inputs (the middles of tenths) and of the options, which all begin with a line
# break: four MetaICL tasks in SmolLM2's tokens, 16 demonstrations of seed 13, the newline template.
SHAPES = {
    "emo": (302, (9, 10, 12, 13, 16, 18, 20, 23, 25, 33), (3, 2, 2, 3)),
    "ethos-religion": (487, (8, 11, 12, 13, 19, 24, 29, 40, 63, 187), (2, 2)),
    "wiki_qa": (786, (37, 38, 43, 44, 49, 52, 55, 56, 66, 90), (2, 2)),
    "yelp_polarity": (711, (28, 83, 108, 138, 173, 234, 256, 256, 256, 256), (2, 2)),
}


@dataclasses.dataclass(frozen=True)
class ScoredTask:
    """A task as both sides read it."""

    name: str
    demos: list[int]  # (P,)
    items: list[Item]

    def longest(self) -> int:
        """The most positions that the prefix, an input and its longest option take together."""
        return len(self.demos) + max(len(item.x_tokens) + max(map(len, item.options_tokens)) for item in self.items)


def random_task(name: str, shape, items: int, vocabulary: int) -> ScoredTask:
    """Random tokens of a shape as in SHAPES; options of two or more tokens begin alike, as after a line break."""
    random, (demos, inputs, options) = np.random.default_rng(BATCH_SEED), shape

    def draw(count):
        return random.integers(0, vocabulary, count).tolist()

    def item(i):
        first = draw(1)
        return Item(draw(inputs[i % len(inputs)]), [(first if n > 1 else []) + draw(n - (n > 1)) for n in options])

    return ScoredTask(name, draw(demos), [item(i) for i in range(items)])


def real_task(folder, name: str, k: int, seed: int, items: int, llm_folder, template: str) -> ScoredTask:
    """A task from MetaICL's files: as many of `k` demonstrations as fit, and the first test items. Raises UserError."""
    tokenizer = load_tokenizer(llm_folder)
    if tokenizer is None:
        raise UserError(f"{llm_folder} has no tokenizer, which --tasks needs: give a folder with one as --llm.")
    path = metaicl.example_file(folder, name, k, seed, "test")
    test, around = metaicl.read_file(path)[:items], chosen(template)
    evaluation.check_options(test, path)

    def read(pieces, limit=None):
        first, *rest = (tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces)
        return sum(rest, first[:limit])

    def read_input(x):
        return read(around.query(x), INPUT_TOKENS)

    examples = metaicl.read_examples(folder, name, k, seed, "train")
    pairs = [(read_input(e.input), read(around.output(e.output))) for e in examples]
    fitting = sampling.fit_demos([len(x) + len(y) for x, y in pairs], DEMO_TOKENS)
    demos = sampling.join_demos(pairs[:fitting]).tolist()
    return ScoredTask(
        name, demos, [Item(read_input(e.input), [read(around.output(o)) for o in e.options]) for e in test]
    )


class ScoringSide:
    """Our side: reads each task's demonstrations once, then all its items as `evaluate` does."""

    def __init__(self, config: Config, llm: str, dtype: str, attention: str, batch_size: int, tasks: list[ScoredTask]):
        self.events: collections.Counter = collections.Counter()
        jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: self.events.update([event]))
        on_gpu = jax.default_backend() == "gpu" and dtype == "bfloat16"
        kernel = ("cudnn" if on_gpu else "xla") if attention == "auto" else attention
        if own_weights(llm):
            self.llm = load_llm(llm, dtype, kernel)
        else:
            params = jax.tree.map(jnp.asarray, random_params(config, LLM_SEED, dtype))
            self.llm = LLM(config, params, None, "random", dtype, kernel)
        self.batch_size, self.tasks, self.caches = batch_size, {task.name: task for task in tasks}, {}
        self.embed = jax.jit(self.llm.embed)

    def description(self) -> dict:
        device = jax.devices()[0]
        return {"platform": device.platform, "device": device.device_kind, "attention": self.llm.attention}

    def peak_bytes(self) -> int:
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use", measure.peak_bytes() if jax.default_backend() == "cpu" else 0)

    def read(self, name: str) -> float:
        """Seconds of reading a task's demonstrations."""
        demos = self.tasks[name].demos
        columns = min((size for size in DEMO_BUCKETS if size >= len(demos)), default=bucket(len(demos)))
        tokens = np.zeros((1, min(columns, self.llm.window)), np.int32)
        tokens[0, : len(demos)] = demos
        start = time.perf_counter()
        prefix = Prefix(self.embed(self.llm.params, tokens), np.asarray([len(demos)], np.int32))
        self.caches[name] = jax.block_until_ready(cache_prefix(self.llm, prefix))
        return time.perf_counter() - start

    def score(self, name: str, items: int) -> tuple[float, list[list[float]]]:
        """Seconds of scoring a task's first items, and each one's option scores."""
        start = time.perf_counter()
        rows = [lay_out(item.x_tokens, item.options_tokens) for item in self.tasks[name].items[:items]]
        scores = score_rows(self.llm, self.caches[name], rows, self.batch_size)
        return time.perf_counter() - start, [[float(s) for s in row] for row in scores]

    def shapes(self, name: str) -> dict:
        """The shape of the passes over a task's items, and the share of padding among their tokens."""
        rows = [lay_out(item.x_tokens, item.options_tokens) for item in self.tasks[name].items]
        passes = plan(self.llm, self.caches[name], rows, self.batch_size)
        read, used = sum(p.count * p.columns for p in passes), sum(len(row.tokens) for row in rows)
        return {
            "passes": len(passes),
            "rows": passes[0].count,
            "columns": passes[0].columns,
            "padding": 1 - used / read,
        }

    def compiled(self) -> int:
        """The number of programs compiled, or read from the compile cache, so far."""
        return self.events[COMPILED]


def own_weights(llm: str) -> bool:
    """Whether a name of the command line is a folder with weights."""
    return Path(llm).expanduser().exists() and has_weights(llm)
