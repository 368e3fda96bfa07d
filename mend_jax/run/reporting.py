"""The reports of a training run: metrics.jsonl, speed.jsonl, TensorBoard, the progress bar and the table of parameters.

metrics.jsonl holds only functions of the configuration, so that a run that was killed and resumed ends with exactly the file
of an uninterrupted run; each checkpoint holds a checksum of it. Times are in speed.jsonl.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from pathlib import Path

import jax

from mend_jax.cli.imports import without_pytorch

with without_pytorch():  # tensorboardX imports it wherever it is installed: two seconds of every start
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar
from tqdm import tqdm

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.text import clock, columns, shown
from mend_jax.models.int8 import SCALE
from mend_jax.run.files import write_text
from mend_jax.run.reading import Unreadable, parse_json, read_text
from mend_jax.run.sealed import checksum_of_text

METRICS = "metrics.jsonl"
SPEED = "speed.jsonl"
PARAMS = "params.txt"
BOARD = "tensorboard"
REMEDY = "put the file back from a copy, or remove it: then patience counts from here on"  # where one is damaged
QUIET_SECONDS = 15  # between progress lines if the output is not a terminal


class Reporter:
    """Writes a run's files; only process 0 writes."""

    def __init__(self, workdir, start, steps, lines=(), parts=()):
        """`lines`: what metrics.jsonl holds up to the step `start`; whatever else it holds is dropped. `parts`: the names of the
        losses whose weighted sum the loss is."""
        self.writes = jax.process_index() == 0
        self.workdir, self.start, self.steps, self.parts = Path(workdir), start, steps, parts
        self.clock = self.last_line = time.monotonic()
        self.since = start
        self.waited = self.paused = 0.0  # seconds spent waiting for data; seconds of compiling, evaluations and saves
        self.tokens = 0
        self.lines = list(lines)
        if not self.writes:
            return
        write_text(self.workdir / METRICS, _as_text(self.lines))
        cut(self.workdir / SPEED, start, strict=False)
        self.files = contextlib.ExitStack()  # closes all files, even if one cannot be written completely
        self.metrics_file = self.files.enter_context(open(self.workdir / METRICS, "a"))  # noqa: SIM115
        self.speed_file = self.files.enter_context(open(self.workdir / SPEED, "a"))  # noqa: SIM115
        # Not SummaryWriter, which writes from a thread: its errors (a full disk) would only be printed.
        self.board = self.files.enter_context(contextlib.closing(EventsWriter(_events(self.workdir / BOARD, start))))
        self.board.write_event(
            Event(step=start + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        )
        self.bar = None
        if sys.stderr.isatty():
            self.bar = self.files.enter_context(tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True))

    @contextlib.contextmanager
    def compiling(self):
        """Around the first step: says that the step is being compiled, which may take minutes, then how long it took; not counted as
        training time."""
        say("Compiling the train step ...")
        began = time.monotonic()
        with Progress(1, "program", what="compiling", leave=False):
            yield
        seconds = time.monotonic() - began
        self.paused += seconds
        say(f"Compiled in {seconds:.1f} s.")

    def write(self, line):
        """Writes one line {"step": int, name: float, ...} to metrics.jsonl, and the same to TensorBoard."""
        self.lines.append(line)
        if not self.writes:
            return
        self.metrics_file.write(json.dumps(line) + "\n")
        self.metrics_file.flush()
        for name, value in line.items():
            if name != "step":
                self._plot(name, value, line["step"])

    def progress(self, line):
        """Writes the speed since the last call to speed.jsonl and shows it to the user with `line`'s loss and padding."""
        now = time.monotonic()
        seconds, done = now - self.clock - self.paused, line["step"] - self.since
        compiled = self.since == self.start
        speed = {
            "step": line["step"],
            "seconds_per_step": seconds / max(done, 1),
            "tokens_per_second": self.tokens / max(seconds, 1e-9),
            "data_wait_per_step": self.waited / max(done, 1),
        }
        self.clock, self.since, self.tokens, self.waited, self.paused = now, line["step"], 0, 0.0, 0.0
        if not self.writes:
            return
        self.speed_file.write(json.dumps({k: float(f"{v:.6g}") if k != "step" else v for k, v in speed.items()}) + "\n")
        self.speed_file.flush()
        for name in ("tokens_per_second", "data_wait_per_step"):
            self._plot(f"speed/{name}", speed[name], line["step"])
        self._show(line, speed, compiled)

    def _plot(self, name, value, step):
        self.board.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))

    def _show(self, line, speed, compiled):
        shown = {
            "loss": f"{line['loss']:.4f}",
            **{name: f"{line[name]:.3g}" for name in self.parts},
            "tokens/s": f"{speed['tokens_per_second']:,.0f}",
            "padding": f"{line['padding']:.0%}",
        }
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(line["step"] - self.bar.n)
        elif time.monotonic() - self.last_line > QUIET_SECONDS or line["step"] == self.steps:
            self.last_line = time.monotonic()
            texts = [f"step {line['step']}/{self.steps}", *(f"{name} {text}" for name, text in shown.items())]
            if line["step"] < self.steps and not compiled:  # compilation happens once and would distort the estimate
                texts.append(f"{clock((self.steps - line['step']) * speed['seconds_per_step'])} left")
            say("  ".join(texts))

    def checksum(self):
        """Of the lines so far, for a checkpoint."""
        return checksum_of_lines(self.lines)

    def sync(self):
        """Forces everything written so far to disk; called before each checkpoint."""
        if self.writes:
            self.metrics_file.flush()
            os.fsync(self.metrics_file.fileno())
            self.board.flush()

    def close(self):
        """Closes the files, with everything written on disk."""
        if self.writes:
            with self.files:
                self.sync()


def say(text):
    """Prints a line for the user, on process 0, without breaking the progress bar. Names from data are `shown`."""
    if jax.process_index() == 0:
        tqdm.write(shown(text), file=sys.stderr)


def _events(board, start):
    """The beginning of the name of TensorBoard's file for a run from step `start` on.

    TensorBoard reads files by their names, which by themselves are those of the clock: the step stands before it, and what
    was written from the same step on is removed, since all of it is made again. So a clock that was set back harms nothing.
    """
    board.mkdir(exist_ok=True)
    name = f"events.step-{start:09d}"
    for before in board.glob(f"{name}.*"):
        before.unlink()
    return str(board / name)


class Window:
    """The mean of the metrics since the last line, in float64, in the order of the steps."""

    def __init__(self, rows=()):
        self.rows = [dict(row) for row in rows]

    def add(self, row):
        self.rows.append(row)

    def kept(self):
        """The rows so far, for a checkpoint: a copy, because it is written while the next steps add theirs."""
        return list(self.rows)

    def line(self, step):
        """{"step", name: mean, ..., "tokens": sum} of the rows, which are then dropped."""
        line = {"step": step}
        for name in self.rows[0]:
            total = math.fsum(row[name] for row in self.rows)
            line[name] = int(total) if name == "tokens" else total / len(self.rows)
        line["learning_rate"] = self.rows[-1]["learning_rate"]
        self.rows = []
        return line


def read_lines(path, strict=True):
    """The complete lines of a .jsonl file of a run, each an object with its step; a last line that was cut is left out.

    Raises UserError, with file and line, for another line that cannot be read, or where it is not `strict` leaves it out and says so.
    """
    try:
        *complete, cut_off = read_text(path, REMEDY).split("\n")
    except FileNotFoundError:
        return []
    except UserError as error:
        if strict:
            raise
        logging.warning("%s It is begun anew.", error)
        return []
    lines = []
    for number, text in enumerate([*complete, cut_off], 1):
        try:
            lines.append(_line(text))
        except Unreadable as error:
            if number > len(complete):
                break
            if strict:
                raise UserError(f"{path}, line {number} {error}: {REMEDY}.") from None
            logging.warning("%s, line %d %s: it is left out.", path, number, error)
    return lines


def _line(text):
    line = parse_json(text, dict)
    if type(line.get("step")) is not int:
        raise Unreadable("has no step")
    return line


def cut(path, step, strict=True):
    """Drops the lines after `step` from a .jsonl file, in one atomic write, and returns the others."""
    lines = [line for line in read_lines(path, strict) if line["step"] <= step]
    write_text(path, _as_text(lines))
    return lines


def checksum_of_lines(lines):
    """A checksum of what a .jsonl file of these lines holds."""
    return checksum_of_text(_as_text(lines))


def _as_text(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def parameter_table(trainable, frozen):
    """A table, as text, of every trainable parameter with its shape and size, then both trees' counts and their ratio."""
    rows = [
        [jax.tree_util.keystr(path, simple=True, separator="/"), str(tuple(x.shape)), str(x.dtype), f"{x.size:,}"]
        for path, x in jax.tree_util.tree_leaves_with_path(trainable)
    ]
    return f"{columns(rows, left=3)}\n\n{parameter_summary(trainable, frozen)}\n"


def parameter_summary(trainable, frozen):
    """One line on how many parameters are trained and how many are frozen."""
    train, fixed = count(trainable), count(frozen)
    share = f"{train / (train + fixed):.1%} of all" if train + fixed else ""
    return f"{train:,} trainable parameters, {fixed:,} frozen ({share} are trained)"


def count(tree):
    """The number of parameters in all leaves; the scales of int8 weights do not count."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(x.size for path, x in leaves if not jax.tree_util.keystr(path, simple=True).endswith(SCALE))
