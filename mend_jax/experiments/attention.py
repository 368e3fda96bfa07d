"""What the LLM's induction heads attend to before an answer (the paper's Figures 5 and 8).

    python -m mend_jax.experiments.attention --config=configs/small_world.py --workdir=runs/experiments
    python -m mend_jax.experiments.attention --config=configs/smollm2_135m.py --workdir=runs/experiments \\
        --config.experiment.methods=icl,mend --config.experiment.trained=mend=runs/mend/finetune

Random sequences, each read twice, show which heads find what followed a token before (the prefix matching score of every layer
and head). For the four best the share of attention is kept that the last token of a test item's input pays to the
demonstrations or vectors, max-pooled to 20 columns, and to the input. The methods are experiment.methods; what they need is
trained, with the first of experiment.training_seeds, or read as experiment.trained says.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.text import markdown
from mend_jax.data.evaluation import load_tasks
from mend_jax.evaluate import evaluation_layout, load_models
from mend_jax.experiments import run, trainings
from mend_jax.llm import heads
from mend_jax.models.families import DecoderConfig, from_hf_config
from mend_jax.models.folders import local_folder
from mend_jax.prefixes.context import bucket
from mend_jax.run.files import write_text
from mend_jax.run.sealed import write_sealed
from mend_jax.scoring.tasks import prefix_maker

TITLE, PAPER = "What induction heads attend to", "Figures 5 and 8"
HEADS, COLUMNS = 4, 20


def main(config, workdir) -> int:
    """Writes <workdir>/attention/experiment.json and prints the best heads; returns a training's exit code if it was stopped."""
    check(config)
    run.open_workdir(config, workdir)
    config, code = with_methods(config, workdir)
    if code:
        return code
    llm, methods = load_models(config, evaluation_layout(config))
    scores, length = induction_scores(config, llm)
    best = best_heads(scores)
    examples = look(config, llm, methods, best)
    report = run.head("attention", TITLE, PAPER, config) | {
        "rows": [],
        "llm": str(config.llm.path),
        "sequence_length": length,
        "by_chance": heads.by_chance(length),
        "scores": scores.tolist(),
        "heads": [{"layer": layer, "head": head, "score": float(scores[layer, head])} for layer, head in best],
        "columns": COLUMNS,
        "examples": examples,
    }
    folder = Path(workdir) / "attention"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / run.TABLE, text(report) + "\n")
    write_sealed(folder / run.ROWS, report, indent=None)
    print(text(report))
    return 0


def check(config) -> None:
    """Raises UserError for an LLM or methods of which there is no attention to a prefix; reads no weights."""
    if not isinstance(from_hf_config(local_folder(config.llm.path)), DecoderConfig):
        raise UserError(f"attention is of decoder-only LLMs, and {config.llm.path} is none: set another llm.path.")
    if not _names(config):
        raise UserError("experiment.methods has nothing that stands before a query: name icl or mend as well.")


def _names(config) -> list[str]:
    return [name for name in config.experiment.methods if name != "zero_shot"]


def with_methods(config, workdir):
    """(the config with the methods to look at in evaluate.methods, exit code of their training)."""
    seed, names = config.experiment.training_seeds[0], _names(config)
    wanted = {name: training for name in names if (training := trainings.of_method(config, name, seed)) is not None}
    code, paths = run.train(config, workdir, list(wanted.values()))
    trained = dict(zip(wanted, paths, strict=True))
    c = config.copy_and_resolve_references().unlock()
    c.evaluate.methods = tuple(f"{name}={trained[name]}" if name in trained else name for name in names)
    return c.lock(), code


def induction_scores(config, llm) -> tuple[np.ndarray, int]:
    """(prefix matching scores (layers,H), tokens of a sequence): the mean over random sequences."""
    c = config.experiment
    sequences = heads.random_sequences(llm, c.attention_sequences, c.attention_length, config.seed)
    with Progress(len(sequences), "sequence", leave=False) as bar:
        found = []
        for tokens in sequences:
            found.append(np.asarray(heads.prefix_matching(llm, llm.params, jnp.asarray(tokens))))
            bar.update()
    return np.mean(found, 0), sequences.shape[1]


def best_heads(scores: np.ndarray, count: int = HEADS) -> list[tuple[int, int]]:
    """(layer, head) of the highest scores, the highest first."""
    order = np.argsort(-scores, axis=None, kind="stable")[:count]
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, scores.shape), strict=True)]


def look(config, llm, methods, best) -> list[dict]:
    """The attention of the heads before the answer to an item of each of several tasks, for every method."""
    tasks, _ = load_tasks(config, llm, config.evaluate.split)
    tasks = [task for task in tasks if task.seed == tasks[0].seed][: config.experiment.attention_items]
    makers = {method.name: prefix_maker(config, llm, method) for method in methods}
    width = bucket(max(len(task.items[0].x_tokens) for task in tasks))
    found = []
    with Progress(len(tasks) * len(makers), "item", leave=False) as bar:
        for task in tasks:
            for name, prefix_of in makers.items():
                found.append({"task": task.task, "seed": task.seed, "item": 0, "method": name})
                found[-1]["heads"] = seen_by(llm, prefix_of(task), task.items[0].x_tokens, width, best)
                bar.update()
    return found


def seen_by(llm, prefix, x, width: int, best) -> list[dict]:
    """For each head {"prefix": its attention to the prefix, max-pooled, "input": to each token of the input, "share": the whole
    of that to the prefix}."""
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(x)] = x
    shares = heads.attention_before_answer(
        llm, llm.params, prefix, jnp.asarray(tokens), jnp.asarray([len(x)], jnp.int32)
    )
    start = llm.before
    end = start + int(prefix.length[0])
    found = []
    for layer, head in best:
        row = np.asarray(shares[layer, head], np.float64)
        before, own = row[start:end], row[end : end + len(x)]
        pooled = pool(before)
        found.append({"prefix": _rounded(pooled), "input": _rounded(own), "share": round(float(before.sum()), 5)})
    return found


def pool(row: np.ndarray, count: int = COLUMNS) -> np.ndarray:
    """The largest value of each of `count` parts of nearly the same length; a shorter row stays as it is."""
    return np.array([part.max() for part in np.array_split(row, min(count, len(row)))])


def text(report: dict) -> str:
    """The best heads and what they attend to, for a terminal."""
    methods = list(dict.fromkeys(example["method"] for example in report["examples"]))
    rows = [["layer", "head", "prefix matching", *(f"to {name}'s prefix" for name in methods)]]
    for number, head in enumerate(report["heads"]):
        shares = [
            np.mean([e["heads"][number]["share"] for e in report["examples"] if e["method"] == name])
            for name in methods
        ]
        rows.append(
            [str(head["layer"]), str(head["head"]), f"{head['score']:.3f}", *(f"{share:.3f}" for share in shares)]
        )
    chance = f"A head that attends to all tokens alike scores {report['by_chance']:.4f}."
    return f"{markdown(rows[0], rows[1:])}\n\n{chance}"


def _rounded(values) -> list[float]:
    return [round(float(value), 5) for value in values]


if __name__ == "__main__":
    from mend_jax.cli.command_line import run as run_command

    run_command(main, keeps=True)  # the trainings
