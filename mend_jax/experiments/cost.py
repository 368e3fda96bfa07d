"""What in-context learning and MEND cost at inference (the paper's Figure 3), in three regimes, none of them left out.

    python -m mend_jax.experiments.cost --config=configs/small_world.py --workdir=runs/experiments

Regimes: (a) as the paper, every option of a query reads the prefix again; (b) a query reads the prefix once; (c) the prefix is
read once for all queries, which share its keys and values. Lengths: the means of the config's test tasks, partition by
partition, and the five of the paper. Models: the config's, and the sizes that experiment.cost_llms names, with random weights.
A config's distiller of chunks is counted with the most chunks that a training context has.
FLOPs are counted by formula and, of one query to a pass, by XLA's compiler; bytes are the compiler's; seconds are measured,
experiment.cost_repeats runs of each program, for each number of queries to a pass in experiment.cost_rows. Nothing is trained.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.text import markdown, number, size
from mend_jax.data.evaluation import load_tasks
from mend_jax.data.metaicl import partition_names
from mend_jax.experiments import paper, run
from mend_jax.llm.decoder_only import LLM, without_weights
from mend_jax.measure import regimes
from mend_jax.measure.model_sizes import known_or_folder, smallest_of
from mend_jax.measure.regimes import METHODS, REGIMES, Models, Shape
from mend_jax.models.families import DecoderConfig, from_hf_config
from mend_jax.models.folders import local_folder
from mend_jax.prefixes import KINDS, kind_of
from mend_jax.run.files import write_text
from mend_jax.run.sealed import read_sealed, write_sealed
from mend_jax.scoring.tasks import make_context

TITLE, PAPER = "What a query costs", "Figure 3"
FORMAT = 3  # raise it when a number of a row changes its meaning, or its formula: rows that a workdir keeps are then made again


def main(config, workdir) -> int:
    """Writes <workdir>/cost/experiment.json and prints its tables; returns exit code 0."""
    run.open_workdir(config, workdir)
    folder = Path(workdir) / "cost"
    read = readable(settings(config))
    parts = [(m, s, method, rows) for m, s in read for method in METHODS for rows in config.experiment.cost_rows]
    rows = []
    with Progress(len(parts), "program") as bar:
        for models, shape, method, count in parts:
            bar.at(f"{models.name}  {shape.name}  {method}")
            rows.append(_kept(folder, models, shape, method, count, config.experiment.cost_repeats))
            bar.update()
    counted = [row.pop("origin") for row in rows]
    report = run.head("cost", TITLE, PAPER, config, counted) | {"rows": [], "costs": rows, "ratios": ratios()}
    write_text(folder / run.TABLE, f"{ratio_table(report['ratios'])}\n\n{cost_table(rows)}\n")
    write_sealed(folder / run.ROWS, report)
    print(short_table(rows))
    print(f"\nFLOPs of MEND over Vanilla ICL, regime (a), at the paper's lengths:\n\n{ratio_table(report['ratios'])}")
    return 0


def check(config) -> None:
    """Raises UserError for models, sizes or tasks that have no costs; nothing is computed."""
    settings(config)


@dataclasses.dataclass(frozen=True)
class Named(Models):
    """Models with the name of their LLM."""

    name: str = ""
    source: str = ""  # where the lengths are from: "the paper", or a partition


def settings(config) -> list[tuple[Named, Shape]]:
    """All models with all lengths, whether they can read them or not."""
    found = []
    known = [sized(name, config.llm.dtype) for name in config.experiment.cost_llms]
    for models in known:
        found += [(dataclasses.replace(models, source="the paper"), shape) for shape in paper.FIGURE_3_TASKS]
    own = own_models(config)
    others = [models for models in known if models.name != own.name]
    for shape in partition_shapes(config):
        for models in (own, *others):
            found.append((dataclasses.replace(models, source=shape.name), shape))
    return found


def readable(found: list[tuple[Named, Shape]]) -> list[tuple[Named, Shape]]:
    """Those of `settings` whose LLM and distiller can read the lengths; says which cannot."""
    _say_left_out([one for one in found if not fits(*one)])
    return [one for one in found if fits(*one)]


def fits(models: Models, shape: Shape) -> bool:
    """Whether the LLM can read the demonstrations with a query, and the distiller them with its placeholders."""
    longest, distilled = needed(models, shape)
    return longest <= models.llm.window and distilled <= models.distiller.window


def needed(models: Models, shape: Shape) -> tuple[int, int]:
    """Positions that the LLM and the distiller need."""
    longest = max(shape.demos, models.positions) + shape.query + round(shape.options * shape.target)
    return longest, models.part(shape) + models.vectors


def _say_left_out(left_out: list[tuple[Named, Shape]]) -> None:
    """One line for each LLM with lengths that do not fit."""
    by_llm: dict[Named, list[str]] = {}
    for models, shape in left_out:
        longest, distilled = needed(models, shape)
        same = dataclasses.replace(models, source="")
        by_llm.setdefault(same, []).append(f"{shape.name} ({longest:,} tokens, {distilled:,} to distil)")
    for models, lengths in by_llm.items():
        windows = f"its window has {models.llm.window:,}, its distiller's {models.distiller.window:,}"
        logging.warning("cost leaves out, of %s, the lengths of %s: %s.", models.name, ", ".join(lengths), windows)


def sized(name: str, dtype: str) -> Named:
    """A published LLM by its name, with the smallest model of its family as distiller and the paper's number of vectors."""
    llm = known_or_folder(name)
    if not isinstance(llm, DecoderConfig):
        raise UserError(f"experiment.cost_llms names {name}, but costs are of decoder-only LLMs: name others.")
    return Named(llm, known_or_folder(smallest_of(llm.family)).headless, paper.VECTORS, dtype, name=name)


def own_models(config) -> Named:
    """The models of a config, without weights."""
    prefix, kind = config.prefix, kind_of(config) if kind_of(config).reads_demos else KINDS["distiller"]
    llm, backbone = (from_hf_config(local_folder(path)) for path in (config.llm.path, kind.backbone(config)))
    if not isinstance(llm, DecoderConfig):
        raise UserError(f"costs are of decoder-only LLMs, and {config.llm.path} is none: set another llm.path.")
    made = kind.reader_settings(config, backbone), prefix.length, config.llm.dtype, kind.readings(config)
    return Named(llm, *made, prefix.join, prefix.projection, paper.name_of(config.llm.path))


def partition_shapes(config) -> list[Shape]:
    """The mean lengths of the test tasks of each partition whose files are there."""
    llm = without_weights(config.llm.path, config.llm.dtype, config.data.bos)
    found: dict[Shape, str] = {}
    for name in partition_names(config.data.tasks, "test", config.data.k, tuple(config.evaluate.seeds)):
        c = config.copy_and_resolve_references().unlock()
        c.data.partition, c.evaluate.tasks = name, ()
        shape = mean_shape(c, llm, "")
        found[shape] = f"{found[shape]}, {name}" if shape in found else name  # partitions may have the same test tasks
    return [shape._replace(name=name) for shape, name in found.items()]


def mean_shape(config, llm: LLM, name: str) -> Shape:
    """The mean lengths of a partition's test tasks: of the demonstrations that fit, of inputs, of options and their number."""
    tasks, _ = load_tasks(config, llm, config.evaluate.split)
    reader = KINDS["demonstrations"].beside(llm)
    lengths = []
    for task in tasks:
        demos = len(make_context(config, llm, reader, task))
        options = [len(option) for item in task.items for option in item.options_tokens]
        inputs = np.mean([len(item.x_tokens) for item in task.items])
        lengths.append([demos, inputs, len(options) / len(task.items), np.mean(options)])
    demos, query, options, target = np.mean(lengths, 0)
    return Shape(name, round(demos), round(query), round(float(options), 2), max(1, round(target)))


def cost_of(models: Named, shape: Shape, method: str, rows: int, repeats: int) -> dict:
    """One row of the table: a method with so many queries to a pass."""
    found = {
        name: regimes.measured(program, repeats)
        for name, program in regimes.programs(models, shape, method, rows).items()
    }
    distil = regimes.distil_flops(models, shape)
    row = {"llm": models.name, "lengths": models.source, **shape._asdict(), "vectors": models.positions}
    row |= {"method": method, "rows": rows, "dtype": models.dtype}
    row |= {"flops": regimes.query_flops(models, shape, method), "distil_flops": distil if method == "mend" else 0}
    row |= {"peak_bytes": regimes.peak_bytes(found), **regimes.held_bytes(models, shape, method)}
    row["seconds"] = regimes.seconds_by_regime(found, shape, rows) if repeats else None
    row["distil_seconds"] = found["distil" + regimes.ONE]["seconds"] if method == "mend" else None
    if rows == 1:
        row["compilers_flops"] = regimes.compilers_query_flops(models, shape, method)
    if method == "mend":
        row["pays_from"] = pays_from(row["flops"], regimes.query_flops(models, shape, "icl"), distil)
    return row


def pays_from(mend: dict, icl: dict, distil: float) -> dict[str, int | None]:
    """{regime: queries from which MEND needs fewer FLOPs than Vanilla ICL in all}, its vectors made once and kept."""
    found = {}
    for regime in REGIMES:
        part = "once" if regime == "c" else "query"
        found[regime] = regimes.pays_from({**mend[regime], part: mend[regime][part] - distil}, icl[regime], distil)
    return found


def ratios() -> list[dict]:
    """MEND's FLOPs over Vanilla ICL's in regime (a) for the paper's tasks, beside the paper's ratio."""
    found = []
    for name in paper.FIGURE_3:
        models = sized(name, "float32")
        for shape in paper.FIGURE_3_TASKS:
            icl, _, mend = paper.FIGURE_3[name][shape.name]
            counted = {m: regimes.as_the_paper_counts(models, shape, m) for m in ("icl", "mend")}
            ours = {m: regimes.query_flops(models, shape, m)["a"]["query"] for m in ("icl", "mend")}
            found.append(
                {
                    "llm": name,
                    "task": shape.name,
                    "paper": mend / icl,
                    "as_the_paper_counts": counted["mend"] / counted["icl"],
                    "ours": ours["mend"] / ours["icl"],
                    "ours_to_the_papers_icl": ours["mend"] / (icl * 1e12),
                }
            )
    return found


def cost_table(rows: list[dict]) -> str:
    """A row for each model, task, method and number of queries to a pass."""
    header = ["LLM", "lengths", "method", "queries a pass"]
    header += ["TFLOP/query (a)", "(b)", "(c)", "once (c)", "compiler", "peak (a)", "(b)", "(c)", "K/V cache", "stored"]
    header += ["s/query (a)", "(b)", "(c)", "once (c)", "distilling", "MEND pays from query (a)", "(b)", "(c)"]
    return markdown(header, [_cells(row) for row in rows])


def short_table(rows: list[dict]) -> str:
    """The FLOPs and seconds of the rows with the fewest queries to a pass, for a terminal."""
    header = [
        "LLM",
        "lengths",
        "method",
        "TFLOP/query (a)",
        "(b)",
        "(c)",
        "once (c)",
        "s/query (a)",
        "(b)",
        "(c)",
        "once (c)",
    ]
    fewest = min((row["rows"] for row in rows), default=1)
    cells = [_cells(row) for row in rows if row["rows"] == fewest]
    return markdown(header, [[*row[:3], *row[4:8], *row[14:18]] for row in cells])


def ratio_table(found: list[dict]) -> str:
    header = ["LLM", "task", "paper", "counted as the paper", "as computed here", "here, over the paper's ICL"]
    names = ("paper", "as_the_paper_counts", "ours", "ours_to_the_papers_icl")
    return markdown(header, [[row["llm"], row["task"], *(f"{row[name]:.3f}" for name in names)] for row in found])


def largest_difference(row: dict) -> float | None:
    """The largest relative difference between the compiler's count and the formula's; None where it has none."""
    if "compilers_flops" not in row:
        return None
    pairs = [(row["compilers_flops"][r][part], row["flops"][r][part]) for r in REGIMES for part in ("once", "query")]
    return max((abs(a / b - 1) for a, b in pairs if b), default=0.0)


def _cells(row: dict) -> list[str]:
    flops, difference, seconds = row["flops"], largest_difference(row), row.get("seconds")
    cells = [
        row["llm"],
        row["lengths"] if row["lengths"] == row["name"] else row["name"],
        row["method"],
        str(row["rows"]),
    ]
    cells += [number(flops[r]["query"] / 1e12) for r in REGIMES] + [number(flops["c"]["once"] / 1e12)]
    cells += ["" if difference is None else f"{difference:.1%} off"]
    cells += [size(row["peak_bytes"][r]) for r in REGIMES] + [size(row["cache"]), size(row["stored"])]
    cells += [number(seconds[r]["query"]) for r in REGIMES] + [number(seconds["c"]["once"])] if seconds else 4 * ["–"]
    cells += [number(made) if (made := row.get("distil_seconds")) else ""]
    pays = row.get("pays_from")
    return cells + (["never" if pays[r] is None else f"{pays[r]:,}" for r in REGIMES] if pays else 3 * [""])


def _kept(folder: Path, models: Named, shape: Shape, method: str, rows: int, repeats: int) -> dict:
    """`cost_of`, computed once: a file keeps it for when the command is started again."""
    asked = [FORMAT, dataclasses.asdict(models), shape, method, rows, repeats]
    path = folder / "parts" / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.json"
    try:
        return read_sealed(path, "it is made again", only=True)
    except FileNotFoundError:
        pass
    except UserError as error:
        logging.warning("%s", error)
    row = cost_of(models, shape, method, rows, repeats) | {"origin": run.origin()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, row)
    return row


if __name__ == "__main__":
    from mend_jax.cli.command_line import run as run_command

    run_command(main, keeps=True)
