"""What an experiment on cost found: FLOPs, bytes and seconds of a query, in three regimes."""

from mend_jax.cli.text import number, size
from mend_jax.experiments import paper
from mend_jax.report.drawing import Bar, Drawing
from mend_jax.report.figures import bars
from mend_jax.report.names import METHODS
from mend_jax.report.results import Result
from mend_jax.report.table import Table
from mend_jax.scoring.cells import Cell, text_cell

REGIMES = {"a": "(a) every option reads the prefix", "b": "(b) once a query", "c": "(c) once for all queries"}


def cost_parts(result: Result) -> tuple[list[Table], list[Drawing], list[str]]:
    """Tables, figures and notes."""
    costs, ratios = result.own["costs"], result.own["ratios"]
    tables, drawings = [], []
    if ratios:
        title = "FLOPs of MEND over Vanilla ICL, regime (a)"
        tables.append(Table.of("cost_ratios", title, [_ratio_line(row) for row in ratios], labels=2))
    if costs:
        title = "Cost of a query, by method and regime"
        tables.append(Table.of("cost", title, [_cost_line(row) for row in costs], folded=True, labels=4))
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
    """TFLOP of a query of each method, by task."""
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
            values += [Bar(task, f"{METHODS['icl']}, paper", icl), Bar(task, f"{METHODS['mend']}, paper", mend)]
    name = f"cost_{llm}_{lengths.split()[-1]}_{regime}".replace("/", "_")
    heights = [bar.value for bar in values]
    return bars(name, caption, values, "TFLOP per query", log=max(heights) > 20 * min(heights) > 0)


def _ratio_line(row: dict) -> list[Cell]:
    columns = {
        "paper": "paper",
        "as_the_paper_counts": "counted as the paper",
        "ours": "as computed here",
        "ours_to_the_papers_icl": "here, over the paper's ICL",
    }
    cells = [Cell(title, f"{row[name]:.3f}", {name: row[name]}) for name, title in columns.items()]
    return [text_cell("LLM", row["llm"]), text_cell("task", row["task"]), *cells]


def _cost_line(row: dict) -> list[Cell]:
    """A row of the table: FLOPs, bytes, seconds, and from which query MEND pays."""
    flops, peak, seconds, pays = row["flops"], row["peak_bytes"], row.get("seconds"), row.get("pays_from")
    cells = [text_cell("LLM", row["llm"]), text_cell("task", row["name"]), text_cell("method", METHODS[row["method"]])]
    cells += [_count("queries a pass", row["rows"], "queries"), _count("demonstration tokens", row["demos"], "tokens")]
    cells += [_teraflops(f"TFLOP/query ({r})", flops[r]["query"], f"flops_{r}") for r in REGIMES]
    cells += [_teraflops("TFLOP once (c)", flops["c"]["once"], "flops_once_c"), _compilers_cell(row)]
    cells += [_bytes(f"peak ({r})", peak[r], f"peak_bytes_{r}") for r in REGIMES]
    cells += [_bytes("K/V cache", row["cache"], "cache_bytes"), _bytes("stored", row["stored"], "stored_bytes")]
    cells += [_seconds(f"s/query ({r})", seconds[r]["query"] if seconds else None, f"seconds_{r}") for r in REGIMES]
    cells += [_seconds("s once (c)", seconds["c"]["once"] if seconds else None, "seconds_once_c")]
    cells += [_seconds("of them distilling", row.get("distil_seconds"), "seconds_distilling")]
    return cells + [_pays_cell(r, pays) for r in REGIMES]


def _compilers_cell(row: dict) -> Cell:
    """How far the compiler's count is from the formula's, at most."""
    counted, flops, title, key = row.get("compilers_flops"), row["flops"], "compiler's count", "compilers_difference"
    if not counted:
        return Cell(title, "", {key: None})
    pairs = [(counted[r][part], flops[r][part]) for r in REGIMES for part in ("once", "query") if flops[r][part]]
    off = max(abs(a / b - 1) for a, b in pairs)
    return Cell(title, f"within {off:.1%}", {key: off})


def _pays_cell(regime: str, pays: dict | None) -> Cell:
    """The number of a query, "never", or nothing for other methods."""
    first = pays[regime] if pays else None
    text = "" if not pays else "never" if first is None else f"{first:,}"
    return Cell(f"MEND pays from query ({regime})", text, {f"pays_from_{regime}": text and (first or "never")})


def _count(title: str, count: int, key: str) -> Cell:
    return Cell(title, f"{count:,}", {key: count})


def _teraflops(title: str, flops: float, key: str) -> Cell:
    return Cell(title, number(flops / 1e12), {key: flops})


def _bytes(title: str, count: float, key: str) -> Cell:
    return Cell(title, size(count), {key: count})


def _seconds(title: str, seconds: float | None, key: str) -> Cell:
    return Cell(title, "" if seconds is None else number(seconds), {key: seconds})
