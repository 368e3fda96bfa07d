"""The answers that an evaluation left on disk, as the numbers that scoring/statistics.py reads.

Axes: T trainings of a method, S seeds, N test items. Evaluations of before this file are read too.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data.bos import NONE
from mend_jax.data.demonstrations import AS_IN_FILES
from mend_jax.run.reading import read_json
from mend_jax.run.sealed import read_sealed
from mend_jax.scoring.metrics import task_scores
from mend_jax.scoring.results import SCORES, kept_predictions
from mend_jax.scoring.statistics import Answers, Task

AGAIN = "run the evaluation again, which scores nothing twice"
# What two evaluations must have in common to be compared, with what it is where an older version, or a usual value, kept nothing;
# None: then it is not known. See `prediction_facts` of evaluate.py.
OF_DEMOS = {"k": None, "max_demo_tokens": None, "release_truncation": None, "shuffle_demos": None, **AS_IN_FILES}
OF_DEMOS |= {"perturb_share": None}
SHARED = {"split": None, "limit": None, "template": None, "max_input_tokens": None, "option_score": "mean"}
SHARED |= {"llm": None, "llm_dtype": None, "llm_weights": None, "bos": NONE, **OF_DEMOS}
Lines = list[dict]  # of one task and seed, as in its predictions file


class Source(NamedTuple):
    """Where the answers of one training of a method are: a method of an evaluation."""

    folder: Path
    method: str


def read_scores(folder: Path) -> dict:
    """The content of an evaluation's scores.json. Raises UserError if it is not there or damaged."""
    path = Path(folder) / SCORES
    if Path(folder).is_file():
        raise UserError(f"{folder} is a file: name the workdir of a finished evaluation.")
    try:
        found = read_sealed(path, AGAIN)
    except FileNotFoundError:
        what = f"has no {SCORES}" if Path(folder).is_dir() else "does not exist"
        raise UserError(
            f"{folder} {what}: name the workdir of a finished evaluation, or the folder of a finished experiment in its workdir."
        ) from None
    if not _is_scores(found):
        raise UserError(f"{path} is damaged: {AGAIN}.")
    return found


def _is_scores(found: dict) -> bool:
    """Whether it has what is read of it; older versions of this program wrote no checksum."""
    try:
        methods, seeds = found["methods"].values(), found["seeds"]
        entries = [entry for method in methods for entry in method["per_task"].values()]
        scores = [entry["score"]["per_seed"][str(seed)] for entry in entries for seed in seeds]
        texts = [*(method["path"] for method in methods), *(entry["primary"] for entry in entries)]
    except (KeyError, TypeError, AttributeError):
        return False
    return all(isinstance(score, int | float) for score in scores) and all(isinstance(text, str) for text in texts)


class Read(NamedTuple):
    """What one training of a method answered."""

    lines: dict[str, dict[int, Lines]]  # {task: {seed: lines}}
    facts: dict  # what decided it, as in made_of.json; without those of demonstrations, if it reads none
    primary: dict[str, str]  # {task: its metric}
    folder: Path  # where the predictions are


def read_answers(source: Source, found: dict | None = None) -> Read:
    """What a method of an evaluation answered, from disk; `found` is its scores.json, if it is already read.

    Raises UserError for a method that the evaluation does not have, or answers that are missing or not those of its scores.
    """
    found = read_scores(source.folder) if found is None else found
    if source.method not in found["methods"]:
        known = ", ".join(found["methods"])
        raise UserError(f"{source.folder} has no method {source.method!r}: it has {known}.")
    entry = found["methods"][source.method]
    for folder, facts in _folders(source):
        lines = _lines_in(folder, entry["per_task"], found["seeds"])
        if lines is not None:
            primary = {task: of_task["primary"] for task, of_task in entry["per_task"].items()}
            return Read(lines, _facts(facts, entry), primary, folder)
    raise UserError(
        f"The predictions of {source.method} in {source.folder} are missing or not those of its {SCORES}: {AGAIN}."
    )


def read_all(sources: Mapping[str, Sequence[Source]]) -> dict[str, list[Read]]:
    """What {method: its trainings} answered. Raises UserError as `read_answers`, and where the trainings of one method were evaluated
    with different settings, which is no mean of trainings."""
    cached = {source.folder: read_scores(source.folder) for trainings in sources.values() for source in trainings}
    read = {
        name: [read_answers(source, cached[source.folder]) for source in trainings]
        for name, trainings in sources.items()
    }
    for name, trainings in sources.items():
        shown = [str(source.folder) for source in trainings]
        if differs := differing(dict(zip(shown, (one.facts for one in read[name]), strict=True))):
            raise UserError(
                f"The trainings of {name} were evaluated with {differs[0]}: evaluate all of them alike, or compare them one by one."
            )
    return read


def differing(facts: Mapping[str, dict]) -> list[str]:
    """For each setting of an evaluation that is not the same everywhere a text, "k=4 (a, b) and k=8 (c)", of {name: facts}."""
    found = []
    for fact, usual in SHARED.items():
        values: dict[str, list[str]] = {}
        for name, own in facts.items():
            if (value := own.get(fact, usual)) is not None:  # an older version may not have kept it
                values.setdefault(f"{fact}={value}", []).append(name)
        if len(values) > 1:
            found.append(" and ".join(f"{value} ({', '.join(names)})" for value, names in values.items()))
    return found


def doubts(sources: Mapping[str, Sequence[Source]], read: Mapping[str, Sequence[Read]]) -> list[str]:
    """Sentences on what a reader of a comparison must know: tasks that are left out, a training that counts twice."""
    everyone = [one.lines for trainings in read.values() for one in trainings]
    left = [task for task in dict.fromkeys(itertools.chain(*everyone)) if not all(task in own for own in everyone)]
    found = [f"Left out, because not all answered them: {', '.join(left)}."] if left else []
    for name, trainings in read.items():
        for (one, first), (other, second) in itertools.combinations(zip(sources[name], trainings, strict=True), 2):
            if first.lines == second.lines:
                places = " and ".join(f"{source.method} in {source.folder}" for source in (one, other))
                found.append(
                    f"Two trainings of {name} have the same score for every option, as the same training has: {places}."
                )
    return found


def numbered(read: Mapping[str, Sequence[Read]]) -> tuple[list[Task], dict[str, Answers]]:
    """(the tasks that all methods answered, each method's answers), of what {method: its trainings} answered.

    Raises UserError if no task was answered by all, with the same seeds, or if two answered different items of it.
    """
    lines = {name: [one.lines for one in trainings] for name, trainings in read.items()}
    primary = {task: metric for trainings in read.values() for one in trainings for task, metric in one.primary.items()}
    everyone = [answers for trainings in lines.values() for answers in trainings]
    names = [task for task in everyone[0] if all(task in answers for answers in everyone)]
    if not names:
        raise UserError(f"No task was answered by all of {', '.join(read)}: compare evaluations of the same tasks.")
    tasks, answers = [], {name: {} for name in read}
    for task in names:
        made, own = _numbered(task, primary[task], lines)
        tasks.append(made)
        for name, rows in own.items():
            answers[name][task] = rows
    return tasks, answers


def _folders(source: Source) -> list[tuple[Path, dict]]:
    """(a folder that may hold a method's predictions, its made_of.json), the latest first."""
    found = []
    for path in (Path(source.folder) / "predictions").glob("*/made_of.json"):
        try:
            facts = read_json(path, AGAIN)
            if facts.get("method") == source.method:
                found.append((path.stat().st_mtime, path.parent, facts))
        except (OSError, UserError):
            continue
    return [(folder, facts) for _, folder, facts in sorted(found, key=lambda one: -one[0])]


def _facts(facts: dict, entry: dict) -> dict:
    """Of a method that read no demonstrations, by its cost, their facts say nothing."""
    cost = entry.get("cost")
    reads = not (isinstance(cost, dict) and cost.get("demo_tokens") == 0)
    return facts if reads else {name: value for name, value in facts.items() if name not in OF_DEMOS}


def _lines_in(folder: Path, scores: dict, seeds) -> dict | None:
    """The lines in a folder of predictions, or None if they are not those of which `scores` were made."""
    found: dict[str, dict[int, Lines]] = {}
    for task, entry in scores.items():
        for seed in seeds:
            kept = kept_predictions(folder, task, seed, AGAIN)
            if kept is None:
                return None
            lines, _ = kept
            pairs = [line["prediction"] for line in lines], [line["gold"] for line in lines]
            expected = entry["score"]["per_seed"][str(seed)]
            if abs(task_scores(*pairs, entry["primary"] == "macro_f1")["score"] - expected) > 1e-9:
                return None
            found.setdefault(task, {})[seed] = lines
    return found


def _numbered(task: str, primary: str, lines: Mapping[str, Sequence[dict]]) -> tuple[Task, dict[str, list[np.ndarray]]]:
    """One task and every method's answers to it, their texts as numbers."""
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(text.strip(), len(numbers))

    first_name, trainings = next(iter(lines.items()))
    first = trainings[0][task]
    golds = [np.array([number(line["gold"]) for line in rows]) for rows in first.values()]
    options = tuple(
        tuple(tuple(dict.fromkeys(number(option) for option in line["options"])) for line in rows)
        for rows in first.values()
    )
    found = {}
    for name, trainings in lines.items():
        rows = []
        for answers in trainings:
            if list(answers[task]) != list(first):
                raise UserError(
                    f"{name} and {first_name} answered {task} with different seeds: evaluate both with the same evaluate.seeds."
                )
            own = list(answers[task].values())
            given = [np.array([number(line["gold"]) for line in of_seed]) for of_seed in own]
            if not all(np.array_equal(a, b) for a, b in zip(given, golds, strict=True)):
                raise UserError(
                    f"{name} and {first_name} answered different items of {task}: evaluate both on the same files with the same"
                    " evaluate.limit."
                )
            rows.append([np.array([number(line["prediction"]) for line in of_seed]) for of_seed in own])
        found[name] = [np.stack(of_seed) for of_seed in zip(*rows, strict=True)]
    return Task(task, primary, tuple(golds), options), found
