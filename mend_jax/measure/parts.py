"""Parts of a long measurement: each is a command in a process of its own, within a time that is given once for all.

Whatever happens to a part, what it wrote until then is kept, its processes are ended, and the next one runs.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree

from mend_jax.cli.config_files import ROOT

GRACE = 5  # seconds between SIGTERM and SIGKILL
TAIL = 30  # lines of a part's output that are kept
DONE, FAILED, TIMED_OUT, SKIPPED = "done", "failed", "timed out", "skipped"


def read_json(path: Path) -> dict | None:
    """What a part wrote, or None if it is not there or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_junit(path: Path) -> dict | None:
    """{"passed", "failed", "skipped": counts, "failing": {test: the first line of its error}} of pytest's --junitxml."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    failing, skipped = {}, 0
    for case in cases:
        skipped += case.find("skipped") is not None
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                words = (found.get("message") or found.text or kind).strip().splitlines()
                failing[f"{case.get('classname')}::{case.get('name')}"] = words[0][:300] if words else kind
    return {
        "passed": len(cases) - len(failing) - skipped,
        "failed": len(failing),
        "skipped": skipped,
        "failing": failing,
    }


@dataclasses.dataclass(frozen=True)
class Part:
    """One command."""

    name: str
    what: str  # in words
    command: tuple[str, ...]  # Python's arguments; {out}: the file that it writes, {seconds}: the time that it has
    seconds: int  # the most that it may take
    least: int  # with fewer seconds left it is not begun
    needs: tuple[Path, ...] = ()  # files without which it is not begun
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    read: Callable[[Path], dict | None] = read_json  # of the file that it writes

    def obstacle(self, left: float) -> str:
        """Why it is not begun with `left` seconds; empty if it is."""
        missing = [str(path) for path in self.needs if not path.exists()]
        if missing:
            return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there"
        return f"it needs {self.least} s, {max(0, int(left))} s were left" if left < self.least else ""


def run_part(part: Part, workdir: Path, limit: float) -> dict:
    """Runs a part for `limit` seconds at most.

    Returns {"what", "command", "state", "exit": None if it was ended, "seconds", "tail": its last lines, "result": what it wrote,
    or None}. Its whole output is in <workdir>/<name>.txt.
    """
    out, log = workdir / f"{part.name}.out", workdir / f"{part.name}.txt"
    out.unlink(missing_ok=True)
    words = {"{out}": str(out), "{seconds}": str(int(limit))}
    command = [sys.executable, *(_filled(word, words) for word in part.command)]
    began, state = time.monotonic(), TIMED_OUT
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(part.environment),  # so that the last lines are there
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                state = FAILED if process.wait(limit) else DONE
            exit_code = process.poll()
        finally:
            end(process)
    seconds = round(time.monotonic() - began, 1)
    tail = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-TAIL:]
    return _found(part, state, exit_code, seconds, tail, part.read(out))


def skipped(part: Part, obstacle: str) -> dict:
    """The same for a part that was not begun."""
    return _found(part, SKIPPED, None, 0.0, [obstacle], None)


def _found(part: Part, state: str, exit_code: int | None, seconds: float, tail: list[str], result: dict | None) -> dict:
    ran = {"what": part.what, "command": list(part.command), "state": state, "exit": exit_code, "seconds": seconds}
    return ran | {"tail": tail, "result": result}


def end(process: subprocess.Popen) -> None:
    """Ends a process that began a session, and all that it started: by SIGTERM, then by SIGKILL. One that has ended may have
    left some."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    _signal(process, signal.SIGKILL)
    process.wait()


def last_line(found: dict) -> str:
    """The last line that a part said, as one line."""
    return next((" ".join(line.split()) for line in reversed(found["tail"]) if line.strip()), "no output")


def _filled(word: str, words: dict[str, str]) -> str:
    for name, value in words.items():
        word = word.replace(name, value)
    return word


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
