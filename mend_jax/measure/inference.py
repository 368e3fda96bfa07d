"""Distil and score against Vanilla ICL, on one task: seconds, FLOPs, memory, with and without a shared prefix cache."""

import dataclasses

import numpy as np

from mend_jax.cli.progress import Progress
from mend_jax.cli.text import columns
from mend_jax.measure import machine as measure
from mend_jax.measure.jax_side import TOLERANCE, InferenceSide, Settings, check_fits, start_report
from mend_jax.run.files import write_report
from mend_jax.scoring import costs

RULES = "release: every option reads the prefix again; cached: all items and options share its keys and values"


def measure_inference(arguments, settings: Settings) -> tuple[dict, str, bool]:
    """(report, its text, whether cached and uncached scores agree) for one task: MEND against Vanilla ICL.

    For each of `arguments.lengths`, the demonstrations' tokens, ascending; `settings` has the first. With `arguments.out` the
    report is written after each method, so that a command that is stopped leaves what it has measured.
    """
    lengths = arguments.lengths
    longest = max(lengths[-1], settings.vectors) + settings.query + arguments.options * settings.target
    check_fits("LLM with the prefix, a query and its options", longest, settings.llm)
    check_fits("distiller", lengths[-1] + settings.vectors, settings.distiller)
    report = start_report(arguments, settings)
    report["rows"], differences = [], []
    with Progress(4 * len(lengths) * (1 + arguments.repeats), "run") as bar:  # the first run of each row compiles
        for method in ("icl", "mend"):
            found = {}
            for reuse in (False, True):
                rows, found[reuse], report["device"] = _measure_method(arguments, settings, method, reuse, bar)
                report["rows"] += rows
            anew, cached = np.array(found[False]), np.array(found[True])
            differences.append(float(np.abs(anew / cached - 1).max()))  # NaN stays NaN
            same = all(difference < TOLERANCE[settings.dtype] for difference in differences)
            report["same"] = {"yes": same, "largest_difference": max(differences)}
            if arguments.out:
                write_report(arguments.out, report)
    return report, inference_text(report), report["same"]["yes"]


def inference_text(report: dict) -> str:
    """The report of `inference` for a terminal."""
    arguments, settings = report["arguments"], report["settings"]
    same = report["same"]
    verdict = "the same" if same["yes"] else "NOT THE SAME"
    lengths = ", ".join(map(str, arguments["lengths"]))
    shape = f"{lengths} demonstration tokens, {settings['vectors']} vectors, queries of {settings['query']} tokens"
    lines = [
        f"Scoring {arguments['items']} items of {arguments['options']} options, LLM {arguments['llm']}, {shape}",
        measure.machine_line(report),
        RULES,
    ]
    for demos in arguments["lengths"]:
        rows = [row for row in report["rows"] if row["demos"] == demos]
        head = [] if len(arguments["lengths"]) == 1 else [f"{demos} demonstration tokens"]
        lines += ["", *head, _table(rows), "", *(_saving(rows, reuse) for reuse in (False, True))]
    lines.append(
        f"scores with and without the cache: {verdict}, largest relative difference {same['largest_difference']:.1e}"
    )
    return "\n".join(lines)


def _table(rows: list[dict]) -> str:
    cells = [["", "once per task", "", "each item", "", "whole task", "", "peak GB", "K/V cache MB", "to store MB"]]
    cells.append(["", "s", "TFLOP", "s", "TFLOP", "s", "TFLOP", "", "", ""])
    for row in rows:
        times = [row["once_seconds"], row["once_flops"], row["item_seconds"], row["item_flops"]]
        times += [row["task_seconds"], row["task_flops"]]
        figures = [f"{v:.3f}" if i % 2 == 0 else f"{v / 1e12:.3g}" for i, v in enumerate(times)]
        sizes = [f"{row['cache_bytes'] / 1e6:.2f}", f"{row['store_bytes'] / 1e6:.3f}"]
        cells.append([row["name"], *figures, f"{row['peak_bytes'] / 1e9:.2f}", *sizes])
    return columns(cells)


def _measure_method(arguments, settings, method: str, reuse: bool, bar: Progress):
    """(a row of figures for each length, scores of all, device) of one method, measured in its own process, the shortest first: a
    peak of memory is then that of its own length. `bar` counts the runs."""
    rows, scores = [], []
    with measure.Worker(InferenceSide, settings, method, reuse, arguments.items, arguments.options) as worker:
        for demos in arguments.lengths:
            worker.call("resize", demos)
            now = dataclasses.replace(settings, demos=demos)
            row, found = _measure_task(arguments, now, method, reuse, worker, bar)
            rows.append(row)
            scores += found
        return rows, scores, worker.call("description")


def _measure_task(arguments, settings, method: str, reuse: bool, worker, bar: Progress):
    """(row of figures, scores) of the worker's task."""
    row = {"demos": settings.demos} | inference_flops(settings, method, reuse, arguments.items, arguments.options)
    bar.at(row["name"])

    def score():
        timed = worker.call("score")
        bar.update()
        return timed

    worker.call("once"), score()  # compiles
    worker.call("reset_peak")
    once = measure.median([worker.call("once") for _ in range(arguments.repeats)])
    timed = [score() for _ in range(arguments.repeats)]
    seconds, peak = measure.median([t for t, _ in timed]), worker.call("peak_bytes")
    itemsize = 4 if settings.dtype == "float32" else 2
    prefix = settings.demos if method == "icl" else settings.vectors
    cache = costs.cache_bytes(settings.llm, prefix, itemsize) if reuse else 0
    vectors = costs.vector_bytes(settings.llm, settings.vectors, itemsize)
    row |= {"once_seconds": once, "item_seconds": seconds / arguments.items, "task_seconds": once + seconds}
    row |= {"peak_bytes": peak, "cache_bytes": cache}
    # Without a cache, only the demonstrations' token ids are to be stored.
    row["store_bytes"] = 4 * settings.demos if not reuse else cache if method == "icl" else vectors
    return row, timed[-1][1]


def inference_flops(settings: Settings, method: str, reuse: bool, items: int, options: int) -> dict:
    """{"name", "method", "reuse", "once_flops", "item_flops", "task_flops"} by formula."""
    llm, mend = settings.llm, method == "mend"
    prefix = settings.vectors if mend else settings.demos
    distil = costs.distil(settings.distiller, llm, settings.demos, settings.vectors) if mend else 0
    lengths = [settings.target] * options
    if reuse:
        once = distil + costs.reading(llm, prefix).forward
        item = costs.score_cached(llm, prefix, settings.query, lengths)
    else:
        once, item = 0, distil + costs.score_rereading(llm, prefix, settings.query, lengths)
    name = f"{'MEND' if mend else 'Vanilla ICL'}, {'cached' if reuse else 'release'}"
    row = {"name": name, "method": method, "reuse": reuse, "once_flops": once, "item_flops": item}
    return row | {"task_flops": once + items * item}


def _saving(rows, reuse: bool) -> str:
    icl, mend = (next(row for row in rows if row["method"] == m and row["reuse"] == reuse) for m in ("icl", "mend"))
    item, task = (1 - mend[name] / icl[name] for name in ("item_flops", "task_flops"))
    text = f"MEND against Vanilla ICL, {'cached' if reuse else 'release'}: "
    less = [f"{abs(share):.0%} {'fewer' if share >= 0 else 'more'} FLOPs per" for share in (item, task)]
    text += f"{less[0]} item, {less[1]} task"
    text += f", {icl['task_seconds'] / mend['task_seconds']:.2f}x as fast"
    if reuse:
        text += f", {icl['cache_bytes'] / mend['cache_bytes']:.1f}x less K/V cache"
    return text
