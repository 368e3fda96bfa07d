"""The paper's main comparison (Tables 2 and 6): trains what each method needs, evaluates them all, prints the table.

    python -m mend_jax.experiments.methods --config=configs/small_world.py:quick --workdir=runs/quickstart

Below the workdir: <method>/pretrain and <method>/finetune are runs of `mend_jax.train`, evaluation/ is one of
`mend_jax.evaluate` (table.md, scores.json, every prediction), times.json has the seconds that each part took. The same
command goes on where it stopped.

| method | pretraining, on text | finetuning, on tasks |
| --- | --- | --- |
| zero_shot, icl | | |
| prompt_tuning | | L_pred, of a matrix of vectors |
| hypertuning | L_CLM | L_pred |
| mend | L_distill | L_pred + lambda L_distill |
"""

import functools
import json
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

# Of each method: (stage, weight of L_distill or None for the config's lambda, of L_pred, of L_CLM).
STAGES = {
    "zero_shot": [],
    "prompt_tuning": [("finetune", 0.0, 1.0, 0.0)],
    "icl": [],
    "hypertuning": [("pretrain", 0.0, 0.0, 1.0), ("finetune", 0.0, 1.0, 0.0)],
    "mend": [("pretrain", 1.0, 0.0, 0.0), ("finetune", None, 1.0, 0.0)],
}
assert tuple(STAGES) == METHODS


def stage_configs(config: ConfigDict, method: str) -> list[tuple[str, ConfigDict]]:
    """The runs that `method` needs, in order: [(stage, config of the run)].

    Args:
        config: an experiment's; its loss.kd is lambda, steps are experiment.pretrain_steps and .finetune_steps, and
            pretraining's sequences a step experiment.pretrain_batch_size where that is not 0.
        method: a key of STAGES.
    Returns:
        configs whose prefix.start_from is empty: only who knows the workdirs can say where the earlier stage lies.
    """
    runs = []
    for stage, kd, pred, clm in STAGES[method]:
        c = config.copy_and_resolve_references().unlock()
        c.stage = stage
        c.prefix.kind = "soft_prompt" if method == "prompt_tuning" else "distiller"
        c.prefix.start_from = ""
        c.loss.kd = config.loss.kd if kd is None else kd
        c.loss.pred, c.loss.clm = pred, clm
        c.train.steps = config.experiment.pretrain_steps if stage == "pretrain" else config.experiment.finetune_steps
        if stage == "pretrain" and config.experiment.pretrain_batch_size:
            c.train.batch_size = config.experiment.pretrain_batch_size
        runs.append((stage, c.lock()))
    return runs


def main(config: ConfigDict, workdir: str) -> int:
    """Trains, then evaluates; exits with the code of a training that was told to stop."""
    from mend_jax.train import train

    folder = Path(workdir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir {folder} cannot be made ({error.strerror}): name another.") from error
    _check_evaluation_data(config)
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


def _check_evaluation_data(config: ConfigDict) -> None:
    """Reads all that will be evaluated and measures what the models can read: a mistake would else be found after hours of
    training."""
    from mend_jax.data.bos import bos_token
    from mend_jax.data.evaluation import load_tasks
    from mend_jax.data.small_world import resolve
    from mend_jax.llm.decoder_only import LLM
    from mend_jax.models.families import from_hf_config
    from mend_jax.models.folders import load_tokenizer, local_folder
    from mend_jax.run.build import check_settings
    from mend_jax.run.layout import check_batch_size
    from mend_jax.scoring.tasks import check_longest

    config = resolve(config)
    for method in config.experiment.methods:
        for stage, c in stage_configs(config, method):
            check_settings(c)
            own = stage == "pretrain" and config.experiment.pretrain_batch_size
            check_batch_size(c, "experiment.pretrain_batch_size" if own else "train.batch_size")
    folder = local_folder(config.llm.path)
    tokenizer = load_tokenizer(folder)
    bos = bos_token(config.data.bos, tokenizer, config.llm.path)
    llm = LLM(from_hf_config(folder), None, tokenizer, str(folder), config.llm.dtype, bos=bos)  # needs no weights
    finetuned = any(stage == "finetune" for method in config.experiment.methods for stage, *_ in STAGES[method])
    for split in {config.evaluate.split} | ({"dev"} if finetuned else set()):
        tasks, _ = load_tasks(config, llm, split)
        if finetuned:
            check_longest(llm, config.prefix.length, tasks, split)


def _prepare_training_data(config: ConfigDict, folder: Path) -> None:
    """Tokenises and checks what all trainings read that have not begun: a mistake in a later one's is found now too."""
    from mend_jax.data.batches import make_batches
    from mend_jax.data.small_world import resolve
    from mend_jax.run.build import readers_by_folders

    config, known = resolve(config), set()
    for method in config.experiment.methods:
        for stage, c in stage_configs(config, method):
            kind = stage, c.prefix.kind
            if kind in known or (folder / method / stage / "checkpoints").exists():
                continue
            known.add(kind)
            for split in ("train", "validation") if stage == "pretrain" else ("train",):
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
    """Seconds of each part, kept in a file: an interrupted part adds what it takes later, a finished one no more."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def parts(self) -> dict:
        """Read anew each time: another command may train another method in the same workdir."""
        try:
            return json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # a file of times is not worth stopping for
            return {}

    def run(self, name: str, part: Callable[[], int | None]) -> int:
        """What `part()` returns: 0 or None when it has finished."""
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


def _evaluate(config: ConfigDict, folder: Path, times: Times) -> None:
    from mend_jax.evaluate import evaluate

    _say(f"evaluation: {', '.join(config.experiment.methods)} on {config.data.partition}, in {folder / 'evaluation'}")
    c = evaluation_config(config, folder)
    with distributed.stops_at_sigterm():  # no training comes after it
        times.run("evaluation", lambda: evaluate(c, str(folder / "evaluation")) and 0)
    _say("time of each part: " + ", ".join(f"{name} {minutes(t['seconds'])}" for name, t in times.parts.items()))


def _say(text: str) -> None:
    if distributed.is_first():
        print(f"== {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
