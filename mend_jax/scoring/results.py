"""The files of an evaluation's workdir: predictions, which are never computed twice, scores.json and table.md.

    config.json                                           the settings of the evaluation
    predictions/<method>-<key>/made_of.json               what the key is a hash of
    predictions/<method>-<key>/<task>_<seed>.jsonl        every item: scores of all options, prediction, gold; .jsonl.gz in what
                                                          `experiments.merge` wrote
    predictions/<method>-<key>/<task>_<seed>.cost.json    prefix length, FLOPs, seconds, and what was read

The key is a hash of everything that decides a prediction (weights, template, split, ...); the content hash in the cost file
is that of the tokens that were read, and its checksum that of the predictions. A file appears complete or not at all, the
predictions last; scores.json holds a checksum of itself. What has changed since it was written is said, and computed again.
"""

import hashlib
import json
import logging
import math
from pathlib import Path

import jax
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.text import in_markdown, markdown, number, shown, size
from mend_jax.run import saved_config, saved_steps
from mend_jax.run.distributed import to_host
from mend_jax.run.files import is_disk_full, write_text
from mend_jax.run.reading import PACKED, Unreadable, parse_json, read_json, read_text
from mend_jax.run.sealed import checksum_of_text, read_sealed, write_sealed
from mend_jax.scoring.metrics import TITLES, percent

AGAIN = "its items are scored again"
SCORES, TABLE = "scores.json", "table.md"
FORMAT = 2  # of the prediction files: a new number makes older files invalid


class Store:
    """The predictions of one method; `written` counts the tasks and seeds that this process added."""

    def __init__(self, workdir, name: str, facts: dict):
        facts = {"format": FORMAT, **facts}
        self.folder = Path(workdir) / "predictions" / f"{name}-{content_hash(facts)[:8]}"
        self.written = 0
        _make(self.folder / "made_of.json", write_text, json.dumps(facts, indent=1) + "\n")

    def read(self, task: str, seed: int, content: str, count: int) -> tuple[list[dict], dict] | None:
        """(lines, cost) of a task and seed if it was completely evaluated on the same content, else None.

        Says where there are some that cannot be believed: those that have changed since they were written.
        """
        found = kept_predictions(self.folder, task, seed)
        if found is None or found[1].get("content") != content or len(found[0]) != count:
            return None
        return found

    def write(self, task: str, seed: int, lines: list[dict], cost: dict) -> None:
        """Stores a complete task and seed; `cost` must have its "content"."""
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder} is gone: someone removed it while it was written; begin the evaluation again."
            )
        self._predictions(task, seed).unlink(missing_ok=True)  # never old predictions beside a new cost
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        _make(self._cost(task, seed), write_sealed, cost | {"predictions": checksum_of_text(text)}, indent=None)
        _make(self._predictions(task, seed), write_text, text)
        self.written += 1

    def _predictions(self, task, seed):
        return _prediction_file(self.folder, task, seed)

    def _cost(self, task, seed):
        return _cost_file(self.folder, task, seed)


def kept_predictions(folder: Path, task: str, seed: int, remedy: str = AGAIN) -> tuple[list[dict], dict] | None:
    """(lines, cost) of a task and seed in a folder of predictions, or None if there are none that can be believed.

    Says where there are some that have changed since they were written; `remedy` is what follows from that.
    """
    path = _prediction_file(folder, task, seed)
    path = path if path.exists() else path.with_name(path.name + PACKED)
    try:
        text, cost = read_text(path, remedy), read_sealed(_cost_file(folder, task, seed), remedy)
        lines = [parse_json(line, dict) for line in text.removesuffix("\n").split("\n")]
    except FileNotFoundError:
        return None
    except UserError as error:
        logging.warning("%s", error)
        return None
    except Unreadable as error:
        logging.warning("%s %s: %s.", path, error, remedy)
        return None
    known = cost.pop("predictions", None)  # older versions of this program wrote none
    if known not in (None, checksum_of_text(text)) or not (_is_cost(cost) and all(map(_is_prediction, lines))):
        logging.warning("%s has changed since it was written: %s.", path, remedy)
        return None
    return lines, cost


def _is_prediction(line: dict) -> bool:
    """Whether a line says what its scores say: of options that score the same, to the digits that are kept, any."""
    scores, options = line.get("scores"), line.get("options")
    if not isinstance(scores, list) or not isinstance(options, list) or not scores or len(scores) != len(options):
        return False
    if not all(type(score) is float and math.isfinite(score) for score in scores):
        return False
    best = [option for option, score in zip(options, scores, strict=True) if score == max(scores)]
    return line.get("prediction") in best and line.get("gold") in options and all(isinstance(o, str) for o in options)


def _is_cost(cost: dict) -> bool:
    """Whether all but the content are numbers; times may be missing."""
    return all(isinstance(value, int | float | None) for name, value in cost.items() if name != "content")


def _prediction_file(folder: Path, task: str, seed: int) -> Path:
    return folder / f"{_file_name(task)}_{seed}.jsonl"


def _cost_file(folder: Path, task: str, seed: int) -> Path:
    return folder / f"{_file_name(task)}_{seed}.cost.json"


def write_config(workdir, config) -> None:
    """Writes the resolved configuration to <workdir>/config.json, unless that file belongs to a training or a model."""
    workdir = Path(workdir)
    if not (workdir / saved_steps.FOLDER).exists() and not _is_models(workdir / saved_config.CONFIG):
        _make(workdir / saved_config.CONFIG, write_text, json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n")


def _is_models(path: Path) -> bool:
    """Whether a config.json is a Hugging Face model's, such as an exported distiller's."""
    try:
        return "model_type" in read_json(path, AGAIN)
    except (OSError, UserError):
        return False


def write_results(workdir, results: dict) -> str:
    """Writes scores.json and table.md; returns the table of the methods, for the terminal."""
    table, workdir = method_table(results), Path(workdir)
    _make(workdir / SCORES, write_sealed, results, ensure_ascii=False)
    _make(workdir / TABLE, write_text, f"{table}\n\n{_notes(results)}\n\n{task_table(results)}\n")
    return table


def add_intervals(workdir, table: str) -> None:
    """Puts the table of intervals (comparisons.py), which is made of the files that are there, behind those of table.md."""
    path = Path(workdir) / TABLE
    text = (
        "Intervals: 95%, over test items and seeds, for these tasks and trainings (docs/statistics.md). The most frequent label"
        " and the random option read nothing. `python -m mend_jax.compare` tests differences."
    )
    _make(path, write_text, f"{path.read_text(encoding='utf-8')}\n{table}\n\n{text}\n")


def method_table(results: dict) -> str:
    """A Markdown table, aligned for a terminal, with a row per method: score, both metrics, prefix length and cost."""
    header = ["method", "score", *TITLES.values(), "prefix length", "KV cache", "GFLOPs/item", "uncached", "ms/item"]
    rows = []
    for name, method in results["methods"].items():
        cost = method["cost"]
        rows.append(
            [name, percent(method["score"]), *(percent(method[metric]) for metric in TITLES)]
            + [f"{cost['prefix_length']:.0f}", size(cost["cache_bytes"])]
            + [
                number(cost["item_flops"] / 1e9),
                number(cost["item_flops_uncached"] / 1e9),
                "–" if cost["item_seconds"] is None else number(1000 * cost["item_seconds"]),
            ]
        )
    return markdown(header, rows)


def task_table(results: dict) -> str:
    """A table with a row per task: its metric and every method's score."""
    methods = results["methods"]
    tasks = next(iter(methods.values()))["per_task"]
    rows = [
        [
            in_markdown(task),
            TITLES[entry["primary"]],
            *(percent(method["per_task"][task]["score"]) for method in methods.values()),
        ]
        for task, entry in tasks.items()
    ]
    return markdown(["task", "metric", *methods], rows)


def tree_hash(params) -> str:
    """A hash of every parameter's name, shape, type and content."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = to_host(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()


def content_hash(content) -> str:
    """A hash of JSON-like content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _notes(results: dict) -> str:
    seeds = ", ".join(str(seed) for seed in results["seeds"])
    tasks = next(iter(results["methods"].values()))["per_task"]
    text = (
        f"{len(tasks)} task{'s' * (len(tasks) != 1)} of `{shown(results['partition']).replace('`', ' ')}` ({results['split']}), seeds {seeds},"
        f" k = {results['k']}."
        " The score is the mean over tasks of Macro-F1 for classification and accuracy for the rest; ± is the sample"
        " standard deviation over seeds. All scores x 100. Prefix length is in positions of the LLM; GFLOPs/item"
        " is the cost of scoring all options of one item after a cached prefix; *uncached* makes and reads the prefix again"
        " for every item; ms/item is the median over the tasks and seeds for which nothing had to be compiled (– if there are"
        " none), with the cache, on the machine that ran it."
    )
    if results["missing_tasks"]:
        text += f"\n\nTasks of the partition without files, left out: {', '.join(map(in_markdown, results['missing_tasks']))}."
    return text


def _file_name(task: str) -> str:
    return task.replace("/", "%2F")


def _make(path: Path, write, *content, **options) -> None:
    """Writes a file, and its folders, with a function of files.py or sealed.py."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, *content, **options)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"The disk of {path.parent} is full: free some space and run the same command again to resume."
            ) from error
        raise UserError(f"{path} cannot be written ({error.strerror}): check the workdir.") from error
