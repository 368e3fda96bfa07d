"""What experiments left in a workdir, read back: their head, their rows, their trainings' curves.

A workdir of experiments has <experiment>/experiment.json, evaluations/ and trainings/ (experiments/run.py). A workdir of
`experiments.methods` or of `evaluate` alone is read as one experiment, whose rows are the methods of its scores.json.
"""

import dataclasses
import math
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.experiments import paper
from mend_jax.run.reading import is_inside, read_json
from mend_jax.run.reporting import METRICS, read_lines
from mend_jax.run.sealed import read_sealed
from mend_jax.scoring.answers import Source, read_scores
from mend_jax.scoring.results import SCORES

RESULT = "experiment.json"
DAMAGED = "remove it and run the experiment again, which trains and scores nothing twice"
LONGEST_PATH = 255  # bytes of an evaluation's below the workdir: ours have 30, file systems take 255 of a name
HEAD = ("experiment", "title", "paper", "command", "commit", "machine", "date", "config")
ORDER = (
    "main_table", "methods", "cost", "num_demonstrations", "num_vectors", "perturbations", "retrieval", "ablations", "hyperparameters",
    "templates", "objectives", "many_demonstrations", "order", "domains", "attention",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: its labels, and where the answers of its trainings are."""

    labels: tuple[tuple[str, str], ...]
    sources: list[Source]
    seeds: list[int | None]

    def label(self, name: str) -> str:
        return dict(self.labels).get(name, "")


@dataclasses.dataclass(frozen=True)
class Result:
    """One experiment of a workdir."""

    head: dict  # the fields of HEAD
    rows: list[Row]
    varied: list[str]
    x: str | None
    own: dict  # all of its experiment.json

    @property
    def name(self) -> str:
        return self.head["experiment"]

    @property
    def llm(self) -> str:
        """The LLM's name."""
        return paper.name_of((self.head["config"].get("llm") or {}).get("path", "") or self.own.get("llm", ""))

    @property
    def partition(self) -> str:
        return (self.head["config"].get("data") or {}).get("partition", "")


def read_results(workdir: str | Path) -> list[Result]:
    """The finished experiments of a workdir, in the order of the paper. Raises UserError if there is none or one is damaged."""
    workdir = Path(workdir).expanduser()
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder: name the workdir of experiments.")
    found = [read_result(path) for path in sorted(workdir.glob(f"*/{RESULT}"))]
    for folder in (workdir, workdir / "evaluation"):
        if (folder / SCORES).is_file():
            found.append(_of_evaluation(workdir, folder))
    if not found:
        raise UserError(
            f"{workdir} holds no result: run an experiment first, for example python -m mend_jax.experiments.main_table"
            f" --config=... --workdir={workdir}."
        )
    return sorted(
        found, key=lambda result: (ORDER.index(result.name) if result.name in ORDER else len(ORDER), result.name)
    )


def unfinished(workdir: str | Path) -> list[str]:
    """Folders of a workdir that an experiment has begun, without its result."""
    folders = (path for path in Path(workdir).expanduser().iterdir() if path.is_dir() and path.name in ORDER)
    return sorted(path.name for path in folders if not (path / RESULT).is_file() and path.name != "methods")


def curves(workdir: str | Path) -> dict[str, list[dict]]:
    """{training: the lines of its metrics.jsonl} of all trainings in a workdir."""
    workdir = Path(workdir).expanduser()
    paths = sorted([*workdir.glob(f"trainings/*/{METRICS}"), *workdir.glob(f"*/*/{METRICS}")])
    paths = [path for path in dict.fromkeys(paths) if (path.parent / "config.json").is_file()]
    return {str(path.parent.relative_to(workdir)): read_lines(path) for path in paths}


def read_result(path: Path) -> Result:
    """The experiment of an experiment.json. Raises UserError if it is damaged, or an evaluation that it names is gone."""
    workdir = path.parent.parent
    try:
        own = read_sealed(path, DAMAGED)
        head = {name: own[name] for name in HEAD}
        rows = [
            _Line(tuple(row["labels"].items()), row["training_seed"], row["evaluation"], row["method"])
            for row in own["rows"]
        ]
        varied, x = list(own.get("varied", ())), own.get("x")
        fit = _is_plain(own) and all(row.is_plain() for row in rows)
        fit = fit and all(math.isfinite(float(dict(row.labels)[x])) for row in rows if x is not None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fit = False
    if not fit:
        raise UserError(f"{path} is damaged: {DAMAGED}.")
    grouped: dict[tuple, list[_Line]] = {}
    for row in rows:
        if not (workdir / row.evaluation / SCORES).is_file():
            raise UserError(
                f"{path} names {row.evaluation}, which is not in {workdir}: remove {path} and run the experiment again."
            )
        grouped.setdefault(row.labels, []).append(row)
    made = [
        Row(labels, [Source(workdir / line.evaluation, line.method) for line in lines], [line.seed for line in lines])
        for labels, lines in grouped.items()
    ]
    return Result(head, made, varied, x, own)


def _is_plain(own: dict) -> bool:
    """Whether what is shown of an experiment.json, beside its rows, are texts. Raises AttributeError for what is no object."""
    named = [own["experiment"], own["title"], own.get("llm", ""), *own.get("varied", ())]
    named += [own[name] for name in ("paper", "command", "commit", "machine", "date", "x") if own.get(name) is not None]
    named += [
        (own["config"].get(part) or {}).get(field, "") for part, field in (("llm", "path"), ("data", "partition"))
    ]
    return all(isinstance(text, str) for text in named)


@dataclasses.dataclass(frozen=True)
class _Line:
    """A row of an experiment.json: of one training."""

    labels: tuple[tuple[str, str], ...]
    seed: int | None
    evaluation: str
    method: str

    def is_plain(self) -> bool:
        """Whether all are texts, and the evaluation is one of the workdir's own, not somewhere else."""
        texts = (self.evaluation, self.method, *(text for _, text in self.labels))
        plain = all(isinstance(text, str) for text in texts)
        return plain and is_inside(self.evaluation) and len(self.evaluation.encode()) <= LONGEST_PATH


def _of_evaluation(workdir: Path, folder: Path) -> Result:
    """An evaluation as an experiment."""
    own = read_scores(folder)
    try:
        config = read_json(folder / "config.json", DAMAGED)
    except (OSError, UserError):
        config = {}
    command = "python -m mend_jax." + ("evaluate" if folder == workdir else "experiments.methods")
    head = dict.fromkeys(HEAD) | {"experiment": "methods", "title": "Methods beside each other", "paper": "Table 2"}
    head |= {"command": f"{command} --config=... --workdir={workdir.name}", "config": config}
    rows = [Row((("method", name),), [Source(folder, name)], [None]) for name in own["methods"]]
    return Result(head, rows, ["method"], None, own)
