"""Several workdirs of experiments read as one: their config, their evaluations, the rows of an experiment. Nothing is written."""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import dotted_fields
from mend_jax.experiments.run import CONFIG, may_change
from mend_jax.experiments.variants import nested
from mend_jax.report.results import RESULT, read_result
from mend_jax.run.resume import defaults
from mend_jax.run.sealed import read_sealed
from mend_jax.scoring.answers import Read, Source, differing, read_answers, read_scores

ALONE = "name only workdirs of one comparison"


class Evaluation(NamedTuple):
    """One evaluation, whose methods were scored in several workdirs."""

    scores: dict  # as in scores.json, with all methods
    answers: dict[str, tuple[Path, Read]]  # {method: (the evaluation's folder that is taken, what was answered)}


def in_one_order(lists: Iterable[Sequence]) -> list:
    """Everything that is in any of the lists, once: as in the longest, what that lacks behind it."""
    return list(dict.fromkeys(itertools.chain(*sorted(lists, key=len, reverse=True))))


def united_config(configs: dict[Path, dict]) -> dict:
    """The config of {workdir: its own}: the first's, with every value of the lists of its section `experiment`, such as the seeds.

    Raises UserError where they differ in what the experiments of one workdir have in common.
    """
    fields = {folder: defaults() | dotted_fields(config) for folder, config in configs.items()}
    (first, made), *others = fields.items()
    for name in sorted(set().union(*fields.values())):
        for folder, own in others:
            if not may_change(name) and own.get(name) != made.get(name):
                there, here = (json.dumps(one.get(name)) for one in (made, own))
                raise UserError(f"{first} was made with {name}={there}, {folder} with {here}: {ALONE}.")
        values = [own[name] for own in fields.values() if name in own]
        if name.startswith("experiment.") and all(isinstance(value, list) for value in values):
            made = made | {name: in_one_order(values)}
    return nested(made).to_dict()


def read_configs(folders: Sequence[Path]) -> dict[Path, dict]:
    """{workdir: its experiments.json}. Raises UserError for a folder of something else."""
    found = {}
    for folder in folders:
        try:
            found[folder] = read_sealed(folder / CONFIG, "restore it, or leave this workdir out")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} is no workdir of experiments, it has no {CONFIG}: name others.") from None
    return found


def united_evaluation(folders: Sequence[Path]) -> Evaluation:
    """Of the folders of one evaluation in several workdirs.

    Raises UserError where they were made with other settings or of other test items, and for a method with other answers in one than
    in another: two trainings of one seed, for example, of different machines.
    """
    every = {folder: read_scores(folder) for folder in folders}
    answers, facts = {}, {}
    for folder, scores in every.items():
        for method in scores["methods"]:
            read = read_answers(Source(folder, method), scores)
            facts[f"{method} in {folder}"] = read.facts
            taken, known = answers.setdefault(method, (folder, read))
            if count := _others(known, read):
                raise UserError(
                    f"{count} answers of {method} in {folder} are not those in {taken}, so it is not the same: {ALONE}, each"
                    " training and each untrained method scored in one of them."
                )
    if differs := differing(facts):
        raise UserError(f"One evaluation was made with {differs[0]}: {ALONE}.")
    (first, scores), *others = every.items()
    for folder, other in others:
        if name := next((name for name in scores if name != "methods" and scores[name] != other.get(name)), None):
            raise UserError(f"{first} and {folder} have another {name} in their scores: {ALONE}.")
    names = in_one_order([list(one["methods"]) for one in every.values()])
    return Evaluation(scores | {"methods": {name: every[answers[name][0]]["methods"][name] for name in names}}, answers)


def united_result(name: str, folders: Sequence[Path]) -> dict | None:
    """The experiment.json of an experiment with the rows of all workdirs that have finished it, the trainings of a row together;
    without what says where it was made. None where its results are no rows, as those of `cost`, and more than one workdir has it.

    Raises UserError for a damaged one, and for a row that is of another evaluation in one workdir than in another.
    """
    own = {folder: read_result(folder / name / RESULT).own for folder in folders if (folder / name / RESULT).is_file()}
    (first, made), *others = own.items()
    if not made["rows"]:
        return None if others else made
    for folder, other in others:
        if (made.get("varied"), made.get("x")) != (other.get("varied"), other.get("x")):
            raise UserError(f"{first / name} and {folder / name} vary different things: {ALONE}.")
    rows: dict[tuple, dict[tuple, tuple[Path, dict]]] = {}
    order = in_one_order([[tuple(row["labels"].items()) for row in one["rows"]] for one in own.values()])
    for folder, one in own.items():
        for row in one["rows"]:
            rows.setdefault(tuple(row["labels"].items()), {}).setdefault(_training(row), (folder, row))
    for of_labels in rows.values():
        _require_one_evaluation(name, list(of_labels.values()))
    together = [row for labels in order for _, row in sorted(rows[labels].values(), key=lambda one: _seed(one[1]))]
    return made | {"rows": together, "config": united_config({folder: one["config"] for folder, one in own.items()})}


def _training(row: dict) -> tuple:
    return row["evaluation"], row["method"]


def _seed(row: dict) -> Any:
    return -1 if row["training_seed"] is None else row["training_seed"]


def _require_one_evaluation(name: str, rows: Sequence[tuple[Path, dict]]) -> None:
    (first, row), *others = rows
    for folder, other in others:
        if row["evaluation"] != other["evaluation"]:
            labels = ", ".join(f"{label} {value}" for label, value in row["labels"].items())
            places = " and ".join(str(where / one["evaluation"]) for where, one in ((first, row), (folder, other)))
            raise UserError(
                f"The row {labels} of {name} was scored with different settings in {places} (see their config.json): {ALONE}."
            )


def _others(one: Read, other: Read) -> int:
    """How many items were answered otherwise, or are not the same."""
    if one is other:
        return 0
    seeds = {(task, seed) for read in (one, other) for task, of_task in read.lines.items() for seed in of_task}
    pairs = (tuple(read.lines.get(task, {}).get(seed, []) for read in (one, other)) for task, seed in seeds)
    return sum(
        abs(len(a) - len(b)) + sum(_answer(x) != _answer(y) for x, y in zip(a, b, strict=False)) for a, b in pairs
    )


def _answer(line: dict) -> tuple:
    """Without the scores, whose last digits depend on the machine."""
    return line["prediction"], line["gold"], line["options"]
