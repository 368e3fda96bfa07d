"""Evaluate: every method on the test tasks of a partition, by MetaICL's protocol (paper, section 4).

    python -m mend_jax.evaluate --config=configs/small_world.py --workdir=runs/table \\
        --config.evaluate.methods="('zero_shot', 'icl', 'mend=runs/mend')"

For each task and seed the seed's k examples are the demonstrations; their prefix is made and read once, its keys and
values are shared by all items and options. The prediction is the option of the highest mean log-probability per token.
An evaluation that was interrupted goes on: a task and seed whose file is whole is not computed again (results.py).

Files in the workdir: predictions/, scores.json (fractions, not percent), table.md, config.json.
"""

import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mend_jax import costs, results
from mend_jax.data.evaluation import EvalTask, load_tasks
from mend_jax.data.sampling import demo_budget, fit_demos, join_demos, release_truncation, row_rng
from mend_jax.data.small_world import resolve
from mend_jax.errors import UserError
from mend_jax.export import read_trained
from mend_jax.llm import LLM, load_llm
from mend_jax.metrics import aggregate, task_scores
from mend_jax.prefix import Distiller, Prefix, SoftPrompt, bucket, no_prefix
from mend_jax.scoring import cache_prefix, score_items

BUILT_IN = ("zero_shot", "icl")  # methods without a trained model


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """What makes a prefix of demonstrations. With no model: "icl" embeds them, "zero_shot" ignores them."""

    name: str
    model: Distiller | SoftPrompt | None = None
    path: str = ""

    @property
    def reads_demos(self) -> bool:
        return self.name == "icl" if self.model is None else isinstance(self.model, Distiller)

    def window(self, llm: LLM) -> int:
        """Demonstration tokens that it can read, whatever the query."""
        return getattr(self.model, "window", llm.window)


def prefix_maker(config, llm: LLM, method: Method, params=None) -> Callable[..., Prefix]:
    """prefix_of(task, order=None) -> Prefix (B == 1): a method's prefix of an `EvalTask`'s demonstrations.

    Args:
        config: a whole run's config.
        llm: the LLM that will read it.
        method: how it is made.
        params: of the method's model; None is its own. (Training gives the current ones.)
    """

    def prefix_of(task: EvalTask, order=None) -> Prefix:
        if method.model is None and not method.reads_demos:
            return no_prefix(1, llm.config.width)
        context = make_context(config, llm, method, task, order) if method.reads_demos else np.zeros(1, np.int32)
        sizes = [size for size in config.data.demo_buckets if size >= len(context)]  # few, because each is compiled
        columns = min(method.window(llm), min(sizes, default=bucket(len(context))))
        tokens, length = np.zeros((1, columns), np.int32), np.asarray([len(context)], np.int32)
        tokens[0, : len(context)] = context
        if method.model is None:
            return Prefix(_embed(llm, llm.params, tokens), length)
        return _apply(method.model, method.model.params if params is None else params, tokens, length)

    return prefix_of


def make_context(config, llm: LLM, method: Method, task: EvalTask, order=None) -> np.ndarray:
    """The (N,) tokens of a task's demonstrations that fit beside its longest query, in the file's order or `order`.

    Examples that do not fit are left out; with data.release_truncation the last one is cut, as the release does.
    """
    query = max(len(item.x_tokens) + max(map(len, item.options_tokens)) for item in task.items)
    budget = demo_budget(config.data.max_demo_tokens, llm.window, query, method.window(llm), 0)
    pairs = task.demos if order is None else [task.demos[i] for i in order]
    if config.data.release_truncation:
        cut = release_truncation(join_demos(pairs), min(method.window(llm), llm.window - query), llm.window - query)
        return cut[method.model is None]
    count = fit_demos([len(x) + len(y) for x, y in pairs], budget)
    if count == 0:
        raise UserError(
            f"No demonstration of {task.task}, seed {task.seed} fits into {budget} tokens: raise data.max_demo_tokens"
            " or lower data.max_input_tokens."
        )
    return join_demos(pairs[:count])


@dataclasses.dataclass
class TaskResult:
    """One task and seed: the lines of its prediction file and what they cost."""

    lines: list[dict]
    cost: dict


def evaluate_task(
    llm: LLM,
    prefix_of: Callable[..., Prefix],
    task: EvalTask,
    batch_size: int,
    shuffle_demos: bool = False,
    params=None,
    chunk: int = 512,
    progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """Scores all options of all items of one task and seed.

    Args:
        llm: the LLM.
        prefix_of: of `prefix_maker`.
        task: demonstrations and items.
        batch_size: items in one pass of the LLM.
        shuffle_demos: a fresh order of the demonstrations, and so a new prefix, for every item.
        params: of the LLM; None is `llm.params`.
        chunk: see `score_items`.
        progress: called with the number of items finished.
    Raises:
        UserError: a demonstration set or an item that does not fit, or scores that are not finite.
    """
    groups = [(None, task.items)]
    if shuffle_demos:
        groups = [(row_rng(task.seed, i).permutation(len(task.demos)), [item]) for i, item in enumerate(task.items)]
    scores, prefix_seconds, seconds, positions = [], 0.0, 0.0, 0
    for order, items in groups:
        began = time.perf_counter()
        cache = jax.block_until_ready(cache_prefix(llm, prefix_of(task, order), params))
        made = time.perf_counter()
        scores += score_items(llm, cache, items, batch_size, params, chunk, progress)
        prefix_seconds += made - began
        seconds += time.perf_counter() - made
        positions += int(cache.length)
    where = f"{task.task}, seed {task.seed}"
    lines = [_line(i, item, values, where) for i, (item, values) in enumerate(zip(task.items, scores, strict=True))]
    cost = {
        "prefix_length": positions / len(groups),
        "prefix_seconds": prefix_seconds / len(groups),
        "item_seconds": seconds / len(task.items),
    }
    return TaskResult(lines, cost)


def evaluate_prefix(
    llm: LLM, prefix_of: Callable[..., Prefix], tasks: Iterable[EvalTask], batch_size: int, **options
) -> dict:
    """`metrics.aggregate` of one way to make prefixes, over tasks and seeds; nothing is written.

    Args:
        llm: the LLM.
        prefix_of: of `prefix_maker`.
        tasks: one for each task and seed.
        batch_size: as in `evaluate_task`; so are `options`.
    """
    scores: dict[str, dict[int, dict]] = {}
    for task in tasks:
        result = evaluate_task(llm, prefix_of, task, batch_size, **options)
        scores.setdefault(task.task, {})[task.seed] = _scores(task, result.lines)
    return aggregate(scores)


def dev_score(config, llm: LLM, model: Distiller | SoftPrompt, params) -> float:
    """The score (0 to 1) of a model in training on the meta-test *validation* examples.

    Args:
        config: a whole run's config, paths resolved.
        llm: the run's LLM.
        model: the `Distiller` or `SoftPrompt`; always the same object, so that nothing is compiled again.
        params: its current params.
    """
    method = Method("model in training", model)
    prefix_of = prefix_maker(config, llm, method, jax.device_put(params))
    tasks, options = _dev_tasks(llm, config.to_json()), _options(config, method)
    return evaluate_prefix(llm, prefix_of, tasks, **options)["score"]["mean"]


def evaluate(config, workdir) -> dict:
    """Evaluates config.evaluate.methods, writes files to `workdir`, prints the table, returns scores.json's content.

    Raises:
        UserError: an unknown method, a path without a model, missing tasks, items that do not fit, a full disk.
    """
    config, workdir = resolve(config), Path(workdir).expanduser()
    c = config.llm
    llm = load_llm(c.path, c.dtype, c.attention)
    methods = load_methods(config.evaluate.methods, llm, config.prefix.dtype)
    results.write_config(workdir, config)
    tasks, missing = load_tasks(config, llm, config.evaluate.split)
    llm_hash, found = results.tree_hash(llm.params), {}
    with _progress(len(methods) * sum(len(task.items) for task in tasks)) as bar:
        for method in methods:
            store = results.Store(workdir, method.name, made_of(config, method, llm_hash))
            found[method.name] = _evaluate_method(config, llm, method, tasks, store, bar)
            score = found[method.name]["score"]["mean"]
            tqdm.write(f"{method.name}: {100 * score:.2f}", file=sys.stderr)
    summary = {
        "llm": str(config.llm.path),
        "partition": config.data.partition,
        "split": config.evaluate.split,
        "k": config.data.k,
        "seeds": list(config.evaluate.seeds),
        "missing_tasks": list(missing),
        "methods": found,
    }
    print(results.write_results(workdir, summary))
    return summary


def load_methods(specs: Iterable[str], llm: LLM, dtype: str = "float32") -> list[Method]:
    """The methods of config.evaluate.methods: "zero_shot", "icl", or "NAME=PATH"; `dtype` is config.prefix.dtype."""
    methods = []
    for spec in specs:
        name, _, path = spec.partition("=")
        if any(name == method.name for method in methods):
            raise UserError(f"config.evaluate.methods names {name!r} twice: give each method its own name.")
        if not path and spec not in BUILT_IN:
            known = ", ".join(BUILT_IN)
            raise UserError(f"config.evaluate.methods holds {spec!r}: use {known} or NAME=PATH of a trained model.")
        if path and (name in BUILT_IN or not re.fullmatch(r"[\w.+-]+", name)):
            raise UserError(
                f"config.evaluate.methods holds {spec!r}: NAME may hold letters, digits and _.+-, and is not one of"
                f" {', '.join(BUILT_IN)}."
            )
        methods.append(Method(name, load_prefix_model(path, llm, dtype) if path else None, path))
    if not methods:
        raise UserError("config.evaluate.methods is empty: name at least one, such as zero_shot.")
    return methods


def load_prefix_model(path: str, llm: LLM, dtype: str = "float32") -> Distiller | SoftPrompt:
    """A trained distiller or soft prompt, of a training workdir or an exported folder, for this LLM.

    A distiller computes in `dtype`, so that its test scores have the precision of its scores in training.
    """
    model = read_trained(path)
    if model.llm_width != llm.config.width:
        raise UserError(
            f"The model in {path} makes vectors of width {model.llm_width}, the LLM reads {llm.config.width}:"
            " take its own LLM."
        )
    arithmetic = {"dtype": dtype} if isinstance(model, Distiller) else {}
    return dataclasses.replace(model, params=jax.device_put(model.params), **arithmetic)


def made_of(config, method: Method, llm_hash: str) -> dict:
    """Everything but the task's files that decides a method's predictions: the key of their folder."""
    data = ("template", "k", "max_demo_tokens", "max_input_tokens", "release_truncation")
    facts = {name: config.data[name] for name in data}
    facts |= {"split": config.evaluate.split, "limit": config.evaluate.limit}
    facts |= {"shuffle_demos": config.evaluate.shuffle_demos and method.reads_demos}
    facts |= {"llm": llm_hash, "llm_dtype": config.llm.dtype, "method": method.name}
    if method.model is not None:
        facts |= {
            "model": results.tree_hash(method.model.params),
            "projection": getattr(method.model, "projection", ""),
        }
        if getattr(method.model, "dtype", "float32") != "float32":  # the usual one is not named
            facts |= {"dtype": method.model.dtype}
    return facts


def _evaluate_method(config, llm, method, tasks, store, bar) -> dict:
    """One method's entry in scores.json."""
    scores, spent, prefix_of = {}, [], prefix_maker(config, llm, method)
    for task in tasks:
        bar.set_description(f"{method.name}  {task.task} {task.seed}", refresh=False)
        context = make_context(config, llm, method, task) if method.reads_demos else np.zeros(0, np.int32)
        content = results.content_hash(_content(task, method, context))
        kept = store.read(task.task, task.seed, content, len(task.items))
        if kept is None:
            result = evaluate_task(llm, prefix_of, task, progress=bar.update, **_options(config, method))
            counted = _counted(llm, method, task, len(context), result.cost["prefix_length"])
            kept = result.lines, {"content": content, **result.cost, **counted}
            store.write(task.task, task.seed, *kept)
        else:
            bar.total -= len(task.items)  # so that the time left is that of the rest
        scores.setdefault(task.task, {})[task.seed] = _scores(task, kept[0])
        spent.append(kept[1])
    return {"path": method.path, **aggregate(scores), "cost": _mean_cost(spent)}


def _options(config, method: Method) -> dict:
    """What a config says about `evaluate_task`, for validation and for test alike."""
    return {
        "batch_size": config.evaluate.batch_size,
        "shuffle_demos": config.evaluate.shuffle_demos and method.reads_demos,
        "chunk": config.loss.chunk,
    }


def _counted(llm, method, task, demo_tokens: int, prefix_length: float) -> dict:
    """Costs that follow from lengths alone; item_flops are means over the task's items."""
    P, itemsize = round(prefix_length), jnp.dtype(llm.dtype).itemsize
    lengths = [(len(item.x_tokens), [len(option) for option in item.options_tokens]) for item in task.items]
    item = sum(costs.score_cached(llm.config, P, *of_item) for of_item in lengths) / len(lengths)
    prefix = costs.reading(llm.config, P).forward
    if isinstance(method.model, Distiller):
        prefix += costs.distil(method.model.config, llm.config, demo_tokens, method.model.num_vectors)
    return {
        "demo_tokens": demo_tokens,
        "prefix_flops": prefix,
        "item_flops": item,
        "item_flops_uncached": item + prefix,
        "cache_bytes": costs.cache_bytes(llm.config, P, itemsize),
        "vector_bytes": costs.vector_bytes(llm.config, P, itemsize),
    }


def _mean_cost(entries: list[dict]) -> dict:
    """Means over tasks and seeds; of the times medians, because the first of each shape is compiled."""
    mean = {}
    for name in (key for key in entries[0] if key != "content"):
        values = [entry[name] for entry in entries]
        mean[name] = float(np.median(values) if name.endswith("seconds") else np.mean(values))
    return mean


def _content(task: EvalTask, method: Method, context) -> list:
    """What decides a task's predictions: what is read, and which option is right."""
    demos = [[_ints(x), _ints(y)] for x, y in task.demos] if method.reads_demos else []
    items = [[_ints(i.x_tokens), [_ints(o) for o in i.options_tokens], i.label, list(i.options)] for i in task.items]
    return [demos, _ints(context), items, task.classification]


def _ints(ids) -> list[int]:
    return [int(token) for token in ids]


def _line(index: int, item: Any, scores: np.ndarray, where: str) -> dict:
    if not np.all(np.isfinite(scores)):
        raise UserError(
            f"The scores of item {index} of {where} are not finite: the model diverged or its weights are damaged."
        )
    return {
        "item": index,
        "scores": [round(float(score), 6) for score in scores],
        "options": list(item.options),
        "prediction": item.options[int(np.argmax(scores))],
        "gold": item.options[item.label],
    }


def _scores(task: EvalTask, lines: list[dict]) -> dict:
    return task_scores([line["prediction"] for line in lines], [line["gold"] for line in lines], task.classification)


@functools.lru_cache(maxsize=1)
def _dev_tasks(llm, settings: str) -> list[EvalTask]:
    """Read and tokenised once for a run; `settings` is its config as JSON."""
    return load_tasks(ConfigDict(json.loads(settings)), llm, "dev")[0]


def _progress(items: int) -> tqdm:
    return tqdm(total=items, unit="item", dynamic_ncols=True, disable=not sys.stderr.isatty())


@functools.partial(jax.jit, static_argnums=0)
def _embed(llm, params, tokens):
    return llm.embed(params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, tokens, length):
    return model.apply(params, tokens, length)


def main(config, workdir) -> int:
    """The command: exit code 0."""
    evaluate(config, workdir)
    return 0


if __name__ == "__main__":
    from mend_jax.cli import run

    run(main)
