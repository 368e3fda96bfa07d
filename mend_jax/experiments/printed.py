"""The table of an experiment for a terminal: its labels and scores, one line for all training seeds of a row."""

from mend_jax.cli.text import markdown, number
from mend_jax.scoring.metrics import mean_and_std, percent


def printed_table(content: dict, evaluations: dict[str, dict]) -> str:
    """A Markdown table.

    Args:
        content: of experiment.json.
        evaluations: {an evaluation's folder: the methods of its scores.json}.
    Returns:
        A line per row: its labels; the score, ± over the sets of demonstrations (of the mean over trainings); the number of
        trainings and ± over them; the positions of its prefix.
    """
    lines = {}
    for row in content["rows"]:
        lines.setdefault(tuple(row["labels"].values()), []).append(evaluations[row["evaluation"]][row["method"]])
    header = [*content["varied"], "score", "trainings", "± trainings", "prefix length"]
    return markdown(header, [[*labels, *_cells(found)] for labels, found in lines.items()])


def _cells(found: list[dict]) -> list[str]:
    seeds = found[0]["score"]["per_seed"]
    of_seeds = [mean_and_std([one["score"]["per_seed"][seed] for one in found])[0] for seed in seeds]
    mean, std = mean_and_std(of_seeds)
    _, trained = mean_and_std([one["score"]["mean"] for one in found])
    length = mean_and_std([one["cost"]["prefix_length"] for one in found])[0]
    spread = "" if trained is None else f"{100 * trained:.2f}"
    count = str(len(found)) if found[0]["path"] else ""
    return [percent({"mean": mean, "std": std}), count, spread, number(length)]
