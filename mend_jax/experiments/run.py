"""The runner of all experiments: trains what their rows need and is not trained yet, scores what is not scored, writes the tables.

Everything is checked before work starts, and a command that was stopped goes on where it stopped: exit code 75 after SIGTERM.
"""

import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mend_jax.cli.command_line import STOPPED
from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Parts
from mend_jax.cli.settings import dotted_fields
from mend_jax.experiments.methods import READ_DEMOS, Times
from mend_jax.experiments.table import Experiment, Row, evaluation_key
from mend_jax.experiments.trainings import RMS, Training, with_fields
from mend_jax.experiments.written import ROWS, TABLE, add_origins, head, origin, write  # noqa: F401  (for experiments that have no rows)
from mend_jax.run import distributed
from mend_jax.run.resume import FREE_FIELDS, defaults
from mend_jax.run.sealed import read_sealed, write_sealed
from mend_jax.scoring.answers import read_scores

CONFIG, TIMES = "experiments.json", "times.json"
COMPILED = (
    "compiled"  # JAX's compile cache of a workdir, where the user has none: experiments compile the same programs
)
BUDGET = ("experiment.pretrain_steps", "experiment.finetune_steps", "experiment.pretrain_batch_size")
# What may change from one experiment of a workdir to the next; of `experiment` all but the BUDGET.
FREE = (
    *(name for name in FREE_FIELDS if name not in ("experiment.", RMS)),
    "evaluate.methods",
    "evaluate.batch_size",
    "evaluate.parallel",
    # Evaluations are known by these, and finetunings, whose checkpoint is chosen by such items.
    "evaluate.tasks",
    "evaluate.seeds",
    "evaluate.limit",
    "data.validation_seeds",
)


def run_experiment(experiment: Experiment, config: ConfigDict, workdir) -> int:
    """Runs one experiment in `workdir`, or what is left of it; returns the exit code."""
    return run_experiments([experiment], config, workdir)


def run_experiments(experiments: Sequence[Experiment], config: ConfigDict, workdir) -> int:
    """Runs several, which share what is trained and scored. Returns 75 if a training was told to stop, else 0.

    Raises:
        UserError: a workdir of another config, or anything that a training or an evaluation would stumble over.
    """
    origin()  # asks now for the commit, which may be another one when hours of work have ended
    folder = open_workdir(config, workdir)
    _compile_into(folder / COMPILED)
    planned = [(experiment, _rows(experiment, config)) for experiment in experiments]
    rows = [row for _, part in planned for row in part]
    if left := [row for row in rows if not _is_scored(folder, row)]:
        check(config, folder, left)
    work = Work(folder, rows)
    for experiment, part in planned:
        say(f"{experiment.name}: {experiment.heading}, {len(part)} rows")
        code = work.train([row.training for row in part if row.training is not None])
        if code:
            return code
        work.score(part)
        if distributed.is_first():
            write(experiment, config, folder, part, {row.folder: _methods(folder / row.folder) for row in part})
    return 0


def _rows(experiment: Experiment, config: ConfigDict) -> list[Row]:
    """Its rows. Raises UserError if there is none."""
    found = experiment.rows(config)
    if not found:
        wanted = ", ".join(READ_DEMOS)
        raise UserError(f"{experiment.name} has no row: experiment.methods must name one of {wanted}.")
    return found


def open_workdir(config: ConfigDict, workdir) -> Path:
    """The folder of experiments, which is made or belongs to this config.

    Raises UserError for one that cannot be written, or that holds something else or experiments of another config.
    """
    folder = Path(workdir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir {folder} cannot be created ({error.strerror}): name another.") from error
    path, wanted = folder / CONFIG, dotted_fields(json.loads(config.to_json()))
    others = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name not in (CONFIG, COMPILED))
    if not others or not path.is_file():  # what was refused before work began leaves its config alone
        if others:
            raise UserError(f"{folder} is not a workdir of experiments: it holds {others[0]}; name a new folder.")
        if distributed.is_first():
            write_sealed(path, json.loads(config.to_json()), sort_keys=True)
        return folder
    saved = read_sealed(path, "restore it, or name another workdir")
    saved = defaults() | dotted_fields(saved)  # a field may be younger than the workdir
    for name in sorted(saved.keys() | wanted.keys()):
        if not may_change(name) and saved.get(name) != wanted.get(name):
            there, here = (json.dumps(fields.get(name)) for fields in (saved, wanted))
            raise UserError(
                f"{folder} holds experiments with {name}={there}, now it is {here}: set it back, or name another workdir."
            )
    return folder


def may_change(name: str) -> bool:
    """Whether the experiments of a workdir may have different values of a field."""
    return name.startswith(FREE) or (name.startswith("experiment.") and name not in BUDGET)


def check(config: ConfigDict, folder: Path, rows: Sequence[Row]) -> None:
    """Every check of every training and evaluation that the rows need, before the first begins."""
    from mend_jax.experiments.methods import prepare_training_data
    from mend_jax.run.checks import check_experiment

    trainings = unique(row.training for row in rows if row.training is not None)
    left = [training.config for training in trainings if not (folder / training.folder / "checkpoints").exists()]
    own = bool(config.experiment.pretrain_batch_size)
    names = ["experiment.pretrain_batch_size" if own and c.stage == "pretrain" else "train.batch_size" for c in left]
    # Another order of the same demonstrations needs no check of its own.
    ordered = [with_fields(row.evaluation, {"evaluate.order": 0}) for row in {row.folder: row for row in rows}.values()]
    evaluations = {evaluation_key(c): c for c in ordered}
    check_experiment(config, list(zip(left, names, strict=True)), list(evaluations.values()))
    prepare_training_data(left)


def unique(trainings) -> list[Training]:
    """All that must be trained for the trainings, each once, what is started from first."""
    return list({one.key: one for training in trainings for one in training.chain}.values())


def train(config: ConfigDict, workdir, trainings: Sequence[Training]) -> tuple[int, list[Path]]:
    """(exit code, the workdirs of the trainings): trains those that are not there. For experiments that have no rows."""
    folder, trainings = open_workdir(config, workdir), list(trainings)
    _compile_into(folder / COMPILED)
    code = Work(folder, [], trainings).train(trainings)
    return code, [folder / training.folder for training in trainings]


class Work:
    """The trainings and evaluations of a workdir: what is done, how long the rest will take."""

    def __init__(self, folder: Path, rows: Sequence[Row], trainings: Sequence[Training] = ()):
        self.folder, self.times = folder, Times(folder / TIMES)
        wanted = unique([*trainings, *(row.training for row in rows if row.training is not None)])
        left = [("training", one.config.train.steps) for one in wanted if not self._is_trained(one)]
        left += [("evaluation", len(names)) for _, names in self._unscored(rows)]
        self.parts = Parts(left)

    def _is_trained(self, training: Training) -> bool:
        done = self.times.parts.get(training.folder, {}).get("finished", False)
        return done and (self.folder / training.folder / "checkpoints").is_dir()

    def _unscored(self, rows: Sequence[Row]) -> list[tuple[list[Row], list[Row]]]:
        """(rows, those without a score) of each evaluation that lacks some."""
        together = {}
        for row in rows:
            together.setdefault(row.folder, {})[row.name] = row
        found = [
            (list(part.values()), [row for row in part.values() if not _is_scored(self.folder, row)])
            for part in together.values()
        ]
        return [(part, left) for part, left in found if left]

    def train(self, trainings: Sequence[Training]) -> int:
        """Trains what is not trained, with what it starts from; returns the exit code."""
        for training in unique(trainings):
            if self._is_trained(training):
                continue
            code = self._train(training)
            if code:
                return code
        return STOPPED if distributed.is_running() and distributed.told_to_stop() else 0

    def _train(self, training: Training) -> int:
        from mend_jax.train import train

        workdir, c = self.folder / training.folder, training.config
        start = "" if training.start is None else str(self.folder / training.start.folder)
        self._begin(f"{c.stage}, seed {c.seed}, {c.train.steps:,} steps, in {workdir}")
        began = time.monotonic()
        code = self.times.run(
            training.folder, lambda: train(with_fields(c, {"prefix.start_from": start}), str(workdir))
        )
        self.parts.end("training", c.train.steps, time.monotonic() - began)
        _release()
        return code

    def score(self, rows: Sequence[Row]) -> None:
        """Scores what is not scored; the evaluations share one LLM."""
        from mend_jax.evaluate import evaluation_layout, load_the_llm

        unscored, loaded = self._unscored(rows), {}
        with distributed.stops_at_sigterm():  # no training follows until the next call
            for part, left in unscored:
                c = left[0].evaluation
                key = json.dumps([c.llm.to_dict(), c.data.bos], sort_keys=True)
                if key not in loaded:
                    loaded[key] = load_the_llm(c, evaluation_layout(c))
                self._begin(f"evaluation of {', '.join(row.name for row in left)}, in {self.folder / part[0].folder}")
                began = time.monotonic()
                self.times.run(part[0].folder, lambda left=left, llm=loaded[key]: self._score(left, llm))
                self.parts.end("evaluation", len(left), time.monotonic() - began)
        if unscored:
            loaded.clear()
            _release()

    def _score(self, rows: list[Row], llm) -> None:
        from mend_jax.evaluate import evaluate

        folder, known = self.folder / rows[0].folder, _methods(self.folder / rows[0].folder)
        c = with_fields(rows[0].evaluation, {"evaluate.methods": tuple(self._spec(row) for row in rows)})
        evaluate(c, str(folder), llm, prints=False, others=known)
        if distributed.is_first():
            add_origins(folder, [row.name for row in rows])

    def _spec(self, row: Row) -> str:
        """The row in evaluate.methods."""
        if row.training is None:
            return row.method
        return f"{row.name}={row.used_as}{':' if row.used_as else ''}{self.folder / row.training.folder}"

    def _begin(self, what: str) -> None:
        say(f"{self.parts.begin()}: {what}")


def _release() -> None:
    """Frees the models of what has ended, which compiled programs hold."""
    import jax

    jax.clear_caches()
    gc.collect()


def _methods(folder: Path) -> dict:
    """The methods of an evaluation that is there; a damaged file has none, and is written again."""
    try:
        return read_scores(folder)["methods"]
    except UserError:
        return {}


def _is_scored(folder: Path, row: Row) -> bool:
    return row.name in _methods(folder / row.folder)


def _compile_into(folder: Path) -> None:
    """Keeps compiled programs there, unless the user keeps them elsewhere."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def say(text: str) -> None:
    if distributed.is_first():
        print(f"== {text}", file=sys.stderr, flush=True)
