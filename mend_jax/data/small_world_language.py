"""The small world's language and its tasks, which small_world.py writes as files. Everything depends on the seed alone."""

import dataclasses
import math
import random
from collections.abc import Iterator

from mend_jax.cli.errors import UserError

SEEDS = (13, 21, 42, 87, 100)  # MetaICL's
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
LABELS = [
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gold", "silver",
    "cyan", "teal", "navy", "olive", "coral", "amber", "ivory", "lilac", "scarlet", "indigo", "maroon",
]  # fmt: skip
PEOPLE = [
    "anna", "boris", "clara", "david", "elena", "felix", "greta", "hugo", "irene", "jonas", "karen", "louis", "maria",
    "nils", "olga", "peter",
]  # fmt: skip
# The unknown word comes first and the end of text last, as in GPT-2.
FUNCTION_WORDS = ["<unk>", "\n", ".", "said", "about", "the", "of", "and", "with", "some"]
END_OF_TEXT = "<eos>"


DISTINCT = 64  # consecutive demonstrations with different inputs: a topic has few


@dataclasses.dataclass(frozen=True)
class World:
    """The generator's settings; lengths are in words. The language itself is the same for every seed."""

    seed: int = 0
    train_topics: int = 216
    test_topics: int = 24
    topic_words: int = 5
    input_words: tuple[int, int] = (3, 4)  # fewest and most words of an input, all distinct and of one topic
    classes: tuple[int, ...] = (2, 3, 4)  # of the meta-training tasks, in turn
    test_classes: tuple[int, ...] = (2, 3)  # of the meta-test tasks, in turn
    train_tasks: int = 6_000
    first_tasks: int = 1_200  # meta-training tasks in the partition FIRST: configs/small_world.py says what it is for
    train_examples: int = 64
    train_examples_per_class: int = 2  # at least
    wrong_labels: float = (
        0.0  # share of the meta-training examples and of the demonstrations that get another label of the task
    )
    test_tasks: int = 24
    four_tasks: int = 12  # meta-test tasks of four classes
    demonstrations: int = 16
    demonstrations_per_class: int = 4  # at least
    pool: int = 1_024  # training examples of each meta-test task, to take demonstrations from (config.evaluate.demos)
    dev_examples: int = 32
    test_examples: int = 60
    train_documents: int = 40_000
    validation_documents: int = 1_000
    document_words: int = 88  # a document ends with the paragraph that reaches it

    def __post_init__(self) -> None:
        inputs = sum(math.perm(self.topic_words, n) for n in range(self.input_words[0], self.input_words[1] + 1))
        shown = min(self.demonstrations, DISTINCT)
        needed = max(self.train_examples, self.test_examples + shown + self.dev_examples)
        if not 0 <= self.wrong_labels < 1:
            raise UserError(f"wrong_labels is {self.wrong_labels}: give a share from 0 to less than 1.")
        if inputs < needed:  # else drawing distinct inputs might never end
            raise UserError(f"A topic has {inputs} different inputs, but a task may need {needed}: raise topic_words.")


def topics(world: World) -> list[list[str]]:
    """The words of each topic, all distinct; the meta-training topics come first."""
    rng = random.Random("the small world's words")
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    real = {*LABELS, *PEOPLE, *FUNCTION_WORDS}
    words = [a + b for a in syllables for b in syllables if a + b not in real]
    size = world.topic_words
    drawn = rng.sample(words, size * (world.train_topics + world.test_topics))
    return [drawn[i : i + size] for i in range(0, len(drawn), size)]


def vocabulary(world: World) -> list[str]:
    """Every word that a text or a task can contain, in the order of the token ids."""
    return [*FUNCTION_WORDS, *LABELS, *PEOPLE, *(word for topic in topics(world) for word in topic), END_OF_TEXT]


def document(rng: random.Random, world: World, all_topics: list[list[str]]) -> str:
    """A document of paragraphs of one or two sentences; each person in it keeps to one topic."""
    subjects = rng.sample(all_topics, rng.choice(world.classes))
    people = rng.sample(PEOPLE, len(subjects))
    paragraphs, length = [], -1
    while length < world.document_words:
        i = rng.randrange(len(subjects))
        paragraph = " ".join(_sentence(rng, world, subjects[i], people[i]) for _ in range(rng.randint(1, 2)))
        paragraphs.append(paragraph)
        length += paragraph.count(" ") + 2  # its words and, before all but the first, a line break
    return "\n".join(paragraphs)


def _sentence(rng: random.Random, world: World, topic: list[str], person: str) -> str:
    words = rng.sample(topic, rng.randint(*world.input_words))
    form = rng.random()
    if form < 0.6:
        return f"{' '.join(words)} said {person} ."
    if form < 0.8:
        return f"{person} said {' '.join(words)} ."
    first, second = rng.choice(("the", "some", "about")), rng.choice(("of", "and", "with"))
    return f"{first} {words[0]} {second} {' '.join(words[1:])} ."


# The tasks


def draw_task(rng: random.Random, world: World, some_topics: list[list[str]], classes: int) -> dict[str, list[str]]:
    """A task, which gives each of its topics a label: {label: the topic's words}."""
    return dict(zip(rng.sample(LABELS, classes), rng.sample(some_topics, classes), strict=True))


def draw_examples(
    rng: random.Random, world: World, task: str, meaning: dict[str, list[str]], labels: list[str], seen: set[str]
) -> list[dict]:
    """One MetaICL line per label in `labels`. Inputs in `seen` are not drawn again; new ones are added to it."""
    rows = []
    for label in labels:
        words = None
        while words is None or words in seen:
            words = " ".join(rng.sample(meaning[label], rng.randint(*world.input_words)))
        seen.add(words)
        rows.append({"task": task, "input": words, "output": label, "options": sorted(meaning)})
    return rows


def _labels(rng: random.Random, meaning: dict[str, list[str]], count: int, at_least: int) -> list[str]:
    labels = [label for label in meaning for _ in range(at_least)]
    labels += rng.choices(list(meaning), k=count - len(labels))
    rng.shuffle(labels)
    return labels


def every_task(world: World) -> Iterator[tuple[str, str, dict[str, list[str]], dict[str, list[dict]]]]:
    """Every task as (split, name, meaning, {k_seed_split: rows}); no two tasks have the same meaning."""
    all_topics = topics(world)
    trained, unseen = all_topics[: world.train_topics], all_topics[world.train_topics :]
    meanings = set()
    for split, some_topics, classes, count in (
        ("train", trained, world.classes, world.train_tasks),
        ("test", unseen, world.test_classes, world.test_tasks),
        ("four", unseen, (4,), world.four_tasks),
    ):
        for i in range(count):
            task = f"small-{split}-{i:03d}"
            rng = random.Random(f"{world.seed} {task}")
            meaning = None
            while meaning is None or _key(meaning) in meanings:
                meaning = draw_task(rng, world, some_topics, classes[i % len(classes)])
            meanings.add(_key(meaning))
            files = _train_files if split == "train" else test_files
            yield split, task, meaning, files(rng, world, task, meaning)


def _key(meaning: dict[str, list[str]]) -> tuple:
    return tuple(sorted((label, *words) for label, words in meaning.items()))


def _train_files(rng: random.Random, world: World, task: str, meaning: dict) -> dict[str, list[dict]]:
    labels = _labels(rng, meaning, world.train_examples, at_least=world.train_examples_per_class)
    return {"16384_100_train": _labelled(world, draw_examples(rng, world, task, meaning, labels, set()))}


def _labelled(world: World, rows: list[dict]) -> list[dict]:
    """The rows, a share `wrong_labels` of them with a wrong label."""
    if not world.wrong_labels:
        return rows  # saves 400,000 random generators
    labelled = []
    for row in rows:
        rng = random.Random(
            f"{world.seed} {row['task']} {row['input']}"
        )  # a generator of its own, so that all other draws are the same in every world
        others = [option for option in row["options"] if option != row["output"]]
        labelled.append(row | {"output": rng.choice(others)} if rng.random() < world.wrong_labels else row)
    return labelled


def test_files(rng: random.Random, world: World, task: str, meaning: dict) -> dict[str, list[dict]]:
    # As in MetaICL, the test rows are the same for every seed and occur in no seed's demonstrations.
    test_inputs: set[str] = set()
    # All labels are equally frequent, so guessing scores 1 / classes.
    labels = _labels(rng, meaning, world.test_examples, world.test_examples // len(meaning))
    test = draw_examples(rng, world, task, meaning, labels, test_inputs)
    files = {}
    for seed in SEEDS:
        k = world.demonstrations
        shown, seen = _demonstrations(rng, world, task, meaning, k, test_inputs)
        files[f"{k}_{seed}_train"] = _labelled(world, shown)
        # The dev and test rows, which select and score methods, are labelled correctly.
        labels = _labels(rng, meaning, world.dev_examples, world.dev_examples // len(meaning))
        files[f"{k}_{seed}_dev"] = draw_examples(rng, world, task, meaning, labels, seen)
        files[f"{k}_{seed}_test"] = test
    if world.pool:
        draw = random.Random(
            f"{world.seed} {task} pool"
        )  # so that all other draws are the same with and without a pool
        pool, _ = _demonstrations(draw, world, task, meaning, world.pool, test_inputs)
        files["16384_100_train"] = _labelled(world, pool)
    return files


def _demonstrations(
    rng: random.Random, world: World, task: str, meaning: dict, count: int, test_inputs: set[str]
) -> tuple[list[dict], set[str]]:
    """(`count` examples, the inputs that the last of them leave): of every DISTINCT one after another, no two inputs are equal."""
    shown, seen = [], set(test_inputs)
    while len(shown) < count:
        seen, part = set(test_inputs), min(DISTINCT, count - len(shown))
        labels = _labels(rng, meaning, part, min(world.demonstrations_per_class, part // len(meaning)))
        shown += draw_examples(rng, world, task, meaning, labels, seen)
    return shown, seen
