"""Train: meta-distillation pretraining, finetuning, PromptTuning, HyperTuning, and an ordinary LM. One loop, one step.

    python -m mend_jax.train --config=configs/small_world.py --workdir=runs/mend --config.optimizer.learning_rate=1e-4

The same command goes on where a run was stopped, killed or crashed, and ends with the very numbers of an unbroken run.
A run begins with the first of these that is there:

1. the newest whole checkpoint of the workdir;
2. the best checkpoint of the workdir `prefix.start_from`;
3. the pretrained backbone (stage "lm": the LLM's own weights);
4. random weights (stage "lm", where `llm.path` holds a config.json alone).

Exit codes: 0 finished; 2 a mistake of the user's, said in one sentence; 75 stopped by SIGTERM after a checkpoint, to be
started again. Files in the workdir: config.json, sources.json, params.txt, checkpoints/, metrics.jsonl (deterministic), speed.jsonl
(times), tensorboard/, and, when stage "lm" has ended, llm/: its best weights as a Hugging Face folder.
"""

import collections
import contextlib
import dataclasses
import fcntl
import math
import signal
import threading
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from mend_jax.cli.command_line import STOPPED, run
from mend_jax.cli.errors import UserError
from mend_jax.interchange.trained import lm_settings
from mend_jax.models.folders import local_folder, save_model
from mend_jax.run import build as run_parts
from mend_jax.run import checkpoint, distributed, reporting
from mend_jax.run import layout as parallel
from mend_jax.run import resume as meaning
from mend_jax.run.checkpoint import Checkpoints
from mend_jax.run.files import is_disk_full, whole_folder, write_text
from mend_jax.scoring.results import tree_hash
from mend_jax.step import TrainState, init_state, make_loss_fn, make_optimizer, make_train_step

LLM_FOLDER = "llm"


def train(config, workdir) -> int:
    """Trains, or goes on training, the run of `config` (configs/base.py) in `workdir`; returns the exit code.

    Raises:
        UserError: a configuration that cannot be run, another run's workdir, a loss that is not finite, a full disk.
    """
    parallel.check_batch_size(config)
    workdir = Path(workdir).expanduser().absolute()
    try:
        with _alone_in(workdir):
            return _train(config, workdir)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(f"The disk of {workdir} is full: make room and give the same command again.") from error
        raise


def _train(config, workdir):
    score = _score_of(config)
    checkpoints = Checkpoints(workdir, score.maximize)
    try:
        start = checkpoints.steps[-1] if checkpoints.steps else 0
        lines = [line for line in reporting.read_lines(workdir / reporting.METRICS) if line["step"] <= start]
        finished = _is_finished(config, start, lines, score)
        if checkpoints.steps:
            meaning.check_resume(workdir, config, finished)
        elif config.stage != "lm" and config.prefix.start_from:
            meaning.check_start(config)
        if finished:
            reporting.say(
                f"This run is finished: {start} steps, {_best_text(lines, score)}. Nothing to do in {workdir}."
            )
        else:
            run_parts.check_settings(config)
            code = _Run(config, workdir, checkpoints, score).go()
            if code:
                return code
            best = _best_text(reporting.read_lines(workdir / reporting.METRICS), score)
            reporting.say(f"Trained: {best}; what reads {workdir} takes the weights of that step.")
        checkpoints.wait()
        _write_llm(config, workdir)
        distributed.wait_for_all("trained")  # what reads it next finds it whole
        return 0
    finally:
        checkpoints.close()


@dataclasses.dataclass(frozen=True)
class _Score:
    name: str
    maximize: bool

    def of(self, lines):
        return [line[self.name] for line in lines if self.name in line]


def _score_of(config):
    """What an evaluation measures, and so what the best checkpoint is best in."""
    return _Score("dev_score", True) if config.stage == "finetune" else _Score("validation_loss", False)


def _is_finished(config, step, lines, score):
    return step >= config.train.steps or _bad_evaluations(lines, score) >= config.train.patience


def _bad_evaluations(lines, score):
    """Evaluations since the best one."""
    values = score.of(lines)
    best = (max if score.maximize else min)(values, default=None)
    return 0 if best is None else len(values) - 1 - values.index(best)


def _best_text(lines, score):
    evaluated = [line for line in lines if score.name in line]
    if not evaluated:
        return "never evaluated"
    best = (max if score.maximize else min)(evaluated, key=lambda line: line[score.name])  # the first of equals, as kept
    return f"best {score.name} {best[score.name]:.4f} at step {best['step']}"


class _Run:
    """One run from its start to its end: what is trained, where it lives, what is still to be read from the devices."""

    def __init__(self, config, workdir, checkpoints, score):
        self.config, self.workdir, self.checkpoints, self.score = config, workdir, checkpoints, score
        self.layout = parallel.make_layout(config.train.parallel, config.mesh)
        place = self.layout.place
        self.llm = run_parts.load(config, place)
        self.model = None if config.stage == "lm" else run_parts.build(config, self.llm, not checkpoints.steps, place)
        run_parts.check_tokenizers(config, self.llm, self.model)
        optimizer = make_optimizer(config)
        self.loss_fn = make_loss_fn(config, self.llm, self.model, self.layout.mesh)
        params = self.llm.params if self.model is None else self.model.params
        frozen = {} if self.model is None else self.llm.params
        self.start, self.state, meta = self._restore(params, optimizer)
        step = make_train_step(config, self.loss_fn, optimizer, self.layout.axis)
        self.compiled_step = self.layout.compile_step(step, self.state)
        self.frozen = self.layout.place_frozen(frozen)
        self.window = reporting.Window(meta.get("window", ()))
        self.pending = collections.deque()
        self.evaluate = run_parts.evaluation(config, self.llm, self.model, self.loss_fn, self.layout, self.frozen)
        self.batches = run_parts.batches(config, self.llm, self.model, "train", self.layout)
        if checkpoints.steps:
            meaning.check_data(workdir, config, self.batches.contents)
        self._write_start(params, frozen)
        self.report = reporting.Reporter(workdir, self.start, config.train.steps)

    def go(self):
        """Trains to the end (0) or until SIGTERM (75), which may come at the end too: then nothing that takes long may follow."""
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
                    reporting.say(f"Stopped at step {step}, which is saved: the same command goes on from there.")
                    return STOPPED

    def _restore(self, params, optimizer):
        """(step, TrainState on the devices, meta) to begin with."""
        start = partial(init_state, optimizer=optimizer)
        shapes = self.layout.shaped(jax.eval_shape(start, params))
        found = self.checkpoints.restore(shapes.params, shapes.opt_state)
        if found is None:
            return 0, self.layout.init(start, params), {}
        step, params, opt_state, meta = found
        reporting.say(f"Going on from step {step} in {self.workdir}.")
        return step, self.layout.place_state(TrainState(np.int32(step), params, opt_state)), meta

    def _write_start(self, params, frozen):
        device = jax.devices()[0]
        plural = "s" * (jax.device_count() > 1)
        reporting.say(
            f"{reporting.parameter_summary(params, frozen)}; {jax.device_count()} device{plural} ({device.device_kind}), "
            f"{self.config.train.parallel}, batch {self.config.train.batch_size}"
        )
        begins = self.start == 0 and self.config.stage != "lm" and self.config.prefix.start_from
        start_hash = tree_hash(params) if begins else None  # of parts on all processes
        if jax.process_index() == 0:
            checkpoint.write_config(self.workdir, self.config)
            meaning.write_sources(self.workdir, self.config, self.batches.contents, start_hash)
            write_text(self.workdir / reporting.PARAMS, reporting.parameter_table(params, frozen))

    def _next(self, source, step):
        """The batch of a step on its way to the devices, with what the host must know of the batch of all processes."""
        began = time.monotonic()
        batch = next(source)
        self.report.waited += time.monotonic() - began
        ids, demos_length, query_length = self.batches.plan(step)
        tokens, columns = (
            int(demos_length.sum() + query_length.sum()),
            batch.demos.shape[1] + math.prod(batch.query.tokens.shape[1:]),
        )
        facts = {"padding": 1.0 - tokens / (columns * len(ids)), "tokens": tokens}
        return self.layout.split(batch.replace(ids=None)), facts, ids

    def _dispatch(self, step, ready):
        batch, facts, ids = ready
        self.state, metrics = self.compiled_step(self.state, self.frozen, batch)
        self.pending.append((step + 1, metrics, facts, ids))

    def _absorb(self):
        """Reads the metrics of the oldest step in flight; a line is written every train.log_every steps."""
        step, metrics, facts, ids = self.pending.popleft()
        row = {name: float(value) for name, value in sorted(self.layout.fetch(metrics).items())}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            self._stop_not_finite(f"the loss is {row['loss']}, the gradient's norm {row['grad_norm']}", step, ids)
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
            f"Step {step} is not finite ({what}) on the batch of rows {', '.join(str(row) for row in ids)} (they begin with "
            f"{first}): look at them, or lower optimizer.learning_rate; {kept}."
        )

    def _save(self, step, evaluates):
        """A checkpoint, with the evaluation's score where one is due. All steps before it were seen to be finite."""
        ids = self.pending[-1][-1]
        while self.pending:
            self._absorb()
        state = self.layout.kept(self.state)
        if not parallel.is_finite(state.params):
            self._stop_not_finite("a parameter overflowed", step, ids)
        began, score = time.monotonic(), None
        if evaluates:
            values = {name: distributed.of_first(value) for name, value in self.evaluate(self.state.params).items()}
            score = values[self.score.name]
            self.report.write({"step": step} | values)
            reporting.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self.report.sync()
        self.checkpoints.save(step, state.params, state.opt_state, {"window": self.window.rows}, score)
        self.report.paused += time.monotonic() - began

    def _stops_early(self, step):
        if _bad_evaluations(self.report.lines, self.score) < self.config.train.patience:
            return False
        reporting.say(
            f"Stopped at step {step}: no better {self.score.name} in {self.config.train.patience} evaluations."
        )
        return True


def _write_llm(config, workdir):
    """Stage "lm": the best weights as a Hugging Face folder, which appears whole or not at all."""
    target = workdir / LLM_FOLDER
    if config.stage != "lm" or target.exists() or jax.process_index() != 0:
        return
    folder = local_folder(config.llm.path)
    params, meta = checkpoint.load_best(workdir)
    with whole_folder(target) as temporary:
        save_model(temporary, lm_settings(config, folder), params, folder)
    reporting.say(f"The weights of step {meta['step']} are in {target}, as a Hugging Face folder.")


@contextlib.contextmanager
def _alone_in(workdir):
    """Holds the workdir, so that two runs never write the same files."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"The workdir {workdir} cannot be written ({error.strerror}): name another.") from error
    with file:
        if jax.process_index() == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"Another run is training in {workdir}: wait for it, or name another workdir."
                ) from None
        yield


@contextlib.contextmanager
def _sigterm():
    """A function of the step: whether the machine is about to be taken away, and all processes are to stop there."""
    if jax.process_count() > 1:  # JAX catches the signal on each and has them agree on a step
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


if __name__ == "__main__":
    run(train, several=True)
