"""Merge: unites workdirs of experiments, such as seeds that were trained on different machines, in a new one.

    python -m mend_jax.experiments.main_table --config=configs/gemma3_270m.py --workdir=runs/seed0 "--config.experiment.training_seeds=(0,)"
    python -m mend_jax.experiments.main_table --config=configs/gemma3_270m.py --workdir=runs/seed1 "--config.experiment.training_seeds=(1,)"
    python -m mend_jax.experiments.merge runs/both runs/seed0 runs/seed1
    python -m mend_jax.experiments.report runs/both

The workdirs stay as they are. The new one has the records of their trainings, their evaluations with all answers, packed, and the
tables of their experiments, in which a row has the trainings of all of them.
"""

import contextlib
import gzip
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.experiments.methods import Times
from mend_jax.experiments.run import CONFIG, TIMES
from mend_jax.experiments.united import (
    Evaluation,
    read_configs,
    united_config,
    united_evaluation,
    united_result,
)
from mend_jax.experiments.written import ORIGINS, head, origins, origins_of, write_content
from mend_jax.report.results import RESULT
from mend_jax.run.files import is_disk_full, whole_folder, write_json
from mend_jax.run.reading import PACKED
from mend_jax.run.saved_config import CONFIG as OWN_CONFIG
from mend_jax.run.sealed import write_sealed
from mend_jax.scoring.results import SCORES, write_results

TRAININGS, EVALUATIONS = "trainings", "evaluations"


def merge(out: str, workdirs: list[str], /, weights: bool = False) -> None:
    """Unites workdirs of experiments and prints the tables of their experiments.

    Args:
        out: the new workdir.
        workdirs: the workdirs of experiments.
        weights: the trainings' checkpoints are copied as well: with them the experiments can go on in the new workdir.
    """
    target, folders = Path(out).expanduser().absolute(), _folders(workdirs)
    if target.exists():
        raise UserError(f"{target} is there already: name a new folder.")
    if inside := next((folder for folder in folders if folder in target.parents), None):
        raise UserError(f"{target} is inside {inside}, which stays as it is: name a folder elsewhere.")
    config = united_config(read_configs(folders))
    with _writable(target), whole_folder(target, sync=False) as made:
        write_sealed(made / CONFIG, config, sort_keys=True)
        taken = _copy_trainings(made, folders, weights)
        write_json(made / TIMES, _times(folders) | {name: part for name, part in taken.items() if part})
        evaluations = _write_evaluations(made, folders)
        tables = list(_write_results(made, folders, evaluations))
    print("\n\n".join([*tables, f"{target} holds {len(taken)} trainings and {len(evaluations)} evaluations."]))


def _folders(workdirs: list[str]) -> list[Path]:
    folders = [Path(folder).expanduser().absolute() for folder in workdirs]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise UserError(f"{twice} is named twice: name each workdir once.")
    return folders


@contextlib.contextmanager
def _writable(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "its disk is full" if is_disk_full(error) else error.strerror
        raise UserError(f"{target} cannot be written ({what}): name a folder elsewhere.") from error


def _places(folders: Sequence[Path], inside: str, holds: str) -> dict[str, list[Path]]:
    """{name: the folders of that name inside the workdirs' folder `inside`} of those that hold a file."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted((folder / inside).glob(f"*/{holds}")):
            found.setdefault(path.parent.name, []).append(path.parent)
    return found


def _copy_trainings(made: Path, folders: Sequence[Path], weights: bool) -> dict[str, dict]:
    """Copies the trainings, one that has ended rather than one that has not; returns {training: its part of times.json, if it has one}."""
    taken = {}
    for name, places in _places(folders, TRAININGS, OWN_CONFIG).items():
        key = f"{TRAININGS}/{name}"
        parts = [Times(place.parents[1] / TIMES).parts.get(key, {}) for place in places]
        place, part = max(zip(places, parts, strict=True), key=lambda one: one[1].get("finished", False))
        if not part.get("finished"):
            _say(f"{place} has not ended: what it has reached is copied.")
        if weights:
            shutil.copytree(place, made / key, ignore=shutil.ignore_patterns(".*"))
        else:
            _copy_files(place, made / key)
        taken[key] = part
    return taken


def _copy_files(place: Path, target: Path) -> None:
    """The files of a folder, without those of folders in it and locks."""
    target.mkdir(parents=True)
    for file in place.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy2(file, target / file.name)


def _times(folders: Sequence[Path]) -> dict[str, dict]:
    """{part: its time}; of one that several workdirs have the time of all, since each has scored methods of its own."""
    found: dict[str, dict] = {}
    for folder in folders:
        for name, part in Times(folder / TIMES).parts.items():
            before = found.get(name, {"seconds": 0, "finished": True})
            ended = before["finished"] and part["finished"]
            found[name] = {"seconds": round(before["seconds"] + part["seconds"], 1), "finished": ended}
    return found


def _write_evaluations(made: Path, folders: Sequence[Path]) -> dict[str, dict]:
    """{an evaluation's folder: its methods}."""
    found, written = _places(folders, EVALUATIONS, SCORES), {}
    with Progress(len(found), "evaluation", leave=False) as bar:
        for name, places in found.items():
            evaluation, there = united_evaluation(places), made / EVALUATIONS / name
            there.mkdir(parents=True)
            _copy_answers(there, evaluation)
            if (places[0] / OWN_CONFIG).is_file():
                shutil.copy2(places[0] / OWN_CONFIG, there)
            scored = {method: origins(place).get(method) for method, (place, _) in evaluation.answers.items()}
            write_json(there / ORIGINS, {method: one for method, one in scored.items() if one})
            write_results(there, evaluation.scores)
            written[f"{EVALUATIONS}/{name}"] = evaluation.scores["methods"]
            bar.update()
    return written


def _copy_answers(there: Path, evaluation: Evaluation) -> None:
    """The predictions, packed: each line repeats the options."""
    for _, read in evaluation.answers.values():
        target = there / "predictions" / read.folder.name
        _copy_files(read.folder, target)
        for file in target.glob("*.jsonl"):
            with open(f"{file}{PACKED}", "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
                packed.write(file.read_bytes())
            file.unlink()


def _write_results(made: Path, folders: Sequence[Path], evaluations: dict[str, dict]) -> Iterator[str]:
    """The table of each experiment with its title, after it is written."""
    for name, places in _places(folders, ".", RESULT).items():
        if lacks := [str(folder) for folder in folders if folder / name not in places]:
            _say(f"{name} is not finished in {', '.join(lacks)}: none of its rows are from there.")
        content = united_result(name, folders)
        if content is None or not content["rows"]:
            which = f", that of {places[0].parent} alone" if content is None else ""
            _say(f"{name} has no rows to unite: it is copied as it is{which}.")
            _copy_files(places[0], made / name)
            continue
        (made / name).mkdir()
        about = head(
            name, content["title"], content["paper"], ConfigDict(content["config"]), origins_of(made, content["rows"])
        )
        yield f"{content['title']}\n\n{write_content(made / name, content | about, evaluations)}"


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(merge)
