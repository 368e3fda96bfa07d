"""Experiments as data: a title, the paper's table, and a function from a config to rows.

A row is its labels, the training that it needs and the evaluation that scores it; `run.py` does the work. A file of this folder
lists its rows as the table that it makes does.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ml_collections import ConfigDict

from mend_jax.cli.settings import dotted_fields
from mend_jax.experiments.methods import READ_DEMOS
from mend_jax.experiments.trainings import (
    Training,
    all_of_method,
    as_meant_today,
    beside,
    trained_elsewhere,
    with_fields,
)
from mend_jax.run.resume import FREE_FIELDS
from mend_jax.scoring.results import content_hash

# Fields that change no prediction of an evaluation, besides resume.FREE_FIELDS.
NOT_READ = (
    "stage", "seed", "loss.", "optimizer.", "train.", "prefix.", "evaluate.methods", "evaluate.batch_size", "evaluate.parallel",
    "data.text", "data.symbols", "data.beta", "data.queries", "data.max_text_tokens", "data.query_buckets", "data.bucket_window",
    "data.text_share", "data.sequence_length", "data.validation_items", "data.validation_seeds",
)  # fmt: skip
READ = ("prefix.join", "prefix.chunk_demos", "prefix.chunk_tokens", "prefix.dtype")  # but these do


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a table, for one training seed."""

    labels: dict[str, str]  # what is varied: what it is
    method: str  # one of methods.STAGES, or another name for what was trained
    evaluation: ConfigDict  # what `evaluate` is given, but evaluate.methods
    training: Training | None = None
    seed: int | None = None  # of the training
    used_as: str = ""  # "chunked" or "first8", as in evaluate.methods: another use than that of its training

    @property
    def name(self) -> str:
        """Its key among the methods of the evaluation."""
        parts = [self.method, *filter(None, [self.used_as]), *([] if self.training is None else [self.training.key])]
        return "-".join(parts)

    @functools.cached_property
    def folder(self) -> str:
        """Where its evaluation is below the experiments' workdir."""
        return f"evaluations/{evaluation_key(self.evaluation)}"


def evaluation_key(config: ConfigDict) -> str:
    """8 hexadecimal digits, the same for evaluations with the same predictions of a method."""
    fields, other = as_meant_today(dotted_fields(config.to_dict())), (*NOT_READ, *FREE_FIELDS)
    return content_hash({name: value for name, value in fields.items() if name in READ or not name.startswith(other)})[
        :8
    ]


@dataclass(frozen=True)
class Experiment:
    """A table or a figure."""

    name: str  # of its file, and of its folder in the workdir
    title: str
    paper: str  # what it is in the paper, or ""
    rows: Callable[[ConfigDict], list[Row]]
    x: str | None = None  # the label along a curve

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.paper})" if self.paper else self.title


def of_methods(
    config: ConfigDict,
    methods: Sequence[str],
    labels: dict[str, Any],
    fields: dict[str, Any] | None = None,
    trained_with: dict[str, Any] | None = None,
    as_given: bool = False,
) -> list[Row]:
    """A row for each of the methods and training seeds.

    Args:
        config: the experiment's.
        methods: names of methods.STAGES.
        labels: of all rows; "method" is put before them.
        fields: {"section.field": value} of the evaluation instead of the config's.
        trained_with: likewise of the trainings.
        as_given: what experiment.trained names is used as it is, whatever `trained_with` says.
    """
    evaluation, there, rows = with_fields(config, fields or {}), trained_elsewhere(config) if as_given else {}, []
    for method in methods:
        named = {"method": method} | {name: str(value) for name, value in labels.items()}
        own = None if method in there else trained_with
        for seed, training in all_of_method(config, method, own):
            rows.append(Row(named, method, evaluation, training, seed))
    return rows


def settings(config: ConfigDict) -> tuple[str, ...]:
    """The partitions of a table with a column for each."""
    return config.experiment.partitions or (config.data.partition,)


def reading(config: ConfigDict) -> list[str]:
    """The methods of the config that read demonstrations."""
    return [method for method in config.experiment.methods if method in READ_DEMOS]


def of_trainings(
    config: ConfigDict, method: str, labels: dict[str, Any], train: Callable[[int], Training], **more
) -> list[Row]:
    """A row for each training seed of what `train(seed)` is, or, if that was trained elsewhere, for each that experiment.trained names.
    `more`: `fields` of the evaluation, and `used_as`."""
    evaluation = with_fields(config, more.pop("fields", {}))
    named = {name: str(value) for name, value in labels.items()}
    rows = [Row(named, method, evaluation, train(seed), seed, **more) for seed in config.experiment.training_seeds]
    if rows[0].training.config is not None:
        return rows
    return [replace(rows[0], training=training, seed=None) for training in beside(config, rows[0].training)]
