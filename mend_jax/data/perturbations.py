"""What an evaluation does to demonstrations before they are read (config.evaluate.perturb): pure functions over examples.

| name | a changed demonstration |
| --- | --- |
| no_label, no_input | lacks its output, or its input (paper, Table 3) |
| random_label | has a label drawn from all options; it may be the right one |
| wrong_label | has one drawn from the others |
| adversarial | has a wrong label, the same one wherever the right one would be the same: a task with its labels exchanged |
| typos | has a typing mistake in every word of its input that has two letters or more |
| irrelevant | is one of another task |

What happens to an example is drawn with a seed, and with the example itself: it depends neither on its place nor on the others.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES
from mend_jax.data.metaicl import Example

NOT_SHOWN = None  # the input or the output of a demonstration that lacks it


def perturbed(
    examples: Sequence[Example], kind: str, share: float, seed: int, others: Sequence[Example] = ()
) -> list[Example]:
    """The examples, round(share * count) of them changed.

    Args:
        examples: the demonstrations, in any order: each stays at its place.
        kind: "none" or a key of PERTURBATIONS.
        share: 0 to 1. The examples that a smaller share changes are among those of a larger one, and change alike.
        seed: of all that is drawn.
        others: the demonstrations of other tasks, for "irrelevant".
    Raises:
        UserError: an example that has no other label, or no other task, where one is needed.
    """
    if kind == "none":
        return list(examples)
    draws = [random.Random(f"{seed} {kind} {e.task} {e.input} {e.output}") for e in examples]
    first = sorted(range(len(examples)), key=[draw.random() for draw in draws].__getitem__)
    changed = set(first[: round(share * len(examples))])
    made = list(examples)
    for i in changed:
        made[i] = PERTURBATIONS[kind](made[i], draws[i], others)
    return made


def no_label(example: Example, draw: random.Random, others=()) -> Example:
    return replace(example, output=NOT_SHOWN)


def no_input(example: Example, draw: random.Random, others=()) -> Example:
    return replace(example, input=NOT_SHOWN)


def random_label(example: Example, draw: random.Random, others=()) -> Example:
    return replace(example, output=draw.choice(example.options or (example.output,)))


def wrong_label(example: Example, draw: random.Random, others=()) -> Example:
    return replace(example, output=draw.choice(_others(example)))


def adversarial(example: Example, draw: random.Random, others=()) -> Example:
    """The wrong option that follows the right one in alphabetical order, after the last the first: nothing is drawn."""
    wrong = sorted(_others(example))
    return replace(example, output=next((option for option in wrong if option > example.output), wrong[0]))


def typos(example: Example, draw: random.Random, others=()) -> Example:
    """Two neighbouring letters that differ are exchanged or, in a word of one letter again and again, the first is left out."""
    return replace(example, input=" ".join(_mistyped(word, draw) for word in example.input.split(" ")))


def irrelevant(example: Example, draw: random.Random, others: Sequence[Example]) -> Example:
    known = [other for other in others if other.task != example.task]
    if not known:
        raise UserError(
            f"Irrelevant demonstrations of task {example.task!r} come from other meta-test tasks, but there is none: choose a"
            " partition with several, or another evaluate.perturb."
        )
    return draw.choice(known)


def _mistyped(word: str, draw: random.Random) -> str:
    if len(word) < 2:
        return word
    places = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    if not places:
        return word[1:]
    i = draw.choice(places)
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _others(example: Example) -> list[str]:
    # Answers are scored without the spaces around them: an option that differs in these alone is right.
    others = [option for option in example.options if option.strip() != example.output.strip()]
    if not others:
        raise UserError(
            f"A demonstration of task {example.task!r} ({example.output!r}) has no other option that could be its wrong label: leave"
            " the task out, or choose another evaluate.perturb."
        )
    return others


PERTURBATIONS = {  # by name: the choices of config.evaluate.perturb besides "none"
    "no_label": no_label,
    "no_input": no_input,
    "random_label": random_label,
    "wrong_label": wrong_label,
    "adversarial": adversarial,
    "typos": typos,
    "irrelevant": irrelevant,
}
assert {"none", *PERTURBATIONS} == set(CHOICES["evaluate.perturb"])


def reordered(count: int, number: int, seed: int) -> list[int]:
    """The `number`-th order of `count` demonstrations, a permutation of range(count); 0 is the order as it is.

    Two numbers have the same order only where that cannot be helped: where they are more than there are orders.
    """
    drawn, order = {tuple(range(count))}, list(range(count))
    orders = math.factorial(count) if count < 20 else math.inf
    draw = random.Random(f"{seed} order {count}")
    for _ in range(number % orders if orders < math.inf else number):
        while tuple(order) in drawn:
            draw.shuffle(order)
        drawn.add(tuple(order))
    return order
