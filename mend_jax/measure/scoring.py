"""Scoring items after a cached prefix against a plain PyTorch loop, task by task: milliseconds per item, scores compared."""

import importlib.util

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.text import columns
from mend_jax.measure import machine as measure
from mend_jax.measure.jax_side import TOLERANCE, check_fits
from mend_jax.measure.scored_tasks import SHAPES, ScoredTask, ScoringSide, own_weights, random_task, real_task
from mend_jax.models.families import Config


def measure_scoring(arguments, config: Config) -> tuple[dict, str, bool]:
    """(report, its text, whether both sides gave the same scores and predictions)."""
    tasks = make_tasks(arguments, config)
    for task in tasks:
        check_fits(f"LLM with the prefix, an input and an option of {task.name}", task.longest(), config)
    report = {"arguments": vars(arguments), "machine": measure.machine(), "tasks": {}}
    report["weights"] = "its own" if own_weights(arguments.llm) else "random"
    common = (config, arguments.llm, arguments.dtype)
    ours = measure.Worker(ScoringSide, *common, arguments.attention, arguments.batch_size, tasks)
    try:
        theirs = measure.Worker(_pytorch_side(), *common, arguments.query_head, tasks)
        sides = {"MEND-JAX": ours, "PyTorch": theirs}
        try:
            with Progress(len(tasks) * 2 * (1 + arguments.repeats), "run") as bar:
                for task in tasks:
                    report["tasks"][task.name] = _measure_task(sides, task, arguments, bar)
            report["sides"] = {
                name: {**side.call("description"), "peak_bytes": side.call("peak_bytes")}
                for name, side in sides.items()
            }
        finally:
            theirs.close()
    finally:
        ours.close()
    return report, scoring_text(report), all(task["same"]["yes"] for task in report["tasks"].values())


def make_tasks(arguments, config: Config) -> list[ScoredTask]:
    """The tasks that the command line selects: real ones, those of SHAPES, or one with given lengths. Raises UserError."""
    names = [name for name in arguments.names.split(",") if name] or list(SHAPES)
    if arguments.tasks:
        if not own_weights(arguments.llm):
            raise UserError(
                "--tasks are read in an LLM's own tokens: give a folder with weights and a tokenizer as --llm."
            )
        where = (16, arguments.seed, arguments.items, arguments.llm, arguments.template)
        return [real_task(arguments.tasks, name, *where) for name in names]
    if arguments.query:
        shape = (arguments.demos, (arguments.query,), (arguments.target,) * arguments.options)
        return [random_task("given lengths", shape, arguments.items, config.vocab_size)]
    wrong = next((name for name in names if name not in SHAPES), None)
    if wrong is not None:
        raise UserError(
            f"Without --tasks only the shapes of {', '.join(SHAPES)} are known, not of {wrong}: give --tasks."
        )
    return [random_task(name, SHAPES[name], arguments.items, config.vocab_size) for name in names]


def compare_scores(ours, theirs, tolerance: float) -> dict:
    """Whether two sides' scores agree: relative differences, and predictions that differ by more than rounding explains."""
    differences, predictions = [], 0
    for a, b in zip(map(np.asarray, ours), map(np.asarray, theirs), strict=True):
        differences.append(float(np.abs(a / b - 1).max()))
        i, j = int(np.argmax(a)), int(np.argmax(b))
        predictions += i != j and not abs(b[i] / b[j] - 1) < 2 * tolerance
    same = all(difference < tolerance for difference in differences) and not predictions  # false for NaN
    return {
        "yes": same,
        "largest_difference": max(differences),
        "other_predictions": predictions,
        "tolerance": tolerance,
    }


def scoring_text(report: dict) -> str:
    """The report for a terminal."""
    arguments, sides = report["arguments"], report["sides"]
    rows = [
        ["task", "prefix", "MEND-JAX", "PyTorch", "ratio", "prefix ms", "PyTorch", "compiled", "padding", "passes of"]
    ]
    rows.append(["", "tokens", "ms/item", "ms/item", "", "", "", "", "", ""])
    for name, task in report["tasks"].items():
        shape = task["shapes"]
        passes = f"{shape['passes']} x {shape['rows']} x {shape['columns']}"
        cells = [f"{task[key]['item_ms']:.1f}" for key in sides] + [f"{task['ratio']:.2f}x"]
        cells += [f"{task[key]['prefix_ms']:.0f}" for key in sides]
        rows.append([name, str(task["prefix"]), *cells, str(task["compiled"]), f"{shape['padding']:.1%}", passes])
    worst = max(task["same"]["largest_difference"] for task in report["tasks"].values())
    same = "the same" if all(task["same"]["yes"] for task in report["tasks"].values()) else "NOT THE SAME"
    head = "the options' tokens" if arguments["query_head"] else "all tokens"
    lines = [
        f"Scoring {arguments['items']} items after a cached prefix, LLM {arguments['llm']} ({report['weights']} weights), "
        f"{arguments['dtype']}, PyTorch's head at {head}",
        measure.machine_line(report),
        "",
        columns(rows),
        "",
        "compiled: programs, by the first run over a task; padding: of all tokens that the LLM reads of the items",
        f"scores and predictions of both sides: {same}, largest relative difference {worst:.1e}",
    ]
    return "\n".join(lines)


def _measure_task(sides: dict, task: ScoredTask, arguments, bar: Progress) -> dict:
    """The figures of one task: the sides alternate, also in which goes first; a first run of each warms up."""
    found = {name: {"runs": [], "prefixes": []} for name in sides}
    before, few = sides["MEND-JAX"].call("compiled"), {"MEND-JAX": arguments.items, "PyTorch": min(2, arguments.items)}
    for name, side in sides.items():
        bar.at(f"{task.name}, {name}, warming up")
        side.call("read", task.name)
        side.call("score", task.name, few[name])
        bar.update()
    figures = {"prefix": len(task.demos), "compiled": sides["MEND-JAX"].call("compiled") - before}
    scores = {}
    for repeat in range(arguments.repeats):
        for name in sorted(sides, reverse=repeat % 2 == 1):
            bar.at(f"{task.name}, {name}")
            found[name]["prefixes"].append(sides[name].call("read", task.name))
            seconds, scores[name] = sides[name].call("score", task.name, arguments.items)
            found[name]["runs"].append(seconds)
            bar.update()
    for name, runs in found.items():
        item_ms = 1e3 * measure.median(runs["runs"]) / len(task.items)
        figures[name] = runs | {"item_ms": item_ms, "prefix_ms": 1e3 * measure.median(runs["prefixes"])}
    figures["ratio"] = figures["PyTorch"]["item_ms"] / figures["MEND-JAX"]["item_ms"]
    figures["shapes"] = sides["MEND-JAX"].call("shapes", task.name)
    figures["same"] = compare_scores(*(scores[name] for name in sides), TOLERANCE[arguments.dtype])
    return figures


def _pytorch_side():
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"benchmark scoring needs {package}: pip install {package}.")
    from mend_jax.measure.pytorch_scoring import PyTorchScoring

    return PyTorchScoring
