"""The loop of a training run: steps, metrics, evaluations and checkpoints, until the last step or SIGTERM."""

import collections
import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mend_jax.cli.errors import UserError
from mend_jax.data.batches import Batches
from mend_jax.run import distributed, reporting
from mend_jax.run.best import Score, lines_until
from mend_jax.run.checkpoint import Checkpoints
from mend_jax.run.distributed import INTERRUPTED, STOPPED
from mend_jax.run.layout import Layout, is_finite
from mend_jax.run.teacher_cache import TeacherCache
from mend_jax.step import TrainState, loss_weights


@dataclasses.dataclass
class Loop:
    """All that the loop needs, and what it changes: the state and the metrics still to be read from the devices."""

    config: Any
    workdir: Path
    checkpoints: Checkpoints
    score: Score
    layout: Layout
    start: int  # the number of steps in the state
    state: TrainState  # on the devices
    window: reporting.Window  # the metrics since the last line
    frozen: Any  # the params that are not trained, on the devices
    compiled_step: Callable  # (state, frozen, batch) -> (state, metrics)
    evaluate: Callable  # params on the devices -> {name: value}
    batches: Batches
    teacher: TeacherCache | None = None
    due: bool = False  # whether the step `start` is saved, but was not evaluated

    def run(self) -> int:
        """Trains to the end (returns 0) or until SIGTERM (75) or Ctrl-C (130), which may come at the end too: then nothing slow may
        follow. A step is saved before it is evaluated, so that an evaluation can be ended at once."""
        self.pending = collections.deque()  # steps in flight
        lines = lines_until(self.workdir, self.start)
        parts = [name for name, weight in loss_weights(self.config)._asdict().items() if weight]
        self.report = reporting.Reporter(self.workdir, self.start, self.config.train.steps, lines, parts)
        with _Stop() as self.told_to_stop, contextlib.closing(self.report):
            if self.due and (code := self._conclude(self.start, True, 0)) is not None:
                return code
            step, source = self.start, iter(self.batches.iterator(self.start))
            ready = self._next(source, step)
            while True:
                with self.report.compiling() if step == self.start else contextlib.nullcontext():
                    self._dispatch(step, ready)
                step += 1
                last = step == self.config.train.steps
                if not last:
                    ready = self._next(source, step)
                while len(self.pending) > 1:  # one step stays in flight
                    self._absorb()
                stops = self.told_to_stop()
                due = last or step % self.config.train.eval_every == 0
                if due or stops or step % self.config.train.save_every == 0:
                    self._save(step, due)
                if (code := self._conclude(step, due, stops)) is not None:
                    return code

    def _conclude(self, step, due, stops) -> int | None:
        """Evaluates a step where it is due; the exit code if the run ends with it, else None. `stops`: that of a stop, or 0."""
        if due and not stops:
            stops = self.told_to_stop() or self._evaluate(step)
            if not stops and (step == self.config.train.steps or self._stops_early(step)):
                stops = self.told_to_stop()  # the evaluation may have taken long
                if not stops:
                    return 0
        if not stops:
            return None
        self.checkpoints.wait()
        reporting.say(f"Stopped at step {step}, which is saved: the same command resumes from there.")
        return stops

    def _next(self, source, step):
        """A step's batch, being sent to the devices, with what the host must know of the global batch."""
        began = time.monotonic()
        batch = next(source)
        self.report.waited += time.monotonic() - began
        ids, *_ = self.batches.plan(step)
        tokens, columns = self.batches.tokens(step), batch.demos.shape[1] + math.prod(batch.query.tokens.shape[1:])
        facts = {"padding": 1.0 - tokens / (columns * len(ids)), "tokens": tokens}
        sent = self.layout.split(batch.replace(ids=None))
        if self.teacher is not None:
            sent, facts["teacher_lost"] = self.teacher.add(batch, sent, self.frozen, self.layout.split)
        return sent, facts, ids

    def _dispatch(self, step, ready):
        batch, facts, ids = ready
        self.state, metrics = self.compiled_step(self.state, self.frozen, batch)
        self.pending.append((step + 1, metrics, facts, ids))

    def _absorb(self):
        """Reads the metrics of the oldest step in flight; writes a line every train.log_every steps."""
        step, metrics, facts, ids = self.pending.popleft()
        row = {name: float(value) for name, value in sorted(self.layout.fetch(metrics).items())}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            self._stop_not_finite(f"the loss is {row['loss']}, the gradient norm {row['grad_norm']}", step, ids)
        self.window.add(row | facts)
        self.report.tokens += facts["tokens"]
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            line = self.window.line(step)
            self.report.write(line)
            self.report.progress(line)

    def _stop_not_finite(self, what, step, ids):
        self.checkpoints.wait()
        steps = self.checkpoints.steps
        kept = f"checkpoint {steps[-1]} in {self.workdir} is intact" if steps else "no checkpoint was written yet"
        first = "; ".join(self.batches.describe(row) for row in ids[:3])
        raise UserError(
            f"Step {step} is not finite ({what}) on the batch of rows {', '.join(str(row) for row in ids)} (the first is "
            f"{first}): check these rows, or lower optimizer.learning_rate; {kept}."
        )

    def _save(self, step, due):
        """Saves a checkpoint, which is `due` for an evaluation or not. All steps before it have been checked to be finite."""
        ids = self.pending[-1][-1]
        while self.pending:
            self._absorb()
        state = self.layout.kept(self.state)
        if not is_finite(state.params):
            self._stop_not_finite("a parameter overflowed", step, ids)
        began = time.monotonic()
        self.report.sync()
        facts = {"window": self.window.kept(), "metrics": self.report.checksum(), "lines": len(self.report.lines)}
        self.checkpoints.save(step, state.params, state.opt_state, facts | {"due": due})
        self.report.paused += time.monotonic() - began

    def _evaluate(self, step) -> int:
        """Evaluates the step that was saved last; the exit code if it is told to stop meanwhile, else 0."""
        began = time.monotonic()
        self.checkpoints.wait()
        try:
            with self.told_to_stop.at_once():
                values = {name: distributed.of_first(value) for name, value in self.evaluate(self.state.params).items()}
        except distributed.Stopped:
            return STOPPED
        self.checkpoints.add_score(step, values[self.score.name], values)
        self.report.write({"step": step} | values)
        reporting.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self.report.sync()
        self.report.paused += time.monotonic() - began
        return 0

    def _stops_early(self, step):
        if self.score.bad_evaluations(self.report.lines) < self.config.train.patience:
            return False
        reporting.say(
            f"Stopped at step {step}: no better {self.score.name} in {self.config.train.patience} evaluations."
        )
        return True


class _Stop:
    """Called, it says whether a training is to stop at this step, with which exit code: after SIGTERM, or a first Ctrl-C; else 0.

    All processes have to call it at the same steps: JAX catches the signal in each of several and has them agree on one.
    """

    def __init__(self):
        self.code, self.before = 0, {}

    def __enter__(self):
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self.before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._heard)}
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # what runs in the background ignores it
                self.before[signal.SIGINT] = signal.signal(signal.SIGINT, self._heard)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self) -> int:
        if jax.process_count() > 1:
            return STOPPED if distributed.told_to_stop() else 0
        return self.code

    def _heard(self, number, _):
        self.code = STOPPED if number == signal.SIGTERM else INTERRUPTED
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait for the step
        os.write(2, b"\nStopping after this step, which is saved first.\n")

    @contextlib.contextmanager
    def at_once(self):
        """Within it, SIGTERM raises `distributed.Stopped` and Ctrl-C KeyboardInterrupt: for what is begun anew by the same command."""
        if not self.before:
            yield
            return
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with distributed.stops_at_sigterm():
                yield
        finally:
            if signal.SIGINT in self.before:
                signal.signal(signal.SIGINT, self._heard)
