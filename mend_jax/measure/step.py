"""The MEND train step against the same computation in PyTorch: seconds, memory, share of the machine's peak."""

import dataclasses
import importlib.util

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.text import columns
from mend_jax.measure import machine as measure
from mend_jax.measure.jax_side import TOLERANCE, Settings, StepSide, check_fits, start_report
from mend_jax.models.families import DecoderConfig
from mend_jax.run.files import write_report
from mend_jax.scoring import costs

GROWTH = 1.05  # `measure_largest`: twice the rows must give so many times the tokens/s for more to be tried


def measure_step(arguments, settings: Settings) -> tuple[dict, str, bool]:
    """(report, its text, whether both sides computed the same) for the train step."""
    if settings.weights != "full" and not arguments.no_pytorch:
        raise UserError(f"PyTorch's side has no {settings.weights} weights to compare with: give --no_pytorch too.")
    decoders = isinstance(settings.llm, DecoderConfig) and isinstance(settings.distiller, DecoderConfig)
    if not decoders and not arguments.no_pytorch:
        raise UserError("PyTorch's side only has decoder-only models: give --no_pytorch too.")
    check_step_fits(settings)
    report = start_report(arguments, settings)
    pytorch_side = None if arguments.no_pytorch else _pytorch_side()
    sides = {"MEND-JAX": measure.Worker(StepSide, settings)}
    try:
        if pytorch_side is not None:
            sides["PyTorch"] = measure.Worker(pytorch_side, settings, arguments.query_head)
        runs, memory = _interleave(sides, arguments.repeats)
        speeds = {name: worker.call("matmul_flops") for name, worker in sides.items()}
        described = {name: worker.call("description") for name, worker in sides.items()}
    finally:
        for worker in sides.values():
            worker.close()
    _add_figures(report, arguments, settings, described, speeds, runs, memory)
    return report, step_text(report), report["same"]["yes"]


def measure_largest(arguments, settings: Settings) -> tuple[dict, str, bool]:
    """(report, its text, True) for our side with as many rows as pay: from `settings.rows` on they are doubled, up to
    `arguments.up_to`, until the memory is full or the tokens/s grow by less than GROWTH (halved, if the first do not fit).

    The report is that of the rows with the most tokens/s; "tried" has all that were tried. With `arguments.out` it is written after
    each, so that a command that is stopped leaves what it has measured. Raises OutOfMemory if not even one row fits.
    """
    check_step_fits(settings)
    tried, best, speeds = [], None, None
    with measure.Worker(StepSide, settings) as worker:
        sides = {"MEND-JAX": worker}
        while rows := next_rows(tried, settings.rows, arguments.up_to):
            if tried:
                worker.call("resize", rows)
            settings = dataclasses.replace(settings, rows=rows)
            report = start_report(arguments, settings)
            try:
                runs, memory = _interleave(sides, arguments.repeats)
            except measure.OutOfMemory as full:
                tried.append({"rows": rows, "out_of_memory": str(full)})
                continue
            speeds = speeds or {"MEND-JAX": worker.call("matmul_flops")}
            described = {"MEND-JAX": worker.call("description")}
            _add_figures(report, arguments, settings, described, speeds, runs, memory)
            tried.append(_in_short(report))
            best = max((best or report, report), key=_speed)
            if arguments.out:
                write_report(arguments.out, best | {"tried": tried})
    if best is None:
        raise measure.OutOfMemory(tried[-1]["out_of_memory"])
    return best | {"tried": tried}, f"{step_text(best)}\n\n{tried_text(tried)}", True


def next_rows(tried: list[dict], first: int, most: int) -> int:
    """The number of rows that `measure_largest` tries after those of `tried`; 0: no more."""
    if not tried:
        return first
    fitting, last = [one for one in tried if "seconds" in one], tried[-1]
    if not fitting:
        return last["rows"] // 2
    if len(fitting) < len(tried):
        return 0
    slow = len(fitting) > 1 and last["tokens_per_second"] < GROWTH * fitting[-2]["tokens_per_second"]
    return 0 if slow or 2 * last["rows"] > most else 2 * last["rows"]


def check_step_fits(settings: Settings) -> None:
    """Raises UserError if the step's sequences are longer than its models' windows."""
    check_fits("teacher", settings.demos + settings.query, settings.llm)
    check_fits("student", settings.vectors + settings.query, settings.llm)
    check_fits("distiller", settings.demos + settings.vectors, settings.distiller)


def _add_figures(report: dict, arguments, settings: Settings, described: dict, speeds: dict, runs: dict, memory: dict):
    """Adds the figures of all sides to a report: of what `description` and `matmul_flops` say, of their runs and memory."""
    sizes = (settings.llm, settings.distiller, settings.rows, settings.demos, settings.query, settings.vectors)
    report["sides"] = {name: side | {"matmul_flops": speeds[name]} for name, side in described.items()}
    targets = 0 if isinstance(settings.llm, DecoderConfig) else settings.target
    report["model_flops"] = costs.step(*sizes, targets, settings.queries)
    report["machine"]["matmul_flops"] = max(speeds.values())
    tokens = settings.rows * (settings.demos + settings.queries * settings.query)
    for name, side in report["sides"].items():
        flops = report["model_flops"]["total"]
        if name == "PyTorch":
            flops = costs.release_step(*sizes, settings.queries, arguments.query_head)
        side |= _step_figures(runs[name], tokens, flops, max(speeds.values())) | memory[name]
    report["same"] = compare_losses(runs, TOLERANCE[settings.dtype])
    if len(runs) == 2:
        report["ratio"] = report["sides"]["PyTorch"]["seconds"] / report["sides"]["MEND-JAX"]["seconds"]
    report["mfu"] = model_flops_utilisation(report, settings.dtype)


def _speed(report: dict) -> float:
    return report["sides"]["MEND-JAX"]["tokens_per_second"]


def _in_short(report: dict) -> dict:
    """What is kept of each number of rows that was tried."""
    side, mfu = report["sides"]["MEND-JAX"], report["mfu"]
    found = {name: side[name] for name in ("seconds", "tokens_per_second", "peak_bytes")}
    return {"rows": report["settings"]["rows"], **found, "mfu": mfu and mfu["share"]["MEND-JAX"]}


def tried_text(tried: list[dict]) -> str:
    """What `measure_largest` tried, for a terminal."""
    rows = [["rows", "seconds per step", "tokens/s", "peak memory, GB", "utilisation"]]
    for one in tried:
        if "seconds" not in one:
            rows.append([str(one["rows"]), "memory full", "", "", ""])
            continue
        cells = [f"{one['seconds']:.3f}", f"{one['tokens_per_second']:,.0f}", f"{one['peak_bytes'] / 1e9:.2f}"]
        rows.append([str(one["rows"]), *cells, "" if one["mfu"] is None else f"{one['mfu']:.1%}"])
    return columns(rows, left=0)


def compare_losses(runs: dict, tolerance: float) -> dict:
    """Whether two sides had the same losses in every step, including the first, before any update."""
    if len(runs) < 2:
        return {"yes": True, "largest_difference": None, "tolerance": tolerance}
    ours, theirs = runs.values()
    names = ("loss", "kd", "pred", "grad_norm")
    differences = [abs(a[n] - b[n]) / abs(b[n]) for a, b in zip(ours, theirs, strict=True) for n in names]
    same = all(difference < tolerance for difference in differences)  # false for NaN, which max() may pass over
    return {"yes": same, "largest_difference": max(differences), "tolerance": tolerance}


def model_flops_utilisation(report: dict, dtype: str) -> dict | None:
    """The share of a known GPU's dense bfloat16 peak that each side reaches; None on other devices."""
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
    if on_cpu:  # over all threads: a busy machine does not change it
        rows.append(["CPU seconds per step", *(f"{s['cpu_seconds']:.3f}" for s in sides.values())])
    rows.append(["tokens/s", *(f"{s['tokens_per_second']:,.0f}" for s in sides.values())])
    rows.append(["TFLOP per step (matrix products)", *(f"{s['model_flops'] / 1e12:.3g}" for s in sides.values())])
    rows.append(["share of the matmul peak", *(f"{s['share_of_matmul_peak']:.1%}" for s in sides.values())])
    rows.append(["peak memory, GB", *(f"{s['peak_bytes'] / 1e9:.2f}" for s in sides.values())])
    rows.append(["  of it before the first step", *(f"{s['start_bytes'] / 1e9:.2f}" for s in sides.values())])
    parts = ", ".join(f"{name} {flops / 1e12:.3g}" for name, flops in report["model_flops"].items())
    queries = "{queries} x {query}" if settings["queries"] > 1 else "{query}"
    shape = "{rows} x ({demos} + " + queries + ") tokens, {vectors} vectors, {dtype}, {weights} weights"
    lines = [
        f"MEND train step, LLM {report['arguments']['llm']}, distiller {_distiller(report)}, {shape.format(**settings)}",
        measure.machine_line(report),
        "",
        columns(rows),
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


def _distiller(report: dict) -> str:
    named, layers = report["arguments"]["distiller"], report["arguments"].get("layers")
    return f"{named} (its first {layers} layers)" if layers else named


def _interleave(sides: dict, repeats: int):
    """({side: its runs, a warm-up first}, {side: memory}); the sides alternate, also in which goes first."""
    runs, memory = {name: [] for name in sides}, {}
    with Progress(len(sides) * (1 + repeats), "step") as bar:

        def run(name):
            bar.at(name)
            runs[name].append(sides[name].call("run"))
            bar.update()

        for name, worker in sides.items():
            bar.at(f"{name}, compiling" if name == "MEND-JAX" else name)
            memory[name] = {"start_bytes": worker.call("reset_peak")}
            run(name)
        for repeat in range(repeats):
            for name in sorted(sides, reverse=repeat % 2 == 1):
                run(name)
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
    from mend_jax.measure.pytorch_side import PyTorchStep

    return PyTorchStep
