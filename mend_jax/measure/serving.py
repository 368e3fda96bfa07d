"""The server under load: requests with packs beside the same questions with full demonstrations, in one run of one server.

The server is a process, all clients another. A client sends a question, waits for its answer, and sends the next. The modes take
turns, so that a busy moment of the machine affects all. Only HTTP is spoken here: what is asked comes from the server's example.
"""

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.text import columns
from mend_jax.measure import machine as measure

PACKS, ANEW, KEPT = "vectors", "demonstrations", "demonstrations, kept"  # modes
COMPILED, CPU = "mend_programs_compiled", "process_cpu_seconds_total"  # of the server's metrics
MODES = (PACKS, ANEW, KEPT)
KINDS = {"score": {}, "generate": {"max_tokens": 8}}


def measure_serving(arguments) -> tuple[dict, str, bool]:
    """(report, its text, True) of a server of `arguments.llm` with `arguments.distiller`."""
    report = {"arguments": vars(arguments), "machine": measure.machine(), "rows": []}
    with _server(arguments) as address:
        info = _get(f"{address}/info")
        questions = {kind: _questions(address, info, kind, arguments.packs) for kind in KINDS}
        report["prefix"] = {
            mode: _ask(address, *questions["score"][mode][0])["prefix_positions"] for mode in (PACKS, ANEW)
        }
        report["info"] = {name: info[name] for name in ("llm", "distiller", "window", "vectors")}
        cells = list(itertools.product(KINDS, arguments.clients))
        warm = [2**power for power in range(max(arguments.clients).bit_length())]
        runs = len(MODES) * (len(cells) * arguments.repeats + len(KINDS) * len(warm))
        with measure.Worker(Clients, address) as clients, Progress(runs, "run") as bar:
            for kind, count, mode in itertools.product(
                KINDS, warm, MODES
            ):  # programs are compiled, keys and values kept
                bar.at(f"{kind}, {count} clients, {mode}, warming up")
                clients.call("run", count, questions[kind][mode], arguments.seconds)
                bar.update()
            compiled = _metric(address, COMPILED)
            for kind, count in cells:
                report["rows"].append(_cell(address, clients, questions[kind], kind, count, arguments, bar))
            report["compiled"] = int(_metric(address, COMPILED) - compiled)
    return report, serving_text(report), True


def serving_text(report: dict) -> str:
    """The report for a terminal."""
    rows = [["", "clients", "", "requests/s", "ratio", "p50 ms", "p95 ms", "CPU ms", "ratio", "together"]]
    for row in report["rows"]:
        for mode, found in row["modes"].items():
            ours = row["modes"][PACKS]
            ratios = _ratio(ours["per_second"], found["per_second"]), _ratio(found["cpu_ms"], ours["cpu_ms"])
            ratios = ("", "") if mode == PACKS else ratios
            first = [row["kind"], str(row["clients"])] if mode == PACKS else ["", ""]
            p50, p95, cpu, together = (f"{found[name]:.1f}" for name in ("p50_ms", "p95_ms", "cpu_ms", "together"))
            rows.append([*first, mode, f"{found['per_second']:.0f}", ratios[0], p50, p95, cpu, ratios[1], together])
    machine, info = report["machine"], report["info"]
    return "\n".join(
        [
            f"Requests to a server of {info['llm']}; prefixes of {report['prefix'][PACKS]} vectors or {report['prefix'][ANEW]} tokens of demonstrations",
            f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before']:.1f} before, jax {machine['versions']['jax']}",
            "",
            columns(rows, left=3),
            "",
            "ratios: vectors' requests in the time, or the CPU time, of one so; CPU ms: of the server's process, for a request;",
            "kept: the server keeps the LLM's keys and values of the demonstrations;",
            f"together: requests that were answered in one call; {report['compiled']} programs were compiled during the measurements",
        ]
    )


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}x" if b else "–"  # CPU time is counted in hundredths of a second


class Clients:
    """Many clients in one process."""

    def __init__(self, address: str):
        self.host, _, port = address.removeprefix("http://").rpartition(":")
        self.port = int(port)

    def run(self, count: int, questions: list[tuple[str, bytes]], seconds: float) -> dict:
        """{"seconds": of each request, "together": requests in its batch, "wall": seconds of all}."""
        return asyncio.run(self._run(count, questions, seconds))

    async def _run(self, count, questions, seconds) -> dict:
        found, together, start = [], [], time.perf_counter()
        clients = (self._client(questions[i:] + questions[:i], start + seconds, found, together) for i in range(count))
        await asyncio.gather(*clients)
        return {"seconds": found, "together": together, "wall": time.perf_counter() - start}

    async def _client(self, questions, end: float, found: list, together: list) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        for path, body in itertools.cycle(questions):
            start = time.perf_counter()
            head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            answer = await reader.readexactly(length)
            found.append(time.perf_counter() - start)
            if b" 200 " not in head[:20]:
                raise UserError(f"The server refused a question: {answer.decode()[:200]}")
            together.append(json.loads(answer)["together"])
            if time.perf_counter() > end:
                break
        writer.close()


def _cell(
    address: str, clients: measure.Worker, questions: dict, kind: str, count: int, arguments, bar: Progress
) -> dict:
    """The figures of all modes with so many clients."""
    runs = {mode: [] for mode in questions}
    for repeat in range(arguments.repeats):
        for mode in sorted(runs, reverse=repeat % 2 == 1):
            bar.at(f"{kind}, {count} clients, {mode}")
            before = _metric(address, CPU)
            found = clients.call("run", count, questions[mode], arguments.seconds)
            runs[mode].append(found | {"cpu": _metric(address, CPU) - before})
            bar.update()
    return {"kind": kind, "clients": count, "modes": {mode: _figures(runs[mode]) for mode in questions}}


def _figures(runs: list[dict]) -> dict:
    seconds = np.concatenate([run["seconds"] for run in runs])
    p50, p95 = np.percentile(1e3 * seconds, (50, 95))
    return {
        "per_second": measure.median([len(run["seconds"]) / run["wall"] for run in runs]),
        "each": [len(run["seconds"]) / run["wall"] for run in runs],
        "cpu_ms": 1e3 * sum(run["cpu"] for run in runs) / len(seconds),
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "together": float(np.mean(np.concatenate([run["together"] for run in runs]))),
        "requests": len(seconds),
    }


def _questions(address: str, info: dict, kind: str, packs: int) -> dict[str, list[tuple[str, bytes]]]:
    """{mode: (path, body) of each question}: every set of demonstrations is the example's in another order."""
    example, found = info["example"], {mode: [] for mode in MODES}
    pairs = [{"input": x, "output": y} for x, y in example["demonstrations"]]
    asked = KINDS[kind] | ({"options": example["options"]} if kind == "score" else {})
    sets = [pairs[i % len(pairs) :] + pairs[: i % len(pairs)] for i in range(packs)]
    ids = [_ask(address, "/packs", json.dumps(one).encode())["id"] for one in sets]
    inputs = [example["input"], *dict.fromkeys(pair["input"] for pair in pairs)]
    for text, (pack, demos) in itertools.product(inputs, zip(ids, sets, strict=True)):
        before = {PACKS: {"pack": pack}, ANEW: {"demonstrations": demos}, KEPT: {"demonstrations": demos, "keep": True}}
        for mode, fields in before.items():
            found[mode].append((f"/{kind}", json.dumps({"input": text} | asked | fields).encode()))
    return found


@contextlib.contextmanager
def _server(arguments) -> Iterator[str]:
    """The address of a server that runs within the block."""
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("llm", "distiller", "dtype", "weights")]
    command = [
        sys.executable,
        "-m",
        "mend_jax.serve",
        *flags,
        "--port=0",
        f"--batch_size={arguments.batch_size}",
        "--warm_up=all",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if not line:
                said = process.stderr.read().strip().rpartition("\n")[2].removeprefix("error: ")
                raise UserError(said or "The server did not start.")
            yield line.partition(";")[0].rpartition(" ")[2]
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)
            process.kill()


def _metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics") as response:
        return float(response.read().decode().partition(f"\n{name} ")[2].split()[0])


def _get(address: str) -> dict:
    with urllib.request.urlopen(address) as response:
        return json.load(response)


def _ask(address: str, path: str, body: bytes) -> dict:
    return _get(urllib.request.Request(address + path, body, {"Content-Type": "application/json"}))
