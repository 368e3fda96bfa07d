"""The page of tables that is made from the results of measure/accelerator.py; results of other commands are read as they wrote them."""

from mend_jax.cli.text import markdown, minutes, size
from mend_jax.measure.parts import DONE, SKIPPED, last_line
from mend_jax.scoring import costs


def page(results: dict) -> str:
    """Markdown: what ran, then a table for each kind of part that left figures."""
    parts = results["parts"]
    lines = [f"# Measured on {_device(parts)}", "", _machine_line(results), "", *_overview(parts)]
    if results["dry_run"]:
        lines[1:1] = ["", "**A dry run: its figures, of tiny sizes on a CPU, mean nothing.**"]
    for title, names, table in (
        ("Tests on this device", ("golden", "bfloat16"), _tests),
        ("The train step beside PyTorch's", ("step_pytorch",), _pytorch),
        ("The train step with as many sequences as pay", [name for name in parts if _is_step(name)], _steps),
        ("Distil and score against in-context learning", ("inference",), _inference),
        ("MEND in minutes", ("mend",), _mend),
    ):
        found = {name: parts[name]["result"] for name in names if name in parts and parts[name]["result"]}
        if found:
            lines += ["", f"## {title}", "", *table(found)]
    return "\n".join(lines) + "\n"


def _is_step(name: str) -> bool:
    return name.startswith("step_") and name != "step_pytorch"


def _device(parts: dict) -> str:
    found = parts.get("devices", {}).get("result")
    return f"{found['count']} x {found['device']}" if found else "an unknown device"


def _machine_line(results: dict) -> str:
    machine, devices = results["machine"], results["parts"].get("devices", {}).get("result") or {}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    driver = f"; {devices['nvidia_smi']}" if devices.get("nvidia_smi") else ""
    return (
        f"{results['date']}, {machine['cores']} cores of {machine['cpu']}, {versions}{driver}. `{machine['command']}`"
    )


def _overview(parts: dict) -> list[str]:
    rows = [[name, part["state"], f"{part['seconds']:.0f}", part["what"]] for name, part in parts.items()]
    lines = [markdown(["part", "state", "seconds", "what"], rows)]
    for name, part in parts.items():
        if part["state"] == SKIPPED:
            lines += ["", f"**{name}** was left out: {last_line(part)}."]
        elif part["state"] != DONE:
            rest = " (its figures are below)" if part["result"] else ""
            lines += ["", f"**{name}** {part['state']} after {minutes(part['seconds'])}{rest}: {last_line(part)}"]
    return lines


def _tests(found: dict) -> list[str]:
    rows = [
        [f"tests/test_{name}.py", *(str(r[kind]) for kind in ("passed", "failed", "skipped"))]
        for name, r in found.items()
    ]
    lines = [markdown(["file", "passed", "failed", "skipped"], rows)]
    for result in found.values():
        lines += [f"- {test}: {error}" for test, error in result["failing"].items()]
    return lines


def _pytorch(found: dict) -> list[str]:
    [report] = found.values()
    sides, mfu = report["sides"], (report["mfu"] or {}).get("share", {})
    figures = {
        "seconds per step": lambda s: f"{s['seconds']:.4f}",
        "tokens/s": lambda s: f"{s['tokens_per_second']:,.0f}",
        "TFLOP per step": lambda s: f"{s['model_flops'] / 1e12:.3g}",
        "peak memory": lambda s: size(s["peak_bytes"]),
    }
    rows = [[name, *(cell(side) for side in sides.values())] for name, cell in figures.items()]
    rows.append(["model-FLOPs utilisation", *(_share(mfu.get(name)) for name in sides)])
    same = report["same"]
    lines = [_shape(report), "", markdown(["", *sides], rows)]
    if "ratio" in report:
        agree = "agree" if same["yes"] else "do NOT agree"
        lines += ["", f"{report['ratio']:.2f}x as fast as PyTorch; losses and gradient norms {agree} (largest relative"
                  f" difference {same['largest_difference']:.1e}, allowed {same['tolerance']:.0e})."]  # fmt: skip
    return lines


def _steps(found: dict) -> list[str]:
    header = [
        "part",
        "attention",
        "sequences",
        "s per step",
        "tokens/s",
        "TFLOP per step",
        "peak memory",
        "utilisation",
        "tried",
    ]
    rows = []
    for name, report in found.items():
        [side] = report["sides"].values()
        share = (report["mfu"] or {}).get("share", {}).get("MEND-JAX")
        cells = [
            name.removeprefix("step_"),
            side["attention"],
            str(report["settings"]["rows"]),
            f"{side['seconds']:.4f}",
        ]
        cells += [f"{side['tokens_per_second']:,.0f}", f"{side['model_flops'] / 1e12:.3g}", size(side["peak_bytes"])]
        rows.append([*cells, _share(share), ", ".join(_tried(one) for one in report["tried"])])
    return [_shape(next(iter(found.values()))), "", markdown(header, rows)]


def _tried(one: dict) -> str:
    return f"{one['rows']}: {one['tokens_per_second']:,.0f}" if "seconds" in one else f"{one['rows']}: memory full"


def _shape(report: dict) -> str:
    settings = report["settings"]
    sizes = "{demos} + {query} tokens, {vectors} vectors, {dtype}".format(**settings)
    peak = costs.peak_flops(report["sides"]["MEND-JAX"]["device"])
    known = f"; utilisation is of {peak / 1e12:.0f} TFLOP/s" if peak else ""
    return f"Sequences of {sizes}; distiller {report['arguments']['distiller']}{known}."


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _inference(found: dict) -> list[str]:
    [report] = found.values()
    header = [
        "demonstration tokens",
        "method",
        "once, s",
        "item, s",
        "task, s",
        "task, TFLOP",
        "peak memory",
        "K/V cache",
    ]
    rows = []
    for row in sorted(report["rows"], key=lambda row: row["demos"]):
        times = [f"{row[name]:.4f}" for name in ("once_seconds", "item_seconds", "task_seconds")]
        sizes = [f"{row['task_flops'] / 1e12:.3g}", size(row["peak_bytes"]), size(row["cache_bytes"])]
        rows.append([str(row["demos"]), row["name"], *times, *sizes])
    a = report["arguments"]
    return [f"{a['llm']}, {a['items']} items of {a['options']} options.", "", markdown(header, rows)]


def _mend(found: dict) -> list[str]:
    [report] = found.values()
    header = [
        "stage",
        "steps",
        "done",
        "sequences",
        "s per step",
        "tokens/s",
        "attention",
        "loss, first and last",
        "validation",
    ]
    rows = []
    for stage, r in report["stages"].items():
        chosen = ", ".join(f"{name} {value:.4f}" for name, value in r["validation"].items() if name != "step")
        speed = [f"{r['seconds_per_step']:.4f}", f"{r['tokens_per_second']:,.0f}"]
        losses = f"{r['first_loss']:.3f}, {r['last_loss']:.3f}"
        done = f"{r['done']}{', its time was over' if r['stopped'] else ''}"
        rows.append([stage, str(r["steps"]), done, str(r["rows"]), *speed, r["attention"], losses, chosen])
    lines = [markdown(header, rows)]
    failures = {r["cudnn_failure"] for r in report["stages"].values() if r["cudnn_failure"]}
    lines += [f"\ncuDNN's attention failed: {failure}" for failure in failures]
    if "evaluation" in report:
        methods = report["evaluation"]["methods"]
        rows = [
            [name, _mean(m["score"]), _mean(m["accuracy"]), f"{m['cost']['prefix_length']:.0f}"]
            for name, m in methods.items()
        ]
        about = f"{report['evaluation']['partition']}, seeds {', '.join(map(str, report['evaluation']['seeds']))}"
        lines += ["", f"Evaluation, {about}:", "", markdown(["method", "score", "accuracy", "prefix length"], rows)]
    if "home" in report:
        home = report["home"]
        lines += [
            "",
            f"The distiller, {size(home['bytes'])}, is in {', '.join(home['files'])}: `cat mend.tar.part* | tar x`.",
        ]
    return lines


def _mean(score: dict) -> str:
    spread = "" if score["std"] is None else f" ± {100 * score['std']:.2f}"
    return f"{100 * score['mean']:.2f}{spread}"
