"""How closely methods answer as another one: a distiller as in-context learning, which its training imitates (paper, section 3.2).

Scores say how often answers are right; this says how far the LLM's choice was carried over, and tells methods apart by fewer items.

Axes: T trainings of a method, N items.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from mend_jax.cli.errors import UserError
from mend_jax.cli.text import in_markdown, markdown
from mend_jax.scoring.answers import Read, numbered
from mend_jax.scoring.cells import interval
from mend_jax.scoring.statistics import Estimate, Resampled, Task, estimate, resample_means


class Likeness(NamedTuple):
    """Of one method: means over the items of a task, then over the tasks that all answered."""

    kl: Resampled  # nats: KL(reference || method) of the options' probabilities, the softmax of their scores (evaluate.option_score)
    same: Resampled  # share of the items on which both choose the same option


def likenesses(read: Mapping[str, Sequence[Read]], named: str, reference: Read) -> dict[str, Likeness]:
    """{method: its likeness}, in the same resamples of items and seeds, of what {method: its trainings} answered, and the reference,
    which is `named` so.

    Raises UserError where they have no task in common, or answered different items.
    """
    tasks, _ = numbered({**read, f"the reference {named}": [reference]})
    kls, sames = {}, {}
    for name, trainings in read.items():
        found = [_of_training(tasks, (name, own.lines), (named, reference.lines)) for own in trainings]
        kls[name], sames[name] = (
            {
                task.name: [np.stack(rows) for rows in zip(*(one[part][task.name] for one in found), strict=True)]
                for task in tasks
            }
            for part in (0, 1)
        )
    kl, same = resample_means(tasks, kls), resample_means(tasks, sames)
    return {name: Likeness(kl[name], same[name]) for name in read}


def likeness_tables(read: Mapping[str, Sequence[Read]], reference: str) -> list[str]:
    """A table with a row for each method but the reference, and one of their differences, where there are several."""
    others = {name: trainings for name, trainings in read.items() if name != reference}
    found = likenesses(others, reference, read[reference][0])
    rows = [
        [
            in_markdown(name),
            _kl(one.kl),
            ", ".join(f"{x:.3f}" for x in one.kl.values.mean((0, 2))),
            interval(estimate(one.same)),
        ]
        for name, one in found.items()
    ]
    tables = [
        markdown(["method", f"KL from {reference}, nats [95%]", "of each training", "same answer, % [95%]"], rows)
    ]
    pairs = [
        [
            in_markdown(f"{b} − {a}"),
            _kl(found[b].kl, found[a].kl),
            interval(estimate(found[b].same, found[a].same), plus=True),
        ]
        for a, b in itertools.combinations(found, 2)
    ]
    return (
        [*tables, markdown(["methods", f"KL from {reference}, nats [95%]", "same answer, % [95%]"], pairs)]
        if pairs
        else tables
    )


def _kl(of: Resampled, minus: Resampled | None = None) -> str:
    """`0.117 [0.101, 0.134]`, of a difference with signs."""
    found: Estimate = estimate(of, minus, highest=math.inf)
    value, low, high = (f"{x:{'' if minus is None else '+'}.3f}" for x in found[:3])
    return f"{value} [{low}, {high}]".replace("-", "−")


def _of_training(tasks: Sequence[Task], one: tuple[str, dict], reference: tuple[str, dict]) -> tuple[dict, dict]:
    """({task: for each seed (N,) KL}, the same of whether both choose the same option), of two (name, lines)."""
    (name, ours), (named, theirs), kls, sames = one, reference, {}, {}
    for task in (task.name for task in tasks):
        pairs = [(ours[task][seed], lines) for seed, lines in theirs[task].items()]
        if any(line["options"] != other["options"] for pair in pairs for line, other in zip(*pair, strict=True)):
            raise UserError(f"{name} and {named} answered different items of {task}.")
        kls[task] = [np.array([_divergence(*both) for both in zip(*pair, strict=True)]) for pair in pairs]
        sames[task] = [
            np.array([float(a["prediction"] == b["prediction"]) for a, b in zip(*pair, strict=True)]) for pair in pairs
        ]
    return kls, sames


def _divergence(line: dict, reference: dict) -> float:
    p, q = (special.log_softmax(one["scores"]) for one in (reference, line))
    return float(np.exp(p) @ (p - q))
