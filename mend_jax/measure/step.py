"""The MEND train step against the same computation in PyTorch: seconds, memory, share of the machine's peak."""

import importlib.util

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.text import columns
from mend_jax.measure import machine as measure
from mend_jax.measure.jax_side import TOLERANCE, Settings, StepSide, check_window, start_report
from mend_jax.models.families import DecoderConfig
from mend_jax.scoring import costs


def measure_step(arguments, settings: Settings) -> tuple[dict, str, bool]:
    """(report, its text, whether both sides computed the same) for the train step."""
    if settings.weights != "full" and not arguments.no_pytorch:
        raise UserError(f"PyTorch's side has no {settings.weights} weights to compare with: give --no_pytorch too.")
    decoders = isinstance(settings.llm, DecoderConfig) and isinstance(settings.distiller, DecoderConfig)
    if not decoders and not arguments.no_pytorch:
        raise UserError("PyTorch's side only has decoder-only models: give --no_pytorch too.")
    check_window("teacher", settings.demos + settings.query, settings.llm)
    check_window("student", settings.vectors + settings.query, settings.llm)
    check_window("distiller", settings.demos + settings.vectors, settings.distiller)
    report = start_report(arguments, settings)
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
    report["model_flops"] = costs.step(*sizes, 0 if isinstance(settings.llm, DecoderConfig) else settings.target)
    release = None
    if not arguments.no_pytorch:
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
    shape = "{rows} x ({demos} + {query}) tokens, {vectors} vectors, {dtype}, {weights} weights".format(**settings)
    lines = [
        f"MEND train step, LLM {report['arguments']['llm']}, distiller {report['arguments']['distiller']}, {shape}",
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
