"""From predictions to the numbers of a table: accuracy and Macro-F1, aggregated over tasks and seeds.

All scores are fractions in [0, 1]; only printed tables multiply by 100.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from mend_jax.cli.errors import UserError

METRICS = ("accuracy", "macro_f1")
TITLES = {"accuracy": "accuracy", "macro_f1": "Macro-F1"}


def accuracy(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """Share of items whose predicted text equals the gold text (surrounding spaces are ignored)."""
    pairs = _pairs(predictions, golds)
    return sum(prediction == gold for prediction, gold in pairs) / len(pairs)


def macro_f1(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """Mean F1, 2 TP / (2 TP + FP + FN), over the classes *that occur among the golds*.

    This is MetaICL's rule (and the MEND release's). A class that is predicted but never gold lowers the scores of the
    classes it is taken for, but adds no zero of its own; scikit-learn's `average="macro"` would add one.
    """
    pairs = _pairs(predictions, golds)
    predicted, present = Counter(p for p, _ in pairs), Counter(g for _, g in pairs)
    right = Counter(p for p, g in pairs if p == g)
    return sum(2 * right[c] / (predicted[c] + present[c]) for c in present) / len(present)


def primary_metric(classification: bool) -> str:
    """A task's primary metric: Macro-F1 for classification, accuracy for the rest (as in MetaICL)."""
    return "macro_f1" if classification else "accuracy"


def task_scores(predictions: Sequence[str], golds: Sequence[str], classification: bool) -> dict[str, float | str]:
    """Both metrics of one task and seed, the name of the primary one, and its value as "score"."""
    scores = {"accuracy": accuracy(predictions, golds), "macro_f1": macro_f1(predictions, golds)}
    primary = primary_metric(classification)
    return {**scores, "primary": primary, "score": scores[primary]}


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and *sample* standard deviation (n - 1): the seeds are a sample of all draws of demonstrations.

    The paper does not say which one it prints; with five seeds the population's is 0.89 times as large. One value has no std.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def aggregate(scores: Mapping[str, Mapping[int, Mapping]]) -> dict:
    """Aggregates `task_scores`, given as task -> seed -> scores, over tasks and seeds.

    The score of a seed is the mean over tasks, each by its own primary metric; mean and std are over seeds.

    Returns:
        {"score": {"mean", "std", "per_seed": {seed: value}}, "accuracy": {...}, "macro_f1": {...},
        "per_task": {task: {"primary", "score": {...}, "accuracy": {...}, "macro_f1": {...}}}}.
    Raises:
        UserError: no task, or a task that lacks a seed of the other tasks.
    """
    if not scores:
        raise UserError("There is nothing to aggregate: no task was evaluated.")
    seeds = sorted({seed for by_seed in scores.values() for seed in by_seed})
    for task, by_seed in scores.items():
        lacking = [seed for seed in seeds if seed not in by_seed]
        if lacking:
            raise UserError(
                f"Task {task} has no scores for seed {lacking[0]}, but other tasks do: evaluate all with the same seeds."
            )
    kinds = ("score", *METRICS)
    per_seed = {kind: {seed: _mean([scores[task][seed][kind] for task in scores]) for seed in seeds} for kind in kinds}
    per_task = {
        task: {"primary": by_seed[seeds[0]]["primary"]}
        | {kind: _spread({seed: by_seed[seed][kind] for seed in seeds}) for kind in kinds}
        for task, by_seed in scores.items()
    }
    return {kind: _spread(per_seed[kind]) for kind in kinds} | {"per_task": per_task}


def percent(spread: Mapping) -> str:
    """`43.35 ± 2.17`, as the paper prints it; without the ± if there is only one seed."""
    text = f"{100 * spread['mean']:.2f}"
    return text if spread["std"] is None else f"{text} ± {100 * spread['std']:.2f}"


def _pairs(predictions, golds) -> list[tuple[str, str]]:
    if len(golds) == 0:
        raise UserError("There are no items to score: the task's file is empty.")
    return [(p.strip(), g.strip()) for p, g in zip(predictions, golds, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _spread(per_seed: Mapping[int, float]) -> dict:
    mean, std = mean_and_std(list(per_seed.values()))
    return {"mean": mean, "std": std, "per_seed": dict(per_seed)}
