"""How closely a method answers as another one: a distiller as in-context learning, which its training imitates (paper, section 3.2).

Scores say how often answers are right; this says how far the LLM's choice was carried over, and tells methods apart by fewer items.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from mend_jax.cli.errors import UserError
from mend_jax.cli.text import markdown
from mend_jax.scoring.answers import Source, read_lines
from mend_jax.scoring.cells import percent


class Likeness(NamedTuple):
    """Means over the items of a task, all seeds together, then over the tasks that both answered."""

    kl: float  # nats: KL(reference || method) of the options' probabilities, the softmax of their scores (evaluate.option_score)
    same: float  # share of the items on which both choose the same option


def likeness(source: Source, reference: Source) -> Likeness:
    """Of one training of a method. Raises UserError where the two have no task in common, or answered different items."""
    ours, theirs = read_lines(source), read_lines(reference)
    found = [_of_task(task, ours[task], theirs[task], source, reference) for task in theirs if task in ours]
    if not found:
        raise UserError(
            f"{source.method} and {reference.method} answered no task in common: evaluate both on the same ones."
        )
    return Likeness(*np.mean(found, 0).tolist())


def likeness_table(sources: dict[str, Sequence[Source]], reference: str) -> str:
    """A row for each method but the reference; numbers of several trainings with commas between."""
    rows = []
    for name, trainings in sources.items():
        if name != reference:
            found = [likeness(source, sources[reference][0]) for source in trainings]
            kls, shares = (f"{one.kl:.3f}" for one in found), (percent(one.same) for one in found)
            rows.append([name, ", ".join(kls), ", ".join(shares)])
    return markdown(["method", f"KL from {reference}", "same answer, %"], rows)


def _of_task(task: str, ours: dict, theirs: dict, source: Source, reference: Source) -> tuple[float, float]:
    kls, same = [], []
    for seed, lines in theirs.items():
        own = ours.get(seed, [])
        if any([line[what] for line in own] != [line[what] for line in lines] for what in ("options", "gold")):
            raise UserError(f"{source.method} and {reference.method} answered different items of {task}, seed {seed}.")
        for line, other in zip(own, lines, strict=True):
            p, q = (special.log_softmax(one["scores"]) for one in (other, line))
            kls.append(float(np.exp(p) @ (p - q)))
            same.append(line["prediction"] == other["prediction"])
    return float(np.mean(kls)), float(np.mean(same))
