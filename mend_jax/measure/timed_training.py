"""MEND within a given time: both stages with as many steps as fit, the export, the evaluation.

    python -m mend_jax.measure.timed_training --config=configs/smollm2_135m.py --workdir=runs/timed --seconds=240 \\
        --out=runs/timed.json --home=runs/home --config.data.text=C4 --config.data.tasks=METAICL

The learning rate decays over train.steps, so a stage must know its number of steps when it begins: it begins with the config's,
and if its first steps show that another number fits the time, it begins anew with that. SIGTERM, which a training answers with a
checkpoint, ends one that would still be too long.

The report is written after each stage. The workdir is that of `mend_jax.experiments.methods` for the method mend; what an earlier
run left there is removed.
"""

import os
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import jax

from mend_jax.cli import command_line as cli
from mend_jax.cli.errors import UserError
from mend_jax.evaluate import evaluate
from mend_jax.experiments.methods import evaluation_config, stage_configs
from mend_jax.interchange.export import export
from mend_jax.measure.machine import median
from mend_jax.measure.pieces import split
from mend_jax.run.files import write_report
from mend_jax.run.reporting import METRICS, SPEED, read_lines, say
from mend_jax.run.saved_steps import has_checkpoint
from mend_jax.train import train

SHARES = {"pretrain": 0.3, "finetune": 0.55}  # of the seconds left when a stage begins; the rest is the evaluation's
LINES = 3  # lines of speed.jsonl that show how fast a training is
ENOUGH = 0.9  # a training of which this share fits goes on
MORE = 1.25  # one that could have so many times the steps begins anew
FEWEST = 20  # steps that are worth beginning anew for
START = 10  # seconds that pass before `timed_training` is called: imports, the device's start
PIECE = 15 << 20  # bytes of the largest file that is taken home


def timed_training(config, workdir, out: str, home: str, seconds: int) -> None:
    """The command.

    Args:
        config: an experiment's, as for mend_jax.experiments.methods; on a GPU its LLM in bfloat16 attends by cuDNN, or, where
            that fails, as anywhere else.
        workdir: the folder of the trainings.
        out: the JSON file of the report.
        home: a folder for the trained distiller, a tar file in pieces of at most 15 MiB.
        seconds: the time of everything together, the start of Python included.
    """
    until, folder = time.monotonic() + seconds - START, Path(workdir).absolute()
    config = config.copy_and_resolve_references().unlock()
    config.experiment.methods = ("zero_shot", "icl", "mend")
    if jax.default_backend() == "gpu" and config.llm.dtype == config.prefix.dtype == "bfloat16":
        config.llm.attention = "cudnn"
    report, before = {"seconds": seconds, "stages": {}}, ""
    for name in ("mend", "evaluation", "exported"):
        shutil.rmtree(folder / name, ignore_errors=True)
    default = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is only for the trainings, and may come as one ends
    try:
        for stage, c in stage_configs(config, "mend"):
            c = _changed(c, {"prefix.start_from": before, "llm.attention": config.llm.attention})
            run, until_then = folder / "mend" / stage, time.monotonic() + SHARES[stage] * (until - time.monotonic())
            found = report["stages"][stage] = run_stage(c, run, until_then)
            config.llm.attention, before = found["attention"], str(run)
            write_report(out, report)
        report["home"] = take_home(folder / "mend" / "finetune", folder / "exported", Path(home))
        write_report(out, report)
        began = time.monotonic()
        report["evaluation"] = evaluate(evaluation_config(config, folder), folder / "evaluation")
        report["evaluation"]["seconds"] = round(time.monotonic() - began, 1)
        write_report(out, report)
    finally:
        signal.signal(signal.SIGTERM, default)


def run_stage(config, workdir: Path, until: float) -> dict:
    """Trains one stage until the time `until` (of `time.monotonic`) at most; returns what was done.

    If it fails with cuDNN's attention it goes on, from its newest checkpoint if it has one, without it.
    """
    began, adapts, failure = time.monotonic(), True, None
    steps = guess = config.train.steps
    while True:
        # Evaluated once, at the end. The step before it is saved, in case that the evaluation fails.
        c = _changed(config, {"train.steps": steps, "train.eval_every": steps, "train.save_every": max(1, steps - 1)})
        watch = Watch(workdir, steps, until, adapts)
        try:
            with watch:
                code = train(c, workdir)
        except UserError:
            raise
        except Exception as error:  # of many kinds: the compiler's, the kernel's
            if config.llm.attention != "cudnn":
                raise
            failure = " ".join(str(error).split())[:300] or type(error).__name__
            say(f"cuDNN's attention failed ({failure}): the stage goes on without it.")
            config = _changed(config, {"llm.attention": "xla"})
            if not has_checkpoint(workdir):
                shutil.rmtree(workdir)
            continue
        if watch.wanted is None:
            break
        say(f"{steps} steps do not fit the time, {watch.wanted} do: the stage begins anew.")
        shutil.rmtree(workdir)
        steps, adapts = watch.wanted, False
    found = {"steps": steps, "first_guess": guess, "stopped": bool(code), "attention": config.llm.attention}
    return found | {"cudnn_failure": failure} | _outcome(c, workdir) | {"seconds": round(time.monotonic() - began, 1)}


class Watch:
    """Within it a thread follows a training's speed.jsonl, and ends the training by SIGTERM if its time is over or, where it
    `adapts`, if `wanted`, another number of steps, fits the time better."""

    def __init__(self, workdir: Path, steps: int, until: float, adapts: bool):
        self.workdir, self.steps, self.until, self.adapts = workdir, steps, until, adapts
        self.began, self.wanted, self.over = time.monotonic(), None, threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def _follow(self) -> None:
        while not self.over.wait(0.1):
            lines, now = read_lines(self.workdir / SPEED), time.monotonic()
            if self.adapts and len(lines) >= LINES:
                self.adapts = False
                pace, done = lines[-1]["seconds_per_step"], lines[-1]["step"]
                start = max(0.0, now - self.began - done * pace)
                self.wanted = other_steps(self.steps, done, pace, start, self.until - now)
            if lines and (self.wanted is not None or now > self.until):
                os.kill(os.getpid(), signal.SIGTERM)
                return


def other_steps(steps: int, done: int, pace: float, start: float, left: float) -> int | None:
    """The number of steps with which a training should begin anew; None: it goes on.

    Args:
        steps: its steps; `done`: those it has taken.
        pace: seconds of a step.
        start: seconds from the beginning to the first step, which are spent again if it begins anew. Half as many are left for the
            evaluation at the end, which is compiled too.
        left: seconds that are left.
    """
    left -= start / 2
    fitting, anew = done + left / pace, int((left - start) / pace)
    if fitting >= ENOUGH * steps:
        return anew if anew > MORE * steps else None
    return anew if anew >= FEWEST else None  # else SIGTERM ends it in time


def take_home(run: Path, exported: Path, home: Path) -> dict:
    """Exports the distiller of a training, its weights in bfloat16, into a tar file in pieces in the folder `home`.

    Returns {"files": their names, "bytes"}.
    """
    say(export(run, exported, weights="bfloat16"))
    shutil.rmtree(exported / "release", ignore_errors=True)  # the same weights again
    home.mkdir(parents=True, exist_ok=True)
    whole = exported.with_name("mend.tar")
    with tarfile.open(whole, "w") as tar:
        tar.add(exported, "mend")
    size = whole.stat().st_size
    pieces = split(whole, home / whole.name, -(-size // PIECE))
    whole.unlink()
    return {"files": [piece.name for piece in pieces], "bytes": size}


def _outcome(config, workdir: Path) -> dict:
    """What a training's files say of it."""
    lines, speeds = read_lines(workdir / METRICS), read_lines(workdir / SPEED)
    losses = [line["loss"] for line in lines if "loss" in line]
    validation = next((line for line in reversed(lines) if "recovered" in line), {})
    done = max((line["step"] for line in lines), default=0)
    found = {name: median([line[name] for line in speeds]) for name in ("seconds_per_step", "tokens_per_second")}
    found |= {"done": done, "rows": done * config.train.batch_size, "first_loss": losses[0], "last_loss": losses[-1]}
    return found | {"validation": validation}


def _changed(config, fields: dict):
    """A copy of a config with other values of some fields."""
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(fields)
    return config.lock()


if __name__ == "__main__":
    cli.run(timed_training)
