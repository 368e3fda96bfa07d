"""How things are measured: each side in its own process, called in turn; peak memory; a description of the machine.

A side is a class whose methods return plain values. `Worker(Side, settings)` makes an instance in a new process, so that
its peak memory is measured alone; waiting sides do not compute, so runs can be interleaved.
"""

import contextlib
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from mend_jax.cli.errors import UserError

# Puts large arrays in huge pages, as launch/environment.sh does: a step allocates and frees gigabytes, page by page. glibc
# reads it when a process starts; every side gets it.
TUNABLES = "glibc.malloc.hugetlb=1"
FULL = ("RESOURCE_EXHAUSTED", "out of memory")  # what JAX and PyTorch say where a device's memory does not suffice
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


class OutOfMemory(UserError):
    """A side needs more memory than its device has."""


class Worker:
    """A side in its own process: `worker.call("name", *args)` runs its method there and returns the result."""

    def __init__(self, side: Callable, *args):
        os.environ.setdefault("GLIBC_TUNABLES", TUNABLES)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side, args), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, name: str, *args):
        try:
            self._pipe.send((name, args))
            kind, value = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            self._process.join(10)
            raise UserError(
                f"A benchmark process ended with exit code {self._process.exitcode} during {name}: -9 means that it"
                " ran out of memory, so choose a smaller --batch_size or --llm."
            ) from None
        if kind == "mistake":
            raise UserError(value)
        if kind == "memory":
            raise OutOfMemory(f"The device's memory is full ({value}): choose a smaller --batch_size or --llm.")
        if kind == "error":
            raise RuntimeError(f"in the benchmark's process:\n{value}")
        return value

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _serve(pipe, side, args) -> None:
    instance = None
    while True:
        try:
            name, call_args = pipe.recv()
        except EOFError:
            return
        try:
            instance = side(*args) if instance is None else instance  # made here, so that its errors are reported
            pipe.send(("value", getattr(instance, name)(*call_args)))
        except UserError as mistake:
            pipe.send(("mistake", str(mistake)))
        except Exception as error:
            pipe.send(_described(error))


def _described(error: Exception) -> tuple[str, str]:
    """("memory", its sentence) for a device's full memory, ("error", the trace) for all else."""
    text = " ".join(str(error).split())
    if any(words in text for words in FULL):
        return "memory", text.split(". ")[0].rstrip(".")[:200]
    return "error", "".join(traceback.format_exception(error))


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reset_peak() -> None:
    """Resets this process's peak of resident memory, if the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak of this process's resident memory in bytes, since `reset_peak` if the system can reset it."""
    peak = _proc_kilobytes("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak * 1024
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def machine() -> dict:
    """The context of a figure: processor, memory, versions, date, command, and how busy the machine was."""
    memory = _proc_kilobytes("/proc/meminfo", "MemTotal")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_bytes": None if memory is None else memory * 1024,
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": versions,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", TUNABLES),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *_started(), *sys.argv[1:]]),
    }


def machine_line(report: dict) -> str:
    """The machine of a report as a line for a terminal: processor or device, cores, load, versions."""
    machine, device = report["machine"], report.get("device") or report["sides"]["MEND-JAX"]
    peak = f", matmul peak {machine['matmul_flops'] / 1e9:,.0f} GFLOP/s" if "matmul_flops" in machine else ""
    name = machine["cpu"] if device["platform"] == "cpu" else device["device"]
    versions = ", ".join(f"{p} {machine['versions'][p]}" for p in ("jax", "torch") if machine["versions"][p])
    memory = f", {machine['glibc_tunables']}" if device["platform"] == "cpu" else ""
    return f"{name}, {machine['cores']} core{'s' * (machine['cores'] != 1)}{peak}, load {machine['load_before']:.1f} before, {versions}{memory}"


def median(values) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _started() -> list[str]:
    """What Python was started with: a module or a file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name] if spec else sys.argv[:1]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _proc_kilobytes(file: str, field: str) -> int | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
