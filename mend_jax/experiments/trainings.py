"""Trainings as data: what an experiment needs trained, and how two of them are known to be the same.

A training is the config of a run of `mend_jax.train` and the training that it starts from. Its key is a hash of both, without what
changes no number, so that every experiment of a workdir finds what another has trained already.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import dotted_fields, nearest
from mend_jax.experiments.methods import STAGES, fields_of, stage_config
from mend_jax.interchange.trained import trained_fingerprint, trained_path
from mend_jax.run import resume
from mend_jax.scoring.results import content_hash

# Fields that are younger than the first keys, with their defaults.
YOUNGER = {
    "prefix.residual": False,
    "prefix.chunk_tokens": 0,
    "data.validation_seeds": (),
    "loss.kd_tokens": "all",
}
PRETRAINING = "pretraining"  # in experiment.trained: what MEND's finetunings begin with
# (stage, weight of L_distill or None for lambda, of L_pred, of L_CLM), as in STAGES.
Stage = tuple[str, float | None, float, float]
RMS, MEASURED = "prefix.rms", -1.0


@dataclass(frozen=True, eq=False)
class Training:
    """A run of `mend_jax.train`."""

    config: ConfigDict | None  # with an empty prefix.start_from; None: it was trained elsewhere
    start: "Training | None" = None  # what it starts from
    elsewhere: str = ""  # the workdir or exported folder of what was trained elsewhere

    @functools.cached_property
    def key(self) -> str:
        """8 hexadecimal digits, the same for trainings with the same result."""
        if self.config is None:  # what is there, which may be trained further: not where it is
            return content_hash(_fingerprint(self.elsewhere, _stamp(self.elsewhere)))[:8]
        fields = as_meant_today(dotted_fields(self.config.to_dict()))
        kept = {name: value for name, value in fields.items() if resume.matters(name, self.config)}
        kept[resume.START] = None if self.start is None else self.start.key
        if fields[RMS] != MEASURED:  # free for a run that goes on, which has its own already
            kept[RMS] = fields[RMS]
        return content_hash(kept)[:8]

    @property
    def folder(self) -> str:
        """Where it is below the experiments' workdir; an absolute path if it was trained elsewhere."""
        return self.elsewhere if self.config is None else f"trainings/{self.config.stage}-{self.key}"

    @property
    def chain(self) -> list["Training"]:
        """What must be trained for it in this workdir, in order, itself last."""
        before = [] if self.start is None else self.start.chain
        return before if self.config is None else [*before, self]


def _stamp(path: str) -> tuple:
    """What changes when something is written to a workdir or exported folder."""
    files = sorted(
        file for pattern in ("*", "checkpoints/*", "checkpoints/*/*.json") for file in Path(path).glob(pattern)
    )
    return tuple((str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files)


@functools.lru_cache
def _fingerprint(path: str, stamp: tuple) -> str:
    """`trained_fingerprint`, which reads all weights: once, though each row of each experiment asks for it."""
    return trained_fingerprint(path)


def as_meant_today(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a key. A value that once meant something else is marked, so that a workdir's older results are not taken for
    it; a younger field with its default is left out, so that they are found."""
    found = fields | ({"evaluate.demos": "the file's, then the pool's"} if fields["evaluate.demos"] == "pool" else {})
    return {name: value for name, value in found.items() if YOUNGER.get(name, ...) != value}


def of_stages(
    config: ConfigDict, stages: list[Stage], seed: int, fields: dict[str, Any] | None = None, start=None
) -> Training:
    """The training of the last of `stages`, each of which starts from the one before it, the first from `start`.

    Args:
        config: the experiment's; it is not changed.
        stages: as in methods.STAGES.
        seed: config.seed of all stages.
        fields: {"section.field": value} that all stages have instead of the config's.
        start: a `Training`, or None.
    """
    for stage, *weights in stages:
        c = with_fields(stage_config(config, stage, *weights), {"seed": seed} | (fields or {}))
        if stage == "pretrain":  # it reads no tasks: one serves every partition
            c = with_fields(c, {"data.tasks": "", "data.partition": ""})
        start = Training(c, start)
    return start


def of_method(config: ConfigDict, method: str, seed: int, fields: dict[str, Any] | None = None) -> Training | None:
    """The last training of one of the paper's methods; None for a method without one.

    What experiment.trained names is used where no `fields` make it another, the first of several: a pretraining where they change
    the finetuning alone.
    """
    there, stages = trained_elsewhere(config), STAGES[method]
    if not stages:
        return None
    if method in there and not fields:
        return there[method][0]
    if own := fields_of(config if fields is None else with_fields(config, fields), method):
        fields = (fields or {}) | own
    if method == "mend" and PRETRAINING in there and _same_pretraining(config, seed, fields):
        return of_stages(config, stages[1:], seed, fields, there[PRETRAINING][0])
    return of_stages(config, stages, seed, fields)


def _same_pretraining(config: ConfigDict, seed: int, fields: dict[str, Any] | None) -> bool:
    first = STAGES["mend"][:1]
    return of_stages(config, first, seed, fields).key == of_stages(config, first, seed).key


def pretraining(config: ConfigDict, seed: int) -> Training:
    """MEND's: L_distill on text."""
    there = trained_elsewhere(config).get(PRETRAINING)
    return of_stages(config, STAGES["mend"][:1], seed) if there is None else there[0]


def all_of_method(
    config: ConfigDict, method: str, fields: dict[str, Any] | None = None
) -> list[tuple[int | None, Training | None]]:
    """(its seed, `of_method`) of each training of a method: those that experiment.trained names, whose seeds are not known here, or
    one for each of experiment.training_seeds; (None, None) for a method without one."""
    if not STAGES[method]:
        return [(None, None)]
    if not fields and (there := trained_elsewhere(config).get(method)):
        return [(None, training) for training in there]
    return [(seed, of_method(config, method, seed, fields)) for seed in config.experiment.training_seeds]


def beside(config: ConfigDict, training: Training) -> list[Training]:
    """All that experiment.trained names for the method of one of its trainings."""
    return next(found for found in trained_elsewhere(config).values() if training.key in {one.key for one in found})


def trained_elsewhere(config: ConfigDict) -> dict[str, list[Training]]:
    """{method or PRETRAINING: trainings} of experiment.trained; of pretrainings one.

    Raises UserError for another form, a folder that is not there or holds no trained model, and for what is named twice.
    """
    found, names = {}, [PRETRAINING, *(method for method in STAGES if STAGES[method])]
    for text in config.experiment.trained:
        name, equals, path = text.partition("=")
        if not equals or name not in names:
            hint = f"did you mean {nearest(name, names)}=...?" if name else "give METHOD=WORKDIR."
            raise UserError(f"experiment.trained holds {text!r}, but its METHOD is one of {', '.join(names)}: {hint}")
        if not trained_path(path).is_dir():
            raise UserError(
                f"experiment.trained names {path} for {name}, which is not a folder: give a training workdir."
            )
        training = Training(None, None, str(trained_path(path).absolute()))
        if name == PRETRAINING and name in found:
            raise UserError(
                f"experiment.trained names two pretrainings, the second in {path}: all finetunings begin with one."
            )
        known = training.key  # as it is now
        if same := next((one for one in found.get(name, ()) if one.key == known), None):
            raise UserError(
                f"experiment.trained names the same training of {name} twice, in {same.elsewhere} and {path}: name it once."
            )
        found.setdefault(name, []).append(training)
    return found


def with_fields(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """A copy of the config with {"section.field": value}."""
    made = config.copy_and_resolve_references().unlock()
    made.update_from_flattened_dict(fields)
    return made.lock()
