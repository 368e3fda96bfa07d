"""The small world: an invented language, written as files in exactly C4's and MetaICL's formats.

A fresh machine has no data, so the package makes its own:

    python -m mend_jax.data.small_world --out=worlds/small

The language has topics, each a handful of invented words. *Text*: documents whose sentences stay on a topic, and whose
people each keep to one topic for the length of the document. *Tasks*: 2-4 topics and as many colours; an input is a few
words of one topic, the output is the colour that this task gave it. Colours are dealt anew for every task, so the answer
is known from the demonstrations alone; meta-test tasks use topics of which no meta-training task has a word, but the
text speaks of all of them. The partitions: the meta-test tasks of "small_world" have two or three colours, those of
"small_world_four" four, which is more than a few vectors carry; "small_world_first" has the first few of the
meta-training tasks.

Configs name the special value "small_world" instead of a path; `resolve` writes the world when needed and puts paths there.
"""

import argparse
import dataclasses
import gzip
import hashlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers

from mend_jax.errors import UserError

NAME = "small_world"  # the special value in configs, and the partition's name
FOUR = "small_world_four"  # the partition whose meta-test tasks have four classes
FIRST = "small_world_first"  # the partition with the first of the meta-training tasks
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
# The unknown word comes first; the end of text last, where GPT-2 has it.
FUNCTION_WORDS = ["<unk>", "\n", ".", "said", "about", "the", "of", "and", "with", "some"]
END_OF_TEXT = "<eos>"
MODEL_SIZE = (96, 3, 4)  # width, layers, heads of the distiller's backbone, from which the LLM grows
PACKAGED_MODELS = Path(__file__).parents[1] / "small_world"  # trained on the default world: configs/small_world.py


@dataclasses.dataclass(frozen=True)
class World:
    """What the generator can be told; lengths in words. The language itself is the same for every seed."""

    seed: int = 0
    train_topics: int = 216
    test_topics: int = 24
    topic_words: int = 5
    input_words: tuple[int, int] = (3, 4)  # of one topic, none twice: fewest and most
    classes: tuple[int, ...] = (2, 3, 4)  # of the meta-training tasks, in turn
    test_classes: tuple[int, ...] = (2, 3)  # of the meta-test tasks, in turn
    train_tasks: int = 6_000
    first_tasks: int = 1_200  # of them, in a partition of their own: configs/small_world.py says what for
    train_examples: int = 64
    train_examples_per_class: int = 2  # at least
    test_tasks: int = 24
    four_tasks: int = 12  # meta-test tasks of four classes
    demonstrations: int = 16
    demonstrations_per_class: int = 4  # at least
    dev_examples: int = 32
    test_examples: int = 60
    train_documents: int = 40_000
    validation_documents: int = 1_000
    document_words: int = 88  # a document ends with the paragraph that reaches it

    def __post_init__(self) -> None:
        inputs = sum(math.perm(self.topic_words, n) for n in range(self.input_words[0], self.input_words[1] + 1))
        needed = max(self.train_examples, self.test_examples + self.demonstrations + self.dev_examples)
        if inputs < needed:  # else drawing inputs that are all different might never end
            raise UserError(f"a topic has {inputs} different inputs and a task may need {needed}: raise topic_words.")


@dataclasses.dataclass(frozen=True)
class Paths:
    """The parts of a written world: `data.text`, `data.tasks`, and the LLM's folder without weights, for stage "lm"."""

    text: Path
    tasks: Path
    llm: Path


# The language


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
    """Every word a text or a task can hold, in the order of the token ids."""
    return [*FUNCTION_WORDS, *LABELS, *PEOPLE, *(word for topic in topics(world) for word in topic), END_OF_TEXT]


def document(rng: random.Random, world: World, all_topics: list[list[str]]) -> str:
    """Paragraphs of one or two sentences; each person of the document keeps to one topic."""
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
    """A task: the label of each of its topics, as {label: the topic's words}."""
    return dict(zip(rng.sample(LABELS, classes), rng.sample(some_topics, classes), strict=True))


def draw_examples(
    rng: random.Random, world: World, task: str, meaning: dict[str, list[str]], labels: list[str], seen: set[str]
) -> list[dict]:
    """One MetaICL line per label in `labels`; no input is drawn that is in `seen`, which grows."""
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


# The files


def write_small_world(folder: str | Path, world: World = World()) -> Paths:
    """Writes the world below `folder` (c4/, metaicl/, llm/), or finds it there already.

    The folder appears complete or not at all: killed, or run twice at once, it does no harm.
    Raises UserError if the folder holds something else, or cannot be written.
    """
    folder = Path(folder).expanduser()
    if _is_written(folder, world):
        return _paths(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file: name a folder.")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds another world: name a new folder, or remove this one.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"the small world cannot be written to {folder} ({error.strerror}): name another folder."
        ) from None
    try:
        _write_text(temporary / "c4", world)
        _write_tasks(temporary / "metaicl", world)
        _write_model_folder(temporary / "llm", world)
        (temporary / "world.json").write_text(_description(world))
        temporary.chmod(0o755)  # mkdtemp's folders are private; these are as shareable as any other
        try:
            os.replace(temporary, folder)
        except OSError:
            if not _is_written(folder, world):  # else another process was first: its files are the same
                raise
    except OSError as error:
        raise UserError(f"the small world cannot be written to {folder} ({error.strerror}): free some space.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _paths(folder)


def _paths(folder: Path) -> Paths:
    return Paths(text=folder / "c4", tasks=folder / "metaicl", llm=folder / "llm")


def _description(world: World) -> str:
    # The settings, and a sample of what this generator makes of them: a changed generator is noticed, a comment is not.
    rng, all_topics = random.Random("sample"), topics(world)
    meaning = draw_task(rng, world, all_topics, max(world.classes))
    made = [document(rng, world, all_topics) for _ in range(4)], vocabulary(world), MODEL_SIZE
    made += next(_tasks(world)), _test_files(rng, world, "sample", meaning)
    sample = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    return json.dumps({"sample": sample, **dataclasses.asdict(world)}, indent=1) + "\n"


def _is_written(folder: Path, world: World) -> bool:
    try:
        return (folder / "world.json").read_text() == _description(world)
    except OSError:
        return False


def fingerprint(world: World) -> str:
    """Names a world's folder in the cache: another setting or another generator is another folder."""
    return hashlib.sha256(_description(world).encode()).hexdigest()[:12]


def _write_text(folder: Path, world: World) -> None:
    folder.mkdir(parents=True)
    all_topics = topics(world)
    shards = (("train", 0, 2), ("train", 1, 2), ("validation", 0, 1))
    for split, shard, of in shards:
        count = (world.train_documents if split == "train" else world.validation_documents) // of
        rng = random.Random(f"{world.seed} {split} {shard}")
        path = folder / f"c4-{split}.{shard:05d}-of-{of:05d}.json.gz"
        # No name and no time in the header: the same world is the same bytes.
        with open(path, "wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
            for i in range(shard * count, (shard + 1) * count):
                row = {
                    "text": document(rng, world, all_topics),
                    "timestamp": f"2024-01-{1 + i % 28:02d}T00:00:00Z",
                    "url": f"https://example.org/small-world/{split}/{i}",
                }
                packed.write(json.dumps(row).encode() + b"\n")


def _write_tasks(folder: Path, world: World) -> None:
    folder.mkdir(parents=True)
    tasks: dict[str, list[str]] = {"train": [], "test": [], "four": []}
    descriptions = {}
    for split, task, meaning, files in _tasks(world):
        tasks[split].append(task)
        descriptions[task] = {"task_type": "classification", "options": sorted(meaning)}
        (folder / "data" / task).mkdir(parents=True)
        for name, rows in files.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data" / task / f"{task}_{name}.jsonl").write_text(lines)
    partitions = {
        NAME: {"train": tasks["train"], "test": tasks["test"]},
        FOUR: {"train": tasks["train"], "test": tasks["four"]},
        FIRST: {"train": tasks["train"][: world.first_tasks], "test": tasks["test"]},
    }
    (folder / "partitions.json").write_text(json.dumps(partitions, indent=1) + "\n")
    (folder / "tasks.json").write_text(json.dumps(descriptions, indent=1) + "\n")


def _tasks(world: World) -> Iterator[tuple[str, str, dict[str, list[str]], dict[str, list[dict]]]]:
    """Every task as (split, name, meaning, {k_seed_split: rows}); no two tasks mean the same."""
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
            files = _train_files if split == "train" else _test_files
            yield split, task, meaning, files(rng, world, task, meaning)


def _key(meaning: dict[str, list[str]]) -> tuple:
    return tuple(sorted((label, *words) for label, words in meaning.items()))


def _train_files(rng: random.Random, world: World, task: str, meaning: dict) -> dict[str, list[dict]]:
    labels = _labels(rng, meaning, world.train_examples, at_least=world.train_examples_per_class)
    return {"16384_100_train": draw_examples(rng, world, task, meaning, labels, set())}


def _test_files(rng: random.Random, world: World, task: str, meaning: dict) -> dict[str, list[dict]]:
    # As MetaICL: the test rows are the same for every seed; they occur in no seed's demonstrations.
    test_inputs: set[str] = set()
    # Every label is as frequent as any other: guessing is worth 1 / classes.
    labels = _labels(rng, meaning, world.test_examples, world.test_examples // len(meaning))
    test = draw_examples(rng, world, task, meaning, labels, test_inputs)
    files = {}
    for seed in SEEDS:
        seen = set(test_inputs)
        k = world.demonstrations
        for split, count, at_least in (
            ("train", k, world.demonstrations_per_class),
            ("dev", world.dev_examples, world.dev_examples // len(meaning)),
        ):
            labels = _labels(rng, meaning, count, at_least)
            files[f"{k}_{seed}_{split}"] = draw_examples(rng, world, task, meaning, labels, seen)
        files[f"{k}_{seed}_test"] = test
    return files


# The model


def _write_model_folder(folder: Path, world: World) -> None:
    """A GPT-2 folder without weights: config.json and a word-level tokenizer."""
    width, layers, heads = MODEL_SIZE
    words = vocabulary(world)
    last = len(words) - 1
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": len(words),
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 96,
        "n_ctx": 96,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": last,
        "eos_token_id": last,
        "tie_word_embeddings": True,
    }
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    # Spaces separate words and vanish; a line break is a word of its own, so that both templates can be told apart.
    split = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.add_special_tokens([words[0], END_OF_TEXT])
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": words[0],
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": config["n_positions"],
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("config", config), ("tokenizer_config", tokenizer_config)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


# Configs and the command


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy of the config with paths for the special value "small_world"; the world is written when it is missing.

    `data.text`, `data.tasks`: below `data.cache`. `llm.path`, `prefix.backbone`: the packaged models; but stage "lm", which
    makes the LLM, starts from its settings without weights.
    """
    config = config.copy_and_resolve_references()
    fresh_llm = config.stage == "lm" and config.llm.path == NAME
    if fresh_llm or NAME in (config.data.text, config.data.tasks):
        world = World()
        paths = write_small_world(Path(config.data.cache).expanduser() / f"{NAME}-{fingerprint(world)}", world)
        if config.data.text == NAME:
            config.data.text = str(paths.text)
        if config.data.tasks == NAME:
            config.data.tasks = str(paths.tasks)
    if config.llm.path == NAME:
        config.llm.path = str(paths.llm if fresh_llm else PACKAGED_MODELS / "llm")
    if config.prefix.backbone == NAME:
        config.prefix.backbone = str(PACKAGED_MODELS / "backbone")
    return config


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes the small world in C4's and MetaICL's formats.")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="other texts and tasks in the same language")
    options = parser.parse_args(arguments)
    try:
        paths = write_small_world(options.out, World(seed=options.seed))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"text:  {paths.text}\ntasks: {paths.tasks}\nllm:   {paths.llm} (without weights)")


if __name__ == "__main__":
    main()
