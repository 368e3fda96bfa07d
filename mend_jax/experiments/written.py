"""What a finished experiment leaves: experiment.json, and its table, one line for all training seeds of a row."""

import functools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mend_jax.cli.config_files import ROOT
from mend_jax.cli.errors import UserError
from mend_jax.cli.text import markdown, number
from mend_jax.experiments.table import Experiment, Row
from mend_jax.measure.machine import machine
from mend_jax.run.files import write_json, write_text
from mend_jax.run.reading import read_json
from mend_jax.run.sealed import write_sealed
from mend_jax.scoring.metrics import mean_and_std, percent

ROWS, TABLE = "experiment.json", "table.md"
ORIGINS = "origins.json"  # in the folder of an evaluation: what scored each of its methods
UNKNOWN = {"command": "", "commit": "unknown", "machine": "", "date": ""}  # of what an older version scored


def write(
    experiment: Experiment, config: ConfigDict, folder: Path, rows: Sequence[Row], evaluations: dict[str, dict]
) -> None:
    """Writes experiment.json and table.md of a finished experiment below `folder`, and prints the table.

    `evaluations` is that of `printed_table`.
    """
    there = folder / experiment.name
    there.mkdir(exist_ok=True)
    found = [
        {"labels": row.labels, "training_seed": row.seed, "evaluation": row.folder, "method": row.name} for row in rows
    ]
    about = head(experiment.name, experiment.title, experiment.paper, config, origins_of(folder, found))
    content = about | {"rows": found, "varied": list(rows[0].labels), "x": experiment.x}
    print(f"{experiment.heading}\n\n{write_content(there, content, evaluations)}\n", flush=True)


def write_content(folder: Path, content: dict, evaluations: dict[str, dict]) -> str:
    """Writes an experiment's experiment.json and table.md into its own folder; returns the table. Arguments as `printed_table`."""
    table = printed_table(content, evaluations)
    write_text(folder / TABLE, table + "\n")
    write_sealed(folder / ROWS, content)
    return table


def origins_of(workdir: Path, rows: Sequence[dict]) -> list[dict]:
    """What scored each row of an experiment.json."""
    return [origins(workdir / row["evaluation"]).get(row["method"], UNKNOWN) for row in rows]


def head(name: str, title: str, paper: str, config: ConfigDict, scored: Sequence[dict] = ()) -> dict:
    """What every experiment.json begins with. `scored`: the origins of its numbers, which may be older than this command; where
    there are several, the newest's command and machine, and all commits and dates."""
    scored = sorted(scored or [origin()], key=lambda one: one["date"])
    days = [one | {"date": one["date"][:10]} for one in scored]
    every = {
        name: ", ".join(dict.fromkeys(one[name] for one in days if one[name])) or None for name in ("commit", "date")
    }
    return (
        {"experiment": name, "title": title, "paper": paper}
        | scored[-1]
        | every
        | {"config": json.loads(config.to_json())}
    )


def origin() -> dict:
    """What computes now: command, commit, machine and date."""
    here = machine()
    cores = f"{here['cores']} core{'s' * (here['cores'] != 1)} of {here['cpu']}"
    return {
        "command": here["command"],
        "commit": _commit(),
        "machine": f"{cores}, load {here['load_before']:.1f} at the end",
        "date": here["date"],
    }


def add_origins(folder: Path, names: Sequence[str]) -> None:
    """Keeps beside an evaluation what has just scored these methods."""
    write_json(folder / ORIGINS, origins(folder) | dict.fromkeys(names, origin()))


def origins(folder: Path) -> dict[str, dict]:
    """What `add_origins` kept; of a workdir of an older version, or a damaged file, nothing."""
    try:
        found = read_json(folder / ORIGINS, "it is begun anew")
    except (FileNotFoundError, UserError):
        return {}
    here = origin().keys()
    return {name: one for name, one in found.items() if isinstance(one, dict) and one.keys() == here}


@functools.cache
def _commit() -> str | None:
    """The commit of the program, with a + if files differ from it; None where it is no checkout."""
    try:
        asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def printed_table(content: dict, evaluations: dict[str, dict]) -> str:
    """A Markdown table.

    Args:
        content: of experiment.json.
        evaluations: {an evaluation's folder: the methods of its scores.json}.
    Returns:
        A line per row: its labels; the score, ± over the sets of demonstrations (of the mean over trainings); the number of
        trainings and ± over them; the positions of its prefix. Of methods by settings their mean over settings too.
    """
    lines = {}
    for row in content["rows"]:
        lines.setdefault(tuple(row["labels"].values()), []).append(evaluations[row["evaluation"]][row["method"]])
    header = [*content["varied"], "score", "trainings", "± trainings", "prefix length"]
    rows = [[*labels, *_cells(found)] for labels, found in lines.items()]
    return markdown(header, rows + (_averages(lines) if content["varied"] == ["method", "setting"] else []))


def _averages(lines: dict[tuple, list[dict]]) -> list[list[str]]:
    """A line for each method that has all of several settings: their mean, each of the same weight, ± over the seeds."""
    methods, settings = (list(dict.fromkeys(labels[place] for labels in lines)) for place in (0, 1))
    made = []
    for method in methods if len(settings) > 1 else ():
        of_settings = [_of_seeds(lines[method, setting]) for setting in settings if (method, setting) in lines]
        if len(of_settings) < len(settings) or len({tuple(seeds) for seeds in of_settings}) > 1:
            continue
        together = zip(*(seeds.values() for seeds in of_settings), strict=True)
        mean, std = mean_and_std([mean_and_std(scores)[0] for scores in together])
        made.append([method, "mean of settings", percent({"mean": mean, "std": std}), "", "", ""])
    return made


def _cells(found: list[dict]) -> list[str]:
    mean, std = mean_and_std(list(_of_seeds(found).values()))
    _, trained = mean_and_std([one["score"]["mean"] for one in found])
    length = mean_and_std([one["cost"]["prefix_length"] for one in found])[0]
    spread = "" if trained is None else f"{100 * trained:.2f}"
    count = str(len(found)) if found[0]["path"] else ""
    return [percent({"mean": mean, "std": std}), count, spread, number(length)]


def _of_seeds(found: list[dict]) -> dict[str, float]:
    """{seed: score}, the mean over trainings."""
    seeds = found[0]["score"]["per_seed"]
    return {seed: mean_and_std([one["score"]["per_seed"][seed] for one in found])[0] for seed in seeds}
