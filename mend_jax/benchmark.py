"""Measure: the MEND train step against PyTorch, distil + score against Vanilla ICL, weights in 8 bits against float32.

    python -m mend_jax.benchmark step --llm=gpt2 --out=step.json
    python -m mend_jax.benchmark step --llm=gpt2-large --dtype=bfloat16 --batch_size=8 --no_pytorch     # a GPU
    python -m mend_jax.benchmark inference --llm=gpt2-large --demos=469
    python -m mend_jax.benchmark quantization --llm=gpt2,opt-125m,SmolLM2-135M,t5-small-lm-adapt --demos=96

Weights are random, sizes are known: nothing is downloaded. `--llm` and `--distiller` are gpt2, gpt2-medium,
gpt2-large, gpt2-xl, or a folder with a config.json. Each side runs in a process of its own, so that its peak memory is
its own; sides take turns step by step, so that a busy moment of the machine meets both. Figures are medians. Use a
quiet machine.
"""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

from mend_jax import benchmark_quantization, cli, costs, measure
from mend_jax.benchmark_jax import InferenceSide, Settings, StepSide
from mend_jax.errors import UserError
from mend_jax.models.families import DecoderConfig, from_hf_config

SIZES = {  # width, layers, heads
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
DEFAULTS = {
    "step": {"query": 124, "target": 4},
    "inference": {"query": 56, "target": 3},
    "quantization": {"query": 32, "target": 16},
}
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative, between the two sides' losses
RULES = "release: every option reads the prefix anew; cached: its keys and values are shared by all items and options"


def benchmark(
    what: Literal["step", "inference", "quantization"],
    /,
    llm="gpt2",
    distiller="gpt2",
    dtype: Literal["float32", "bfloat16"] = "float32",
    attention: Literal["auto", "xla", "cudnn"] = "auto",
    remat=False,
    weights: Literal["full", "int8"] = "full",
    demos=900,
    vectors=100,
    query=0,
    target=0,
    batch_size=1,
    repeats=5,
    items=16,
    options=3,
    no_pytorch=False,
    query_head=False,
    out="",
) -> int:
    """Prints a workload's figures; returns the exit code, 1 where two computations that must agree did not.

    Args:
        what: the workload.
        llm, distiller: a size of SIZES or a folder with a config.json. quantization: models of
            benchmark_quantization.py or folders, with commas between; a folder's own weights where it has some.
        dtype: of the LLM and of the distiller's arithmetic.
        attention: "auto" is cudnn in bfloat16 on a GPU, xla elsewhere.
        remat: recompute activations in the backward pass.
        weights: of the LLM: "full" are in `dtype`.
        demos, vectors, query: tokens of the demonstrations, vectors, tokens of the query (inference: of its input x).
        target: step: tokens of y, the query's end; inference: tokens of each option.
        batch_size: sequences of a step; inference: items in one pass.
        repeats: timed runs of each side.
        items, options: inference: test items of the task, and answers of each.
        no_pytorch: step: our side alone.
        query_head: step: PyTorch, too, applies the head at the query alone, which the release does not.
        out: a JSON file for the figures.
    """
    arguments = SimpleNamespace(**locals())
    arguments.query = query or DEFAULTS[what]["query"]
    arguments.target = target or DEFAULTS[what]["target"]
    if out and not Path(out).expanduser().absolute().parent.is_dir():
        raise UserError(f"The folder of --out={out} is not there: make it, or give another file.")
    run = {"step": benchmark_step, "inference": benchmark_inference, "quantization": benchmark_weights}[what]
    report, text, same = run(arguments)
    print(text)
    if out:
        write_json(out, report)
    return 0 if same else 1


def benchmark_step(arguments) -> tuple[dict, str, bool]:
    """(report, its text, whether both sides computed the same) of the train step."""
    settings = settings_of(arguments)
    if settings.weights != "full" and not arguments.no_pytorch:
        raise UserError(f"PyTorch's side has no {settings.weights} weights to be compared with: give --no_pytorch too.")
    _check_window("teacher", settings.demos + settings.query, settings.llm)
    _check_window("student", settings.vectors + settings.query, settings.llm)
    _check_window("distiller", settings.demos + settings.vectors, settings.distiller)
    report = _start_report(arguments, settings)
    pytorch_side = None if arguments.no_pytorch else _pytorch_side()
    sides = {"MEND-JAX": measure.Worker(StepSide, settings)}
    try:
        if pytorch_side is not None:
            sides["PyTorch"] = measure.Worker(pytorch_side, settings, arguments.query_head)
        runs, memory = _interleave(sides, arguments.repeats)
        report["sides"] = {
            name: {**worker.call("description"), "matmul_flops": worker.call("matmul_flops")}
            for name, worker in sides.items()
        }
    finally:
        for worker in sides.values():
            worker.close()
    sizes = (settings.llm, settings.distiller, settings.rows, settings.demos, settings.query, settings.vectors)
    report["model_flops"] = costs.step(*sizes)
    release = report["model_flops"]["total"] if arguments.query_head else costs.release_step(*sizes)
    report["machine"]["matmul_flops"] = max(side["matmul_flops"] for side in report["sides"].values())
    tokens = settings.rows * (settings.demos + settings.query)
    for name, side in report["sides"].items():
        flops = release if name == "PyTorch" else report["model_flops"]["total"]
        side |= _step_figures(runs[name], tokens, flops, report["machine"]["matmul_flops"]) | memory[name]
    report["same"] = compare_losses(runs, TOLERANCE[settings.dtype])
    if len(runs) == 2:
        report["ratio"] = report["sides"]["PyTorch"]["seconds"] / report["sides"]["MEND-JAX"]["seconds"]
    report["mfu"] = model_flops_utilisation(report, settings.dtype)
    return report, step_text(report), report["same"]["yes"]


def benchmark_inference(arguments) -> tuple[dict, str, bool]:
    """(report, its text, whether cached and re-read scores agree) of one task: MEND against Vanilla ICL."""
    settings = settings_of(arguments)
    longest = max(settings.demos, settings.vectors) + settings.query + arguments.options * settings.target
    _check_window("LLM with the prefix, a query and its options", longest, settings.llm)
    _check_window("distiller", settings.demos + settings.vectors, settings.distiller)
    report = _start_report(arguments, settings)
    report["rows"], differences = [], []
    for method in ("icl", "mend"):
        found = {}
        for reuse in (False, True):
            row, found[reuse], report["device"] = _measure_task(arguments, settings, method, reuse)
            report["rows"].append(row)
        anew, cached = np.array(found[False]), np.array(found[True])
        differences.append(float(np.abs(anew / cached - 1).max()))  # NaN stays NaN
    same = all(difference < TOLERANCE[settings.dtype] for difference in differences)
    report["same"] = {"yes": same, "largest_difference": max(differences)}
    return report, inference_text(report), report["same"]["yes"]


def benchmark_weights(arguments) -> tuple[dict, str, bool]:
    """(report, its text, True) of models held in float32, bfloat16 and int8."""
    _check_sizes(arguments)
    names = ("batch_size", "demos", "query", "target", "vectors")
    sizes = benchmark_quantization.Sizes(*(getattr(arguments, name) for name in names))
    report = benchmark_quantization.measure_models(arguments.llm, sizes)
    return report, benchmark_quantization.text(report), True


def settings_of(arguments) -> Settings:
    """The workload that the command line asks for."""
    llm, distiller = model_config(arguments.llm), model_config(arguments.distiller).headless
    _check_sizes(arguments)
    shape = (arguments.batch_size, arguments.demos, arguments.query, arguments.target, arguments.vectors)
    return Settings(llm, distiller, arguments.dtype, *shape, arguments.attention, arguments.remat, arguments.weights)


def _check_sizes(arguments) -> None:
    for name in ("batch_size", "demos", "query", "vectors", "target", "repeats"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}={getattr(arguments, name)} is too small: give 1 or more.")
    if arguments.what != "inference" and arguments.target >= arguments.query:
        raise UserError(
            f"--target={arguments.target} is the end of the query: give fewer tokens than --query={arguments.query}."
        )
    if arguments.what == "inference" and min(arguments.items, arguments.options) < 1:
        raise UserError("--items and --options must be 1 or more.")


def model_config(name: str) -> DecoderConfig:
    """A known size, or that of a folder's config.json."""
    if name in SIZES:
        width, layers, heads = SIZES[name]
        return DecoderConfig("gpt2", 50257, width, layers, heads, 4 * width, 1024)
    if not Path(name).exists():
        raise UserError(f"{name} is neither a known size ({', '.join(SIZES)}) nor a folder with a config.json.")
    config = from_hf_config(name)
    if not isinstance(config, DecoderConfig):
        raise UserError(f"The benchmarks measure decoder-only models, {name} is {config.family}: name another folder.")
    return config


def compare_losses(runs: dict, tolerance: float) -> dict:
    """Whether two sides had the same losses in every step, the first before any update."""
    if len(runs) < 2:
        return {"yes": True, "largest_difference": None, "tolerance": tolerance}
    ours, theirs = runs.values()
    names = ("loss", "kd", "pred", "grad_norm")
    differences = [abs(a[n] - b[n]) / abs(b[n]) for a, b in zip(ours, theirs, strict=True) for n in names]
    same = all(difference < tolerance for difference in differences)  # false for NaN, which max() may pass over
    return {"yes": same, "largest_difference": max(differences), "tolerance": tolerance}


def model_flops_utilisation(report: dict, dtype: str) -> dict | None:
    """Share of a known GPU's dense bfloat16 peak; None elsewhere."""
    side = report["sides"]["MEND-JAX"]
    peak = costs.peak_flops(side["device"])
    if peak is None or dtype != "bfloat16":
        return None
    shares = {name: s["model_flops"] / s["seconds"] / peak for name, s in report["sides"].items()}
    return {"peak_flops": peak, "device": side["device"], "share": shares}


def step_text(report: dict) -> str:
    """The report of `step` for a terminal."""
    sides, settings = report["sides"], report["settings"]
    rows = [["", *sides]]
    rows.append(["seconds per step", *(f"{s['seconds']:.3f}" for s in sides.values())])
    rows.append(["  fastest, slowest", *(f"{min(s['runs']):.3f}, {max(s['runs']):.3f}" for s in sides.values())])
    on_cpu = sides["MEND-JAX"]["platform"] == "cpu"
    if on_cpu:  # of all threads: what a busy machine does not change
        rows.append(["CPU seconds per step", *(f"{s['cpu_seconds']:.3f}" for s in sides.values())])
    rows.append(["tokens/s", *(f"{s['tokens_per_second']:,.0f}" for s in sides.values())])
    rows.append(["TFLOP per step (matrix products)", *(f"{s['model_flops'] / 1e12:.3g}" for s in sides.values())])
    rows.append(["share of the matmul peak", *(f"{s['share_of_matmul_peak']:.1%}" for s in sides.values())])
    rows.append(["peak memory, GB", *(f"{s['peak_bytes'] / 1e9:.2f}" for s in sides.values())])
    rows.append(["  of it before the first step", *(f"{s['start_bytes'] / 1e9:.2f}" for s in sides.values())])
    parts = ", ".join(f"{name} {flops / 1e12:.3g}" for name, flops in report["model_flops"].items())
    shape = "{rows} x ({demos} + {query}) tokens, {vectors} vectors, {dtype}, {weights} weights".format(**settings)
    lines = [
        f"MEND train step, LLM {report['arguments']['llm']}, distiller {report['arguments']['distiller']}, {shape}",
        _machine_line(report),
        "",
        table(rows),
        "",
        f"model TFLOP: {parts}; counted in the step's jaxpr: {sides['MEND-JAX']['counted_flops'] / 1e12:.3g}",
    ]
    if report["mfu"]:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in report["mfu"]["share"].items())
        lines.append(f"model-FLOPs utilisation of {report['mfu']['peak_flops'] / 1e12:.0f} TFLOP/s: {shares}")
    if "ratio" in report:
        same = report["same"]
        verdict = "the same" if same["yes"] else "NOT THE SAME"
        lines.append(
            f"losses and gradient norms of both sides in all steps: {verdict}, "
            f"largest relative difference {same['largest_difference']:.1e} (allowed {same['tolerance']:.0e})"
        )
        ours, theirs = sides["MEND-JAX"], sides["PyTorch"]
        in_cpu = f"; in CPU seconds {theirs['cpu_seconds'] / ours['cpu_seconds']:.2f}x" if on_cpu else ""
        lines.append(f"MEND-JAX is {report['ratio']:.2f}x as fast as PyTorch{in_cpu}")
    return "\n".join(lines)


def inference_text(report: dict) -> str:
    """The report of `inference` for a terminal."""
    arguments, settings = report["arguments"], report["settings"]
    rows = [["", "once per task", "", "each item", "", "whole task", "", "peak GB", "K/V cache MB", "to store MB"]]
    rows.append(["", "s", "TFLOP", "s", "TFLOP", "s", "TFLOP", "", "", ""])
    for row in report["rows"]:
        times = [row["once_seconds"], row["once_flops"], row["item_seconds"], row["item_flops"]]
        times += [row["task_seconds"], row["task_flops"]]
        cells = [f"{v:.3f}" if i % 2 == 0 else f"{v / 1e12:.3g}" for i, v in enumerate(times)]
        sizes = [f"{row['cache_bytes'] / 1e6:.2f}", f"{row['store_bytes'] / 1e6:.3f}"]
        rows.append([row["name"], *cells, f"{row['peak_bytes'] / 1e9:.2f}", *sizes])
    same = report["same"]
    verdict = "the same" if same["yes"] else "NOT THE SAME"
    shape = "{demos} demonstration tokens, {vectors} vectors, queries of {query} tokens".format(**settings)
    lines = [
        f"Scoring {arguments['items']} items of {arguments['options']} options, LLM {arguments['llm']}, {shape}",
        _machine_line(report),
        RULES,
        "",
        table(rows),
        "",
        *(_saving(report["rows"], reuse) for reuse in (False, True)),
        f"scores with and without the cache: {verdict}, largest relative difference {same['largest_difference']:.1e}",
    ]
    return "\n".join(lines)


def table(rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_json(path: str, report: dict) -> None:
    """The report as JSON, whole or not at all."""
    target = Path(path).expanduser()
    try:
        partial = target.with_name(target.name + ".part")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): give another --out.") from None


def _measure_task(arguments, settings, method: str, reuse: bool):
    """(row of figures, scores, device) of one method, in a process of its own."""
    with measure.Worker(InferenceSide, settings, method, reuse, arguments.items, arguments.options) as worker:
        worker.call("once"), worker.call("score")  # compiles
        worker.call("reset_peak")
        once = measure.median([worker.call("once") for _ in range(arguments.repeats)])
        timed = [worker.call("score") for _ in range(arguments.repeats)]
        peak, device = worker.call("peak_bytes"), worker.call("description")
    seconds = measure.median([t for t, _ in timed])
    row = inference_flops(settings, method, reuse, arguments.items, arguments.options)
    itemsize = 4 if settings.dtype == "float32" else 2
    prefix = settings.demos if method == "icl" else settings.vectors
    cache = costs.cache_bytes(settings.llm, prefix, itemsize) if reuse else 0
    vectors = costs.vector_bytes(settings.llm, settings.vectors, itemsize)
    row |= {"once_seconds": once, "item_seconds": seconds / arguments.items, "task_seconds": once + seconds}
    row |= {"peak_bytes": peak, "cache_bytes": cache}
    # Without a kept cache the demonstrations' token ids are all there is to keep.
    row["store_bytes"] = 4 * settings.demos if not reuse else cache if method == "icl" else vectors
    return row, timed[-1][1], device


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
    text += f"{item:.0%} fewer FLOPs per item, {task:.0%} per task"
    text += f", {icl['task_seconds'] / mend['task_seconds']:.2f}x as fast"
    if reuse:
        text += f", {icl['cache_bytes'] / mend['cache_bytes']:.1f}x less K/V cache"
    return text


def _interleave(sides: dict, repeats: int):
    """({side: its runs, a warm-up first}, {side: memory}): the sides take turns, and take turns in going first."""
    runs, memory = {name: [] for name in sides}, {}
    for name, worker in sides.items():
        memory[name] = {"start_bytes": worker.call("reset_peak")}
        runs[name].append(worker.call("run"))
    for repeat in range(repeats):
        for name in sorted(sides, reverse=repeat % 2 == 1):
            runs[name].append(sides[name].call("run"))
    for name, worker in sides.items():
        memory[name]["peak_bytes"] = worker.call("peak_bytes")
    return runs, memory


def _step_figures(runs, tokens: int, flops: int, matmul_flops: float) -> dict:
    times = [run["seconds"] for run in runs[1:]]
    seconds = measure.median(times)
    return {
        "seconds": seconds,
        "cpu_seconds": measure.median([run["cpu_seconds"] for run in runs[1:]]),
        "runs": times,
        "losses": [run["loss"] for run in runs],
        "tokens_per_second": tokens / seconds,
        "model_flops": flops,
        "share_of_matmul_peak": flops / seconds / matmul_flops,
    }


def _pytorch_side():
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"The comparison needs {package}: pip install {package}, or give --no_pytorch.")
    from mend_jax.benchmark_pytorch import PyTorchStep

    return PyTorchStep


def _start_report(arguments, settings: Settings) -> dict:
    return {
        "arguments": vars(arguments),
        "settings": dataclasses.asdict(settings),
        "machine": measure.machine(),
    }


def _machine_line(report: dict) -> str:
    machine, device = report["machine"], report.get("device") or report["sides"]["MEND-JAX"]
    peak = f", matmul peak {machine['matmul_flops'] / 1e9:,.0f} GFLOP/s" if "matmul_flops" in machine else ""
    name = machine["cpu"] if device["platform"] == "cpu" else device["device"]
    versions = ", ".join(f"{p} {machine['versions'][p]}" for p in ("jax", "torch") if machine["versions"][p])
    memory = f", {machine['glibc_tunables']}" if device["platform"] == "cpu" else ""
    return f"{name}, {machine['cores']} cores{peak}, load {machine['load_before']:.1f} before, {versions}{memory}"


def _check_window(reader: str, tokens: int, config: DecoderConfig) -> None:
    if tokens > config.window:
        raise UserError(
            f"The {reader} would read {tokens} tokens, its window is {config.window}: choose smaller sizes."
        )


if __name__ == "__main__":
    cli.run(benchmark)
