"""Compare: methods of one or several evaluations, with 95% intervals, paired tests and results by task.

    python -m mend_jax.compare runs/quickstart/evaluation
    python -m mend_jax.compare runs/a/evaluation runs/b/evaluation --trainings   # the same methods, trained twice

    python -m mend_jax.compare runs/experiments/perturbations   # the rows of an experiment

Reads the answers that `evaluate` and the experiments left; nothing is computed with an LLM. docs/statistics.md says what
every number means. Methods of the same name in several evaluations are told apart by their folders, or with --trainings are
several trainings of one method, of which the intervals then take account, if they differ in their seed alone. Those of an
experiment's row always are.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.text import shown
from mend_jax.experiments.variants import Settings, apart, described, settings_of
from mend_jax.report.names import method_name
from mend_jax.report.results import RESULT, Row, read_result
from mend_jax.report.studies import joined_labels, pairs_of_rows, row_name, studies_of, varied_labels
from mend_jax.run.files import write_text
from mend_jax.scoring import statistics
from mend_jax.scoring.answers import Source, read_all, read_scores
from mend_jax.scoring.comparisons import Study, method_table, pair_table, pairs_of, task_table
from mend_jax.scoring.likeness import likeness_tables

TRAINING = re.compile("-[0-9a-f]{8}$")  # what an experiment puts behind the name of a method: the key of its training
NOTES = """Intervals are for these tasks: items, sets of demonstrations (seeds) and, where there are several, trainings are drawn
anew. p is of a test that exchanges the answers of two methods to an item, two-sided; by task it is corrected by Holm. "of them
sure" are tasks with p < 0.05 so corrected. "smallest visible" is the difference that so many items would show in four cases of
five. The most frequent label and the random option read nothing. All scores x 100."""


def compare(
    evaluations: list[str],
    /,
    methods: str = "",
    metric: Literal[*statistics.METRICS] = "score",
    trainings: bool = False,
    like: str = "",
    out: str = "",
) -> None:
    """Prints three tables, of methods, of pairs of methods, of tasks; of an experiment the first two, for its rows.

    Args:
        evaluations: the workdirs of evaluations, or the folder of one experiment (WORKDIR/NAME).
        methods: the methods to compare, with commas between; empty: all. The table of tasks compares the last with the
            one before it. Of an experiment, values of the first thing that it varies.
        metric: of pairs and tasks: "score" is Macro-F1 for classification and accuracy for the rest.
        trainings: methods of the same name are trainings of one method, where their settings differ in the seed alone; so are
            those of an experiment's evaluation (WORKDIR/evaluations/...), whose names end with the key of their training.
        like: a method, such as icl: two more tables say how closely the others answer as it does. Not of an experiment.
        out: a Markdown file to write the tables to as well.
    """
    experiments = [folder for folder in evaluations if (Path(folder).expanduser() / RESULT).is_file()]
    if experiments and len(evaluations) > 1:
        raise UserError(f"{experiments[0]} is an experiment: compare its rows alone, or evaluations with each other.")
    if experiments and like:
        raise UserError(f"--like={like} needs evaluations: {experiments[0]} is an experiment, see WORKDIR/evaluations.")
    if experiments:
        tables = of_experiment(experiments[0], methods, metric)
    else:
        tables = of_evaluations(evaluations, methods, metric, trainings, like)
    text = "\n\n".join([*tables, " ".join(NOTES.split())])
    print(text)
    if out:
        _write(out, text + "\n")


def of_evaluations(evaluations: list[str], methods: str, metric: str, trainings: bool, like: str = "") -> list[str]:
    """The three tables, and those of `like`."""
    every, notes = together(evaluations) if trainings else (told_apart(evaluations), [])
    sources, read, alike = chosen(every, methods), None, []
    if like:
        reference = chosen(every, like, "--like")
        if len(reference) > 1:
            raise UserError(
                f"--like={like} names {len(reference)} methods: name the one that the others are held against."
            )
        read = read_all({name: own[:1] for name, own in reference.items()} | sources)
        alike = likeness_tables(read, next(iter(reference)))
    study = Study.of(sources, read)
    differs = [f"Evaluated with {one}: a difference may be due to that." for one in study.differs]
    resampled, pairs = study.resampled(metric), pairs_of(list(study.answers))
    found = _compared(study, pairs, resampled, metric)
    last = pairs[-1] if pairs else None
    tables = [method_table(study), *([pair_table(found)] if pairs else [])]
    return [
        *tables,
        task_table(study, metric, resampled, last, found.get(last)),
        *alike,
        *notes,
        *_warnings((*study.warnings, *differs)),
    ]


def of_experiment(folder: str, methods: str, metric: str) -> list[str]:
    """For each set of rows that answered the same items, a table of the rows and one of the pairs that the report tests too."""
    path = Path(folder).expanduser().absolute() / RESULT
    rows = read_result(path).rows
    if not rows or not rows[0].labels:
        raise UserError(f"{path} has no rows with scores: name the folder of an experiment that scores methods.")
    first = rows[0].labels[0][0]
    by_value: dict[str, list[Row]] = {}
    for row in rows:
        by_value.setdefault(row.label(first), []).append(row)
    rows = [row for own in chosen(by_value, methods).values() for row in own]
    labels, tables = varied_labels(rows), []
    for own, study in studies_of(rows):
        titles = {row_name(row): joined_labels(row, labels) for row in own}
        tables.append(method_table(study, titles))
        pairs = [(row_name(one), row_name(other)) for one, other in pairs_of_rows(own)]
        found = _compared(study, pairs, study.resampled(metric), metric)
        if found:
            tables.append(pair_table({(titles[a], titles[b]): one for (a, b), one in found.items()}))
        tables += _warnings(study.warnings)  # what it varies, its labels say
    return tables


def _warnings(sentences: Iterable[str]) -> list[str]:
    return [f"Warning: {shown(sentence)}" for sentence in sentences]


def told_apart(evaluations: list[str]) -> dict[str, list[Source]]:
    """{method: where its answers are} of the workdirs of evaluations, in their order; those of the same name stand beside each other."""
    found, held = {}, _methods_of(evaluations)
    for folder, names in held.items():
        for name in names:
            several = sum(name in others for others in held.values()) > 1
            found[f"{name} in {folder}" if several else name] = [Source(folder, name)]
    return found


def together(evaluations: list[str]) -> tuple[dict[str, list[Source]], list[str]]:
    """({method: where the answers of its trainings are}, notes): trainings whose settings differ in more than the seed are methods of
    their own, named by what differs, and a note says what the others have."""
    found: dict[str, dict[str, tuple[Settings | None, list[Source]]]] = {}
    for folder, names in _methods_of(evaluations).items():
        for name, entry in names.items():
            variants = found.setdefault(TRAINING.sub("", name), {})
            if variants and not entry["path"]:  # what was not trained has no second training
                continue
            settings = settings_of(entry["path"], folder) if entry["path"] else None
            variants.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(Source(folder, name))
    named, notes = {}, []
    for method, variants in found.items():
        labels, usual = apart([settings for settings, _ in variants.values()])
        several = len(set(labels)) > 1
        for label, (_, sources) in zip(labels, variants.values(), strict=True):
            named.setdefault(f"{method}, {label}" if several and label else method, []).extend(sources)
        if several:
            what = f" Where a name does not say it: {described(usual)}." if usual else ""
            notes.append(
                f"Trainings of {method} differ in more than their seed: they are methods of their own here.{what}"
            )
    return named, notes


def _methods_of(evaluations: list[str]) -> dict[Path, dict]:
    folders = dict.fromkeys(Path(folder).expanduser() for folder in evaluations)
    return {folder: read_scores(folder)["methods"] for folder in folders}


def _compared(study: Study, pairs: list[tuple[str, str]], resampled, metric: str) -> dict:
    found = {}
    with Progress(len(pairs), "pair", leave=False) as bar:
        for pair in pairs:
            found[pair] = study.compare(*pair, resampled, metric)
            bar.update()
    return found


def chosen(found: dict, methods: str, flag: str = "--methods") -> dict:
    """The methods that a comma-separated list names, in its order. Raises UserError for others."""
    titles = {method_name(name): name for name in found}  # what the tables call them
    names = [titles.get(name, name) for name in _split(methods, found.keys() | titles.keys())] or list(found)
    for name in names:
        if name not in found:
            raise UserError(f"{flag} names {name!r}, which the evaluations do not have: they have {', '.join(found)}.")
    return {name: found[name] for name in names}


def _split(methods: str, known) -> list[str]:
    """The names in a comma-separated list, some of which may hold a comma themselves ("mend, nested")."""
    parts, names = [part.strip() for part in methods.split(",") if part.strip()], []
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if ", ".join(parts[:n]) in known), 1)
        names.append(", ".join(parts[:count]))
        parts = parts[count:]
    return names


def _write(out: str, text: str) -> None:
    path = Path(out).expanduser()
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another --out.") from None


if __name__ == "__main__":
    run(compare)
