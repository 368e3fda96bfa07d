"""The paper's main comparison (Tables 2 and 6): trains each method, evaluates all of them and prints the table.

    python -m mend_jax.experiments.methods --config=configs/small_world.py:quick --workdir=runs/quickstart

In the workdir, <method>/pretrain and <method>/finetune are runs of `mend_jax.train`, evaluation/ is a run of
`mend_jax.evaluate` (table.md, scores.json, every prediction), and times.json has the seconds of each part. The same
command resumes where it stopped.

| method | pretraining, on text | finetuning, on tasks |
| --- | --- | --- |
| zero_shot, icl | | |
| prompt_tuning | | L_pred, of a matrix of vectors |
| hypertuning | L_CLM | L_pred |
| mend | L_distill | L_pred + lambda L_distill |

The last two train the config's prefix.kind, by default a distiller.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from mend_jax.cli.command_line import STOPPED
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import METHODS
from mend_jax.cli.text import minutes
from mend_jax.run import distributed
from mend_jax.run.files import write_json
from mend_jax.run.reading import read_json

# For each method its stages: (stage, weight of L_distill or None for the config's lambda, of L_pred, of L_CLM).
FINETUNING = ("finetune", None, 1.0, 0.0)  # MEND's
STAGES = {
    "zero_shot": [],
    "prompt_tuning": [("finetune", 0.0, 1.0, 0.0)],
    "icl": [],
    "hypertuning": [("pretrain", 0.0, 0.0, 1.0), ("finetune", 0.0, 1.0, 0.0)],
    "mend": [("pretrain", 1.0, 0.0, 0.0), FINETUNING],
}
READ_DEMOS = ("icl", "hypertuning", "mend")  # those that read demonstrations
assert tuple(STAGES) == METHODS and set(READ_DEMOS) <= set(METHODS)


def stage_configs(config: ConfigDict, method: str) -> list[tuple[str, ConfigDict]]:
    """The runs that `method` needs, in order: [(stage, config of the run)].

    Args:
        config: an experiment's; its loss.kd is lambda, experiment.pretrain_steps and .finetune_steps are the steps, and
            experiment.pretrain_batch_size, if it is not 0, is the batch size of pretraining.
        method: a key of STAGES.
    Returns:
        configs with an empty prefix.start_from: the caller, who knows the workdirs, sets it.
    """
    runs = []
    for stage, kd, pred, clm in STAGES[method]:
        c = stage_config(config, stage, kd, pred, clm).unlock()
        c.update_from_flattened_dict(fields_of(config, method))
        runs.append((stage, c.lock()))
    return runs


def fields_of(config: ConfigDict, method: str) -> dict:
    """{"section.field": value} that a method's trainings have instead of the config's: PromptTuning's matrix is as long as the
    longest prefix that the others finetune, has no shorter lengths, and may have a learning rate of its own."""
    from mend_jax.prefixes import kind_of

    if method != "prompt_tuning":
        return {}
    c = config.copy_and_resolve_references().unlock()
    c.stage = "finetune"
    own = config.experiment.prompt_tuning_learning_rate
    rate = {"optimizer.learning_rate": own} if own else {}
    return {"prefix.kind": "soft_prompt", "prefix.length": kind_of(c).positions(c), "prefix.nested": ()} | rate


def stage_config(config: ConfigDict, stage: str, kd: float | None, pred: float, clm: float) -> ConfigDict:
    """The config of one run: a stage with its weights of the losses (kd None: the experiment's lambda) and the experiment's steps."""
    c = config.copy_and_resolve_references().unlock()
    c.stage = stage
    c.prefix.start_from = ""
    c.loss.kd = config.loss.kd if kd is None else kd
    c.loss.pred, c.loss.clm = pred, clm
    c.train.steps = config.experiment.pretrain_steps if stage == "pretrain" else config.experiment.finetune_steps
    if stage == "pretrain" and config.experiment.pretrain_batch_size:
        c.train.batch_size = config.experiment.pretrain_batch_size
    return c.lock()


def main(config: ConfigDict, workdir: str) -> int:
    """Trains, then evaluates; returns the exit code of a training that was told to stop, else 0."""
    from mend_jax.run.checks import check_experiment
    from mend_jax.train import train

    if config.experiment.trained:
        raise UserError(
            "experiments.methods trains everything itself: without --config.experiment.trained, or with experiments.main_table,"
            " which uses what was trained."
        )
    folder = Path(workdir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir {folder} cannot be created ({error.strerror}): name another.") from error
    check_experiment(config, _trainings(config), [config])
    config = _with_first_seeds(config)
    _prepare_training_data(config, folder)
    times = Times(folder / "times.json")
    for method in config.experiment.methods:
        before = ""
        for stage, c in stage_configs(config, method):
            run = folder / method / stage
            _say(f"{method}: {stage}, {c.train.steps:,} steps, in {run}")
            c.prefix.start_from = before
            code = times.run(f"{method}/{stage}", functools.partial(train, c, str(run)))
            if code:
                return code
            before = str(run)
    if distributed.is_running() and distributed.told_to_stop():
        return STOPPED
    _evaluate(config, folder, times)
    return 0


def _with_first_seeds(config: ConfigDict) -> ConfigDict:
    """The config that reads the first experiment.first_seeds of the seeds alone: the files of all have been checked by now."""
    c, count = config.copy_and_resolve_references().unlock(), config.experiment.first_seeds or None
    c.evaluate.seeds, c.data.validation_seeds = c.evaluate.seeds[:count], c.data.validation_seeds[:count]
    return c.lock()


def _trainings(config: ConfigDict) -> list[tuple[ConfigDict, str]]:
    """(config, name of the field of its batch size) of each training of the experiment."""
    own = bool(config.experiment.pretrain_batch_size)
    return [
        (c, "experiment.pretrain_batch_size" if own and stage == "pretrain" else "train.batch_size")
        for method in config.experiment.methods
        for stage, c in stage_configs(config, method)
    ]


def _prepare_training_data(config: ConfigDict, folder: Path) -> None:
    """Tokenises and checks the data of all trainings that have not begun."""
    runs = ((method, stage, c) for method in config.experiment.methods for stage, c in stage_configs(config, method))
    prepare_training_data([c for method, stage, c in runs if not (folder / method / stage / "checkpoints").exists()])


def prepare_training_data(configs: list[ConfigDict]) -> None:
    """Tokenises and checks what these trainings read, so that errors in later ones are found now."""
    from mend_jax.data.batches import make_batches
    from mend_jax.run.build import readers_by_folders

    known = set()
    for c in configs:
        reads = c.stage, c.prefix.kind, c.prefix.length, c.prefix.join, c.data.to_json()
        if reads in known:
            continue
        known.add(reads)
        for split in ("train", "validation") if c.stage == "pretrain" else ("train",):
            make_batches(c, readers_by_folders(c), split)


def evaluation_config(config: ConfigDict, folder: Path) -> ConfigDict:
    """The config that evaluates every method of the experiment in `folder`, in the experiment's order."""
    c = config.copy_and_resolve_references().unlock()
    trained = {method: runs[-1][0] for method in STAGES if (runs := STAGES[method])}
    c.evaluate.methods = tuple(
        f"{method}={folder / method / trained[method]}" if method in trained else method
        for method in config.experiment.methods
    )
    return c.lock()


class Times:
    """The seconds of each part, kept in a file; a resumed part adds its later seconds, a finished one stays as it is."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def parts(self) -> dict:
        """The file's content, read again each time: another command may train another method in the same workdir."""
        try:
            found = read_json(self.path, "it is begun anew")
        except (FileNotFoundError, UserError):  # a file of times is not worth stopping for
            return {}
        return {name: part for name, part in found.items() if _is_part(part)}

    def run(self, name: str, part: Callable[[], int | None]) -> int:
        """Runs and times `part`; returns its result, 0 or None if it has finished."""
        start, code = time.monotonic(), 1
        try:
            code = part() or 0
        finally:
            self._add(name, time.monotonic() - start, finished=code == 0)
        return code

    def _add(self, name: str, seconds: float, finished: bool) -> None:
        if not distributed.is_first():
            return
        parts = self.parts
        before = parts.get(name, {"seconds": 0.0, "finished": False})
        if before["finished"]:
            return
        parts[name] = {"seconds": round(before["seconds"] + seconds, 1), "finished": finished}
        write_json(self.path, parts)


def _is_part(part) -> bool:
    known = part if isinstance(part, dict) else {}
    return isinstance(known.get("seconds"), int | float) and isinstance(known.get("finished"), bool)


def _evaluate(config: ConfigDict, folder: Path, times: Times) -> None:
    from mend_jax.evaluate import evaluate

    _say(f"evaluation: {', '.join(config.experiment.methods)} on {config.data.partition}, in {folder / 'evaluation'}")
    c = evaluation_config(config, folder)
    with distributed.stops_at_sigterm():  # no training follows
        times.run("evaluation", lambda: evaluate(c, str(folder / "evaluation")) and 0)
    _say("time of each part: " + ", ".join(f"{name} {minutes(t['seconds'])}" for name, t in times.parts.items()))


def _say(text: str) -> None:
    if distributed.is_first():
        print(f"== {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
