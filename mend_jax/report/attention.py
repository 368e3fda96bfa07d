"""What an experiment on attention found: induction heads, and where they look."""

import numpy as np

from mend_jax.report.drawing import Drawing
from mend_jax.report.maps import heatmaps
from mend_jax.report.names import method_name
from mend_jax.report.results import Result
from mend_jax.report.table import Table
from mend_jax.scoring.cells import Cell, text_cell

INPUT = 12  # tokens of an input that a map of attention shows at most, its last ones


def attention_parts(result: Result) -> tuple[list[Table], list[Drawing], list[str]]:
    """Tables, figures and notes."""
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
            f"{method_name(method)}: attention before the answer, an item of another task in each row; left of the line the"
            f" prefix, max-pooled, right of it the input's last {shown} tokens."
        )
        drawings.append(
            heatmaps(f"attention_{method}", caption, maps, ("item", "prefix, then input"), boundary=boundary)
        )
    lines = []
    for i, head in enumerate(found):
        line = [text_cell(what, str(head[what])) for what in ("layer", "head")]
        line.append(_share_cell("prefix matching", head["score"], "prefix_matching"))
        for method in methods:
            share = float(np.mean([e["heads"][i]["share"] for e in own["examples"] if e["method"] == method]))
            title = f"share of attention to the prefix, {method_name(method)}"
            line.append(_share_cell(title, share, f"share_{method}"))
        lines.append(line)
    notes = [
        f"Random sequences of {own['sequence_length']} tokens, read twice; layers and heads are counted from 0. Many LLMs rest on the"
        " first token they read: with Vanilla ICL it is in the first column."
    ]
    title = "The heads with the highest prefix matching score"
    return [Table.of("attention", title, lines, labels=2)], drawings, notes


def _share_cell(title: str, value: float, key: str) -> Cell:
    return Cell(title, f"{value:.3f}", {key: value})


def _line(head: dict, columns: int, shown: int) -> np.ndarray:
    """A row of a map: the pooled prefix, then the input's last tokens, at the right; NaN where it is shorter."""
    prefix, own = head["prefix"], head["input"][-shown:]
    row = np.full(columns + shown, np.nan)
    row[: len(prefix)] = prefix
    row[len(row) - len(own) :] = own
    return row
