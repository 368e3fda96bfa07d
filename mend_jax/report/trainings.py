"""The trainings of a workdir: the curves of each, and what it is called after the rows that use it.

A row of experiment.json names its method in the evaluation `mend-1a2b3c4d`: the last part is the key of its training, whose folder is
trainings/finetune-1a2b3c4d (experiments/table.py). `experiments.methods` has METHOD/STAGE.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.report.names import joined
from mend_jax.report.results import Result, Row, curves
from mend_jax.run.reading import read_json

PRETRAINING = "pretrain"  # the stage
Found = dict[str, tuple[str, list[dict]]]  # {training: (its name, the lines of its metrics.jsonl)}


def read_trainings(workdir: str | Path, results: Sequence[Result]) -> dict[str, Found]:
    """{stage: trainings} of a workdir, in the order of the rows that use them."""
    workdir = Path(workdir).expanduser()
    found = curves(workdir)
    names = training_names(workdir, results, found)
    stages: dict[str, Found] = {}
    for training in sorted(found, key=list(names).index):
        stages.setdefault(_stage(training), {})[training] = names[training], found[training]
    return stages


def training_names(workdir: Path, results: Sequence[Result], trainings: Sequence[str]) -> dict[str, str]:
    """{training: name}, each name once: method, the labels in which it differs from other trainings, seed."""
    used = _used_labels(results)
    configs = {training: _config(workdir / training) for training in trainings}
    labels = {one: used[key] for key in used for one in trainings if one.endswith(f"-{key}")}
    names = {one: joined([*own, _seed(configs[one])]) for one, own in labels.items()}
    for training in sorted(labels, key=lambda one: len(labels[one])):
        start = _start(configs[training], trainings)
        if start:
            names.setdefault(start, f"pretraining of {joined([*labels[training], _seed(configs[start])])}")
    for training in trainings:
        names.setdefault(training, _name_of_its_folder(training))
    many = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {one: f"{name} ({one.split('-')[-1]})" if name in many else name for one, name in names.items()}


def _used_labels(results: Sequence[Result]) -> dict[str, list[tuple[str, str]]]:
    """{key of a training: its labels}, of the experiment in which it needs the fewest: one for many rows says least of them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for result in results:
        for key, rows in _by_training(result.rows):
            labels = _own_labels(rows, result.rows)
            if key not in found or len(labels) < len(found[key]):
                found[key] = labels
    return found


def _by_training(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    parts: dict[str, list[Row]] = {}
    for row in rows:
        for source in row.sources:
            if "-" in source.method:
                parts.setdefault(source.method.rsplit("-", 1)[1], []).append(row)
    yield from parts.items()


def _own_labels(rows: Sequence[Row], every: Sequence[Row]) -> list[tuple[str, str]]:
    """The method, and the labels that all rows of a training share and not all of the experiment's trained rows do."""
    method = rows[0].label("method") or rows[0].sources[0].method.split("-")[0]
    trained = [row for row in every if row.seeds != [None]] or every
    own = [("method", method)]
    for name, value in rows[0].labels:
        differs = len({row.label(name) for row in trained}) > 1
        if name != "method" and differs and all(row.label(name) == value for row in rows):
            own.append((name, value))
    return own


def _config(folder: Path) -> dict:
    """The config of a training; one that cannot be read has no fields."""
    try:
        found = read_json(folder / "config.json", "its training is shown without a name")
    except (OSError, UserError):
        return {}
    return found if isinstance(found, dict) else {}


def _seed(config: dict) -> tuple[str, str]:
    return "seed", str(config.get("seed", ""))


def _start(config: dict, trainings: Sequence[str]) -> str | None:
    """The training that another began with."""
    prefix = config.get("prefix")
    start = str(prefix.get("start_from") or "") if isinstance(prefix, dict) else ""
    return next((one for one in trainings if start and Path(start).parts[-2:] == Path(one).parts[-2:]), None)


def _stage(training: str) -> str:
    return training.split("/")[-1].split("-")[0]  # "finetune-1a2b3c4d" of experiments, "mend/finetune" of methods


def _name_of_its_folder(training: str) -> str:
    """Of a training that no finished experiment uses."""
    folder, _, stage = training.rpartition("/")
    if folder == "trainings":
        return f"{stage}, of no finished experiment"
    name = joined([("method", folder)])
    return f"pretraining of {name}" if stage == PRETRAINING else name
