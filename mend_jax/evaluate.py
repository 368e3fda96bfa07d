"""Evaluate: every method on the test tasks of a partition, by MetaICL's protocol (paper, section 4).

    python -m mend_jax.evaluate --config=configs/small_world.py:quick --workdir=runs/table \\
        --config.evaluate.methods=zero_shot,icl,mend=runs/mend

For each task and seed, the seed's k examples are the demonstrations. Their prefix is made once and the LLM reads it once; all
items and options share its keys and values. The prediction is the option with the highest mean log-probability per token, or
with evaluate.option_score=sum the highest probability.
An interrupted evaluation resumes: a task and seed whose file is complete is not computed again (results.py).

Several processes share the tasks, and each holds both models whole on its first device. With evaluate.parallel="mesh" ("auto":
as train.parallel) both models are sharded over all devices of all processes, which compute every task together.

Files in the workdir: predictions/, scores.json (fractions, not percent), table.md, config.json.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.data.bos import NONE
from mend_jax.data.demonstrations import AS_IN_FILES
from mend_jax.data.evaluation import EvalTask, load_tasks
from mend_jax.interchange.trained import load_trained, method_spec
from mend_jax.llm.decoder_only import LLM, load_llm
from mend_jax.llm.embeddings import encoder_of
from mend_jax.models.folders import fingerprint
from mend_jax.prefixes import KINDS, Demonstrations, Kind
from mend_jax.run import checks, distributed, sharding
from mend_jax.run.layout import Layout, make_layout
from mend_jax.run.lock import alone_in
from mend_jax.run.reporting import say
from mend_jax.scoring import costs, results
from mend_jax.scoring.answers import Source
from mend_jax.scoring.comparisons import Study, method_table
from mend_jax.scoring.metrics import aggregate
from mend_jax.scoring.tasks import (
    MEAN,
    Method,
    content_of,
    evaluate_task,
    make_context,
    prefix_maker,
    scores_of,
    scoring_options,
)

LOCK = ".evaluating.lock"
BUILT_IN = {kind.method: kind for kind in KINDS.values() if kind.method}  # methods without a trained model


def evaluate(config, workdir, llm: LLM | None = None, prints: bool = True, others: dict | None = None) -> dict:
    """Evaluates config.evaluate.methods, writes the files in `workdir`, prints the table and returns the content of scores.json.

    Args:
        config: the config of a whole run.
        workdir: a folder, new or of an earlier evaluation.
        llm: that of the config, from `load_models`, if it is loaded already.
        prints: whether the table is printed.
        others: the "methods" of an earlier scores.json of the same evaluation: they stay beside those of the config.
    Raises:
        UserError: an unknown method, a path without a model, missing tasks, items that do not fit, a full disk, another
            evaluation in `workdir`.
    """
    with alone_in(Path(workdir), LOCK, "evaluating"):
        return _evaluate(config, Path(workdir), llm, prints, others or {})


def _evaluate(config, workdir: Path, llm: LLM | None, prints: bool, others: dict) -> dict:
    layout = evaluation_layout(config)
    llm = load_the_llm(config, layout) if llm is None else llm
    methods = load_methods(config, llm, layout)
    results.write_config(workdir, config)
    tasks, missing = load_tasks(config, llm, config.evaluate.split, encoder_of(config, llm))
    checks.check_evaluation(config, llm, methods, tasks, layout.mesh)
    read_from, found = fingerprint(config.llm.path), {}
    stores = [results.Store(workdir, method.name, prediction_facts(config, method, read_from)) for method in methods]
    items = sum(len(task.items) for task in tasks)
    say(f"Evaluating {', '.join(method.name for method in methods)}: {items:,} items each.")
    if layout.mesh is None:
        _evaluate_share(config, llm, methods, tasks, stores)
    with Progress(len(methods) * sum(len(task.items) for task in tasks), "item") as bar:
        for method, store in zip(methods, stores, strict=True):
            found[method.name] = _evaluate_method(config, llm, method, tasks, store, bar)
            score = found[method.name]["score"]["mean"]
            say(f"{method.name}: {100 * score:.2f}{_how(method.model, found[method.name], store, tasks)}")
    summary = {
        "llm": str(config.llm.path),
        "partition": config.data.partition,
        "split": config.evaluate.split,
        "k": config.data.k,
        "seeds": list(config.evaluate.seeds),
        "missing_tasks": list(missing),
        "methods": others | found,
    }
    if distributed.is_first():
        table = results.write_results(workdir, summary)
        if prints:
            print(table)
            results.add_intervals(workdir, method_table(Study.of({name: [Source(workdir, name)] for name in found})))
            say(f"Column meanings and scores by task: {workdir / 'table.md'}; all answers: {workdir / 'predictions'}.")
    return summary


def _how(model: Kind, found: dict, store, tasks) -> str:
    """What to add to a score: whether it is new, and whether each seed was scored."""
    if not store.written:
        return " (all of it was scored before)"
    if not model.reads_demos and found["scored"] < len(tasks):
        return " (reads no demonstrations: seeds that ask the same items were scored once)"
    return ""


def _evaluate_share(config, llm, methods, tasks, stores) -> None:
    """Scores this process's share of the tasks for all methods, then waits for the others: the stores then hold every share."""
    count = jax.process_count()
    if count == 1:
        return
    with Progress(sum(len(task.items) for task in tasks) * len(methods) // count, "item") as bar:
        for method, store in zip(methods, stores, strict=True):
            if share := _share(tasks, method.model, jax.process_index(), count):
                _evaluate_method(config, llm, method, share, store, bar)
    distributed.wait_for_all("evaluated")


def _share(tasks: list[EvalTask], model: Kind, process: int, count: int) -> list[EvalTask]:
    """A process's part: every count-th task and seed; a model that reads no demonstrations keeps a task's seeds together."""
    if model.reads_demos:
        return tasks[process::count]
    names = sorted({task.task for task in tasks})[process::count]
    return [task for task in tasks if task.task in names]


def evaluation_layout(config) -> Layout:
    """The layout of an evaluation's models, by evaluate.parallel; "auto" follows train.parallel."""
    mode = config.evaluate.parallel
    mesh = config.train.parallel == "mesh" if mode == "auto" else mode == "mesh"
    return make_layout("mesh" if mesh else "pmap", config.mesh)


def load_models(config, layout: Layout) -> tuple[LLM, list[Method]]:
    """The LLM and the methods of a config, placed by `layout`."""
    llm = load_the_llm(config, layout)
    return llm, load_methods(config, llm, layout)


def load_the_llm(config, layout: Layout) -> LLM:
    """The LLM of a config, placed by `layout`."""
    c = config.llm
    return load_llm(c.path, c.dtype, c.attention, weights=c.weights, place=layout.place, bos=config.data.bos)


def load_methods(config, llm: LLM, layout: Layout) -> list[Method]:
    """The methods of config.evaluate.methods: "zero_shot", "icl", "NAME=PATH", "NAME=KIND:PATH" for a model that is used as
    another kind than it was trained as, "NAME=firstN:PATH" for its first N vectors (prefix.nested), or "NAME=lastN:icl" and
    "NAME=lastNeach:icl" for in-context learning cut to the last N tokens, of the context or of each demonstration."""
    methods = []
    for spec in config.evaluate.methods:
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
        model = load_method_model(path, config, llm, layout) if path else BUILT_IN[name].beside(llm)
        methods.append(Method(name, model, "" if model.method else path))
    if not methods:
        raise UserError("config.evaluate.methods is empty: name at least one, such as zero_shot.")
    return methods


def load_method_model(spec: str, config, llm: LLM, layout: Layout) -> Kind:
    """What stands behind NAME= in evaluate.methods: the trained model in a training workdir or an exported folder (PATH, KIND:PATH
    or firstN:PATH), placed beside this LLM, or in-context learning that is cut (lastN:icl, lastNeach:icl).

    A trained one computes in prefix.dtype, so that its test scores have the same precision as its scores in training.
    """
    if cut := re.fullmatch(r"last(\d+)(each)?:icl", spec):
        return Demonstrations.beside(llm).cut(int(cut[1]), bool(cut[2]))
    kind, first, path = method_spec(spec)
    model = load_trained(path, llm, place=layout.place)
    model = model.first(first) if first else model
    put = jax.device_put if layout.mesh is None else layout.place_frozen
    model = model.placed(put, config.prefix.dtype)
    return KINDS[kind].of_trained(model, config, path) if kind else model


def prediction_facts(config, method: Method, read_from: str) -> dict:
    """Everything, apart from the task's files, that decides a method's predictions: the key of the predictions' folder.

    `read_from` is the fingerprint of the LLM's folder.
    """
    data = ("template", "k", "max_demo_tokens", "max_input_tokens", "release_truncation")
    facts = {name: config.data[name] for name in data}
    facts |= {"split": config.evaluate.split, "limit": config.evaluate.limit}
    facts |= {"shuffle_demos": config.evaluate.shuffle_demos and method.model.reads_demos}
    if method.model.reads_demos:
        facts |= {name: config.evaluate[name] for name, plain in AS_IN_FILES.items() if config.evaluate[name] != plain}
        facts |= {"perturb_share": config.evaluate.perturb_share} if "perturb" in facts else {}
    facts |= {"llm": read_from, "llm_dtype": config.llm.dtype, "llm_weights": config.llm.weights, "method": method.name}
    if config.data.bos != NONE:
        facts |= {"bos": config.data.bos}
    if config.evaluate.option_score != MEAN:
        facts |= {"option_score": config.evaluate.option_score}
    if not method.model.method:
        facts |= {"model": results.tree_hash(method.model.params)}
    return facts | method.model.facts()


def _evaluate_method(config, llm, method, tasks, store, bar) -> dict:
    """One method's entry in scores.json. Seeds that differ only in demonstrations the method does not read are scored once, and
    so are those whose items have the same demonstrations."""
    scores, spent, known, prefix_of, model = {}, [], {}, prefix_maker(config, llm, method), method.model
    together = sharding.mesh_of(llm.params) is not None  # all processes compute, the first one writes
    for task in tasks:
        bar.at(f"{method.name}  {task.task} {task.seed}")
        context = make_context(config, llm, model, task)
        content = results.content_hash(content_of(task, model.reads_demos, context))
        kept = store.read(task.task, task.seed, content, len(task.items))
        if _is_missing(kept, task, together):
            kept = known.get(content)
            if kept is None:
                result = evaluate_task(llm, prefix_of, task, progress=bar.update, **scoring_options(config, method))
                counted = _counted(llm, model, task, context, result.cost["prefix_length"])
                kept = result.lines, {"content": content, **result.cost, **counted}
            else:
                bar.skip(len(task.items))
            if not together or distributed.is_first():
                store.write(task.task, task.seed, *kept)
        else:
            bar.skip(len(task.items))
        own_order = config.evaluate.shuffle_demos  # drawn by the seed
        if not model.reads_demos or not (task.shares_demos or own_order):
            known[content] = kept
        scores.setdefault(task.task, {})[task.seed] = scores_of(task, kept[0])
        spent.append(kept[1])
    return {"path": method.path, **aggregate(scores), "cost": _mean_cost(spent), "scored": len(known) or len(tasks)}


def _is_missing(kept, task: EvalTask, together: bool) -> bool:
    """Whether a task and seed must still be scored. Processes that compute `together` follow what the first one finds."""
    if not together:
        return kept is None
    missing = bool(distributed.of_first(kept is None))
    if kept is None and not missing:
        raise UserError(
            f"Only process 0 sees the predictions of {task.task}, seed {task.seed}: give all processes a workdir on a"
            " shared disk."
        )
    return missing


def _counted(llm, model: Kind, task, context, prefix_length: float) -> dict:
    """The costs that follow from lengths alone; item_flops is the mean over the task's items."""
    P, itemsize = round(prefix_length), jnp.dtype(llm.dtype).itemsize
    lengths = [(len(item.x_tokens), [len(option) for option in item.options_tokens]) for item in task.items]
    item = sum(costs.score_cached(llm.config, P, *of_item) for of_item in lengths) / len(lengths)
    prefix = costs.read_prefix(llm.config, P) + model.flops(llm.config, context)
    return {
        "demo_tokens": int((context >= 0).sum()),
        "prefix_flops": prefix,
        "item_flops": item,
        "item_flops_uncached": item + prefix,
        "cache_bytes": costs.cache_bytes(llm.config, P, itemsize),
        "vector_bytes": costs.vector_bytes(llm.config, P, itemsize),
    }


def _mean_cost(entries: list[dict]) -> dict:
    """Means over tasks and seeds. Times are medians over the entries that compiled nothing, or None if there are none."""
    mean = {}
    for name in (key for key in entries[0] if key not in ("content", "compiled")):
        timed = name.endswith("seconds")
        values = [entry[name] for entry in entries if not (timed and entry["compiled"])]
        mean[name] = float((np.median if timed else np.mean)(values)) if values else None
    return mean


def main(config, workdir) -> int:
    """The command; returns exit code 0. SIGTERM ends it at once (exit code 75): everything scored so far is on disk."""
    with distributed.stops_at_sigterm():
        evaluate(config, workdir)
    return 0


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
