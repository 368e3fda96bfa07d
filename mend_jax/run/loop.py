"""The loop of a training run: steps, metrics, evaluations and checkpoints, until the last step or SIGTERM."""

import collections
import contextlib
import dataclasses
import math
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
from mend_jax.run.best import Score
from mend_jax.run.checkpoint import Checkpoints
from mend_jax.run.distributed import STOPPED
from mend_jax.run.layout import Layout, is_finite
from mend_jax.run.teacher_cache import TeacherCache
from mend_jax.step import TrainState


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

    def run(self) -> int:
        """Trains to the end (returns 0) or until SIGTERM (75). SIGTERM may come at the end too: then nothing slow may follow."""
        self.pending = collections.deque()  # steps in flight
        self.report = reporting.Reporter(self.workdir, self.start, self.config.train.steps)
        with _sigterm() as told_to_stop, contextlib.closing(self.report):
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
                stops = told_to_stop(step)
                evaluates = last or step % self.config.train.eval_every == 0
                if evaluates or stops or step % self.config.train.save_every == 0:
                    self._save(step, evaluates)
                ends = last or (evaluates and self._stops_early(step))
                if ends:  # its evaluation may have taken long
                    stops = told_to_stop(step) or stops
                if ends and not stops:
                    return 0
                if stops:
                    self.checkpoints.wait()
                    reporting.say(f"Stopped at step {step}, which is saved: the same command resumes from there.")
                    return STOPPED

    def _next(self, source, step):
        """A step's batch, being sent to the devices, with what the host must know of the global batch."""
        began = time.monotonic()
        batch = next(source)
        self.report.waited += time.monotonic() - began
        ids, demos_length, query_length = self.batches.plan(step)
        tokens, columns = (
            int(demos_length.sum() + query_length.sum()),
            batch.demos.shape[1] + math.prod(batch.query.tokens.shape[1:]),
        )
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

    def _save(self, step, evaluates):
        """Saves a checkpoint, with the evaluation's score if one is due. All steps before it have been checked to be finite."""
        ids = self.pending[-1][-1]
        while self.pending:
            self._absorb()
        state = self.layout.kept(self.state)
        if not is_finite(state.params):
            self._stop_not_finite("a parameter overflowed", step, ids)
        began, score = time.monotonic(), None
        if evaluates:
            values = {name: distributed.of_first(value) for name, value in self.evaluate(self.state.params).items()}
            score = values[self.score.name]
            self.report.write({"step": step} | values)
            reporting.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self.report.sync()
        self.checkpoints.save(step, state.params, state.opt_state, self._meta(), score)
        self.report.paused += time.monotonic() - began

    def _meta(self):
        return {"window": self.window.kept(), "metrics": self.report.checksum()}

    def _stops_early(self, step):
        if self.score.bad_evaluations(self.report.lines) < self.config.train.patience:
            return False
        reporting.say(
            f"Stopped at step {step}: no better {self.score.name} in {self.config.train.patience} evaluations."
        )
        return True


@contextlib.contextmanager
def _sigterm():
    """A function of the step: whether SIGTERM has arrived and all processes are to stop at this step."""
    if jax.process_count() > 1:  # JAX catches the signal in each process and has them agree on a step
        yield lambda step: distributed.told_to_stop()
        return
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        yield lambda step: stopped.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
