"""A section of the report for each experiment: its tables and figures, and what made it."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.text import number, size
from mend_jax.experiments import paper
from mend_jax.report.figures import Bar, Drawing, bars, heatmaps, lines
from mend_jax.report.results import Result, curves
from mend_jax.report.tables import Scored, Table, main_tables, score_figure, scored_rows

REGIMES = {"a": "(a) every option reads the prefix", "b": "(b) once a query", "c": "(c) once for all queries"}
METHODS = {"zero_shot": "zero-shot", "prompt_tuning": "PromptTuning", "icl": "Vanilla ICL", "mend": "MEND"}
MOST = 8  # curves of one figure: more could not be told apart
INPUT = 12  # tokens of an input that a map of attention shows at most, its last ones


@dataclasses.dataclass(frozen=True)
class Section:
    """What stands below one heading."""

    name: str
    title: str
    paper: str
    made: list[tuple[str, str]]  # what made it: command, LLM, commit, machine, date
    config: str
    notes: list[str]
    tables: list[Table]
    drawings: list[Drawing]


def section_of(result: Result) -> Section:
    """The section of an experiment's result."""
    own = {"cost": _cost, "attention": _attention}.get(result.name)
    tables, drawings, notes = _scores(result) if own is None else _own_section(own, result)
    head = result.head
    made = {name: head[name] for name in ("command", "commit", "machine", "date")}
    made |= {"LLM": (head["config"].get("llm") or {}).get("path"), "partition": result.partition}
    facts = [(name, str(value)) for name, value in made.items() if value]
    config = json.dumps(head["config"], indent=1, sort_keys=True)
    return Section(result.name, head["title"], head["paper"] or "", facts, config, notes, tables, drawings)


def trainings_section(workdir: str | Path) -> Section | None:
    """The losses and validation scores of all trainings of a workdir; None without one."""
    found, drawings = curves(workdir), []
    stages: dict[str, dict[str, list[dict]]] = {}
    for training, lines_of in found.items():
        stage = training.split("/")[-1].split("-")[0]  # "finetune-1a2b3c4d" of experiments, "mend/finetune" of methods
        stages.setdefault(stage, {})[training.removeprefix("trainings/")] = lines_of
    for stage, trainings in stages.items():
        for metric, (title, unit) in {
            "loss": ("Loss", "loss"),
            "dev_score": ("Validation score", "score x 100"),
        }.items():
            series = {training: _points(of, metric) for training, of in trainings.items()}
            series = {training: points for training, points in series.items() if len(points) > 1}
            parts = range(0, len(series), MOST)
            for start in parts:
                name = f"training_{stage}_{metric}" + (f"_{start // MOST + 1}" if len(parts) > 1 else "")
                part = dict(list(series.items())[start : start + MOST])
                drawings.append(lines(name, f"{title} in training, stage {stage}.", part, "step", unit))
    if not drawings:
        return None
    return Section(
        "trainings", "Trainings", "", [], "", [f"{len(found)} training{'s' * (len(found) != 1)}."], [], drawings
    )


def _points(found: Sequence[dict], name: str) -> list[tuple[float, float]]:
    """The (step, value) pairs of a metric; of more than 200, means of neighbours."""
    points = [(line["step"], line[name] * (100 if name == "dev_score" else 1)) for line in found if name in line]
    parts = np.array_split(np.array(points, float), min(len(points), 200)) if points else []
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def _scores(result: Result) -> tuple[list[Table], list[Drawing], list[str]]:
    rows = scored_rows(result)
    drawings, tables = [score_figure(result, rows)], main_tables(result, rows)
    if result.name == "hyperparameters":
        drawings += rank_figures(rows)
    seeds = sorted({seed for one in rows for seed in one.row.seeds if seed is not None})
    studies = {id(one.study): one.study for one in rows}.values()
    items = sorted({sum(task.items for task in study.tasks) for study in studies})
    counts = sorted({len(study.tasks) for study in studies})
    text = f"{_range(counts)} tasks, {_range(items)} test items in all."
    text += f" Training seeds {', '.join(map(str, seeds))}." if seeds else ""
    return tables, drawings, [text]


def rank_figures(rows: Sequence[Scored]) -> list[Drawing]:
    """For each hyperparameter the average rank of its values over tasks, as the paper's Figures 6 and 7; 1 is the best."""
    found = []
    for name in dict.fromkeys(one.row.label("hyperparameter") for one in rows):
        own = [one for one in rows if one.row.label("hyperparameter") == name]
        if len(own) < 2 or len({len(one.study.tasks) for one in own}) > 1:
            continue
        ranks = np.mean([_ranks(np.array(scores)) for scores in zip(*(one.draws.mean for one in own), strict=True)], 0)
        values = [
            Bar(f"{name} = {one.row.label('value')}", "rank", float(rank)) for one, rank in zip(own, ranks, strict=True)
        ]
        caption = f"Average rank over tasks of the values of {name}; 1 is the best."
        found.append(bars(f"hyperparameters_rank_{name}", caption, values, "average rank"))
    return found


def _own_section(make: Callable, result: Result) -> tuple[list[Table], list[Drawing], list[str]]:
    """Of an experiment with numbers of its own. Raises UserError where its file lacks some: older ones hold no checksum."""
    try:
        return make(result)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"The result of {result.name} is damaged ({type(error).__name__}: {error}): remove its experiment.json and run the"
            " experiment again."
        ) from error


def _cost(result: Result) -> tuple[list[Table], list[Drawing], list[str]]:
    costs, ratios = result.own["costs"], result.own["ratios"]
    header = ["LLM", "task", "demonstration tokens", "method", "queries a pass"]
    header += [f"TFLOP/query {r}" for r in ("(a)", "(b)", "(c)")] + ["TFLOP once (c)", "compiler's count"]
    header += [f"peak {r}" for r in ("(a)", "(b)", "(c)")] + ["K/V cache", "stored"]
    header += (
        [f"s/query {r}" for r in ("(a)", "(b)", "(c)")]
        + ["s once (c)", "of them distilling"]
        + [f"MEND pays from query {r}" for r in ("(a)", "(b)", "(c)")]
    )
    tables = [
        Table("cost", "Cost of a query, by method and regime", header, [_cost_cells(row) for row in costs], folded=True)
    ]
    drawings = []
    if ratios:
        names = ("paper", "as_the_paper_counts", "ours", "ours_to_the_papers_icl")
        head = ["LLM", "task", "paper", "counted as the paper", "as computed here", "here, over the paper's ICL"]
        lines_ = [[row["llm"], row["task"], *(f"{row[name]:.3f}" for name in names)] for row in ratios]
        tables.insert(0, Table("cost_ratios", "FLOPs of MEND over Vanilla ICL, regime (a)", head, lines_))
    fewest = min((row["rows"] for row in costs), default=1)  # FLOPs of a query are the same with more to a pass
    sets = dict.fromkeys((row["llm"], "the paper" if row["lengths"] == "the paper" else "here") for row in costs)
    for llm, of in sets:
        own = [
            r
            for r in costs
            if r["llm"] == llm and r["rows"] == fewest and (r["lengths"] == "the paper") == (of == "the paper")
        ]
        drawings += [_flops_figure(own, llm, of, regime) for regime in ("a", "c")]
    notes = [
        "Regimes: "
        + "; ".join(REGIMES.values())
        + ". MEND's distillation is in every number: in (a) and (b) with each query, in (c)"
        " once. It pays from the query at which it has needed no more FLOPs than Vanilla ICL, its vectors made once and kept.",
        "FLOPs by formula, as the programs compute them; the compiler's count differs by the share given. Peak memory is the"
        " compiler's, of the program that needs most, weights included. docs/statistics.md says how each number is made.",
    ]
    return tables, drawings, notes


def _flops_figure(own: list[dict], llm: str, lengths: str, regime: str) -> Drawing:
    values = [Bar(r["name"], METHODS[r["method"]], r["flops"][regime]["query"] / 1e12) for r in own]
    figures = paper.FIGURE_3.get(llm) if lengths == "the paper" and regime == "a" else None
    caption = (
        f"{llm}, {lengths}'s lengths: TFLOP of a query {REGIMES[regime]}."
        if lengths == "the paper"
        else (f"{llm}, the mean lengths of the partitions here: TFLOP of a query {REGIMES[regime]}.")
    )
    if figures:
        caption += " Vanilla ICL and MEND of the paper's Figure 3 stand beside."
        for task, (icl, _, mend) in figures.items():
            values += [Bar(task, "Vanilla ICL, paper", icl), Bar(task, "MEND, paper", mend)]
    name = f"cost_{llm}_{lengths.split()[-1]}_{regime}".replace("/", "_")
    heights = [bar.value for bar in values]
    return bars(name, caption, values, "TFLOP per query", log=max(heights) > 20 * min(heights) > 0)


def _cost_cells(row: dict) -> list[str]:
    flops, seconds, pays = row["flops"], row.get("seconds"), row.get("pays_from")
    counted = row.get("compilers_flops")
    off = ""
    if counted:
        pairs = [(counted[r][part], flops[r][part]) for r in REGIMES for part in ("once", "query") if flops[r][part]]
        off = f"within {max(abs(a / b - 1) for a, b in pairs):.1%}"
    cells = [row["llm"], row["name"], str(row["demos"]), METHODS[row["method"]], str(row["rows"])]
    cells += [number(flops[r]["query"] / 1e12) for r in REGIMES] + [number(flops["c"]["once"] / 1e12), off]
    cells += [size(row["peak_bytes"][r]) for r in REGIMES] + [size(row["cache"]), size(row["stored"])]
    cells += [number(seconds[r]["query"]) for r in REGIMES] + [number(seconds["c"]["once"])] if seconds else [""] * 4
    cells += [number(made) if (made := row.get("distil_seconds")) else ""]
    return cells + (["never" if pays[r] is None else f"{pays[r]:,}" for r in REGIMES] if pays else [""] * 3)


def _attention(result: Result) -> tuple[list[Table], list[Drawing], list[str]]:
    own, found = result.own, result.own["heads"]
    names = [f"layer {head['layer']}, head {head['head']}" for head in found]
    scores, marks = np.array(own["scores"]), [(head["layer"], head["head"]) for head in found]
    caption = (
        f"Prefix matching score of every head; the {len(found)} best are circled. By chance {own['by_chance']:.4f}."
    )
    drawings = [heatmaps("attention_heads", caption, {"": scores}, ("layer", "head"), marks)]
    methods = list(dict.fromkeys(example["method"] for example in own["examples"]))
    for method in methods:
        examples = [example for example in own["examples"] if example["method"] == method]
        maps, boundary = {}, {}
        shown = min(INPUT, max(len(seen["input"]) for example in examples for seen in example["heads"]))
        for i, name in enumerate(names):
            boundary[name] = max(len(example["heads"][i]["prefix"]) for example in examples)
            maps[name] = np.array([_line(example["heads"][i], boundary[name], shown) for example in examples])
        caption = (
            f"{METHODS.get(method, method)}: attention before the answer, an item of another task in each row; left of the line the"
            f" prefix, max-pooled, right of it the input's last {shown} tokens."
        )
        drawings.append(
            heatmaps(f"attention_{method}", caption, maps, ("item", "prefix, then input"), boundary=boundary)
        )
    header = [
        "layer",
        "head",
        "prefix matching",
        *(f"share of attention to the prefix, {METHODS.get(m, m)}" for m in methods),
    ]
    rows = []
    for i, head in enumerate(found):
        shares = [np.mean([e["heads"][i]["share"] for e in own["examples"] if e["method"] == m]) for m in methods]
        rows.append(
            [str(head["layer"]), str(head["head"]), f"{head['score']:.3f}", *(f"{share:.3f}" for share in shares)]
        )
    notes = [
        f"Random sequences of {own['sequence_length']} tokens, read twice; layers and heads are counted from 0. Many LLMs rest on the"
        " first token they read: with Vanilla ICL it is in the first column."
    ]
    return [Table("attention", "The heads with the highest prefix matching score", header, rows)], drawings, notes


def _line(head: dict, columns: int, shown: int) -> np.ndarray:
    """A row of a map: the pooled prefix, then the input's last tokens, at the right; NaN where it is shorter."""
    prefix, own = head["prefix"], head["input"][-shown:]
    row = np.full(columns + shown, np.nan)
    row[: len(prefix)] = prefix
    row[len(row) - len(own) :] = own
    return row


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _ranks(scores: np.ndarray) -> np.ndarray:
    """The rank (n,) of each of n scores, 1 for the best; equal ones share the mean of their ranks."""
    better = (scores[None] > scores[:, None]).sum(1)
    return better + ((scores[None] == scores[:, None]).sum(1) + 1) / 2
