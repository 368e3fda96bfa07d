"""The small world: an invented language, written as files in exactly C4's and MetaICL's formats.

A fresh machine has no data, so the package makes its own:

    python -m mend_jax.data.small_world --out=worlds/small

The language has topics, each a handful of invented words. *Text*: documents in which a sentence keeps to one topic, and
so does each person throughout the document. *Tasks*: 2-4 topics and as many colours; an input is a few words of one
topic, and the output is the colour that the task assigns to it. Every task assigns colours at random, so only the
demonstrations reveal the answer. The topics of meta-test tasks share no word with any meta-training task, but the text
covers all topics. Partitions: the meta-test tasks of "small_world" have two or three colours; those of "small_world_four"
have four, which is more than a few vectors can carry; "small_world_first" has only the first of the meta-training
tasks.

The small world of *wrong labels* differs only in that a quarter of the meta-training examples and of the demonstrations
have the label of another class, as data labelled by people does. Test and dev items are labelled correctly. Each meta-test
task also has a pool of training examples, as MetaICL's meta-training tasks have, to take other demonstrations from.

Configs use the special values "small_world" and, for the tasks, "small_world_wrong_labels" instead of a path; `resolve`
writes the world when needed and replaces the values by paths.
"""

import argparse
import dataclasses
import gzip
import hashlib
import json
import random
import sys
from pathlib import Path

from ml_collections import ConfigDict
from tokenizers import Tokenizer, models, pre_tokenizers

from mend_jax.cli.errors import UserError
from mend_jax.data.small_world_language import (
    END_OF_TEXT,
    World,
    document,
    draw_task,
    every_task,
    test_files,
    topics,
    vocabulary,
)
from mend_jax.run.files import is_disk_full, whole_folder

NAME = "small_world"  # the special value in configs, and the partition's name
FOUR = "small_world_four"  # the partition whose meta-test tasks have four classes
FIRST = "small_world_first"  # the partition with the first of the meta-training tasks
MODEL_SIZE = (96, 3, 4)  # width, layers, heads of the distiller's backbone, which the LLM is grown from
WORLD = World()  # the default world, in whose language the packaged models are trained
WRONG_LABELS = "small_world_wrong_labels"  # the special value for the tasks with wrong labels
WORLD_OF_WRONG_LABELS = World(wrong_labels=0.25)
PACKAGED_MODELS = Path(__file__).parents[1] / "small_world"  # trained on the default world: configs/small_world.py


@dataclasses.dataclass(frozen=True)
class Paths:
    """The paths of a written world: `data.text`, `data.tasks` and, for stage "lm", the LLM's folder without weights."""

    text: Path
    tasks: Path
    llm: Path


def write_small_world(folder: str | Path, world: World = WORLD) -> Paths:
    """Writes the world below `folder` (c4/, metaicl/, llm/) unless it is already there, and returns its paths.

    The folder appears complete or not at all, even if the process is killed or two of them run at once.
    Raises UserError if the folder holds something else or cannot be written.
    """
    folder = Path(folder).expanduser()
    if _is_written(folder, world):
        return _paths(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file: name a folder.")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds another world: name a new folder, or remove this one.")
    try:
        with whole_folder(folder, sync=False) as temporary:  # thousands of files that are quick to make again
            _write_text(temporary / "c4", world)
            _write_tasks(temporary / "metaicl", world)
            _write_model_folder(temporary / "llm", world)
            (temporary / "world.json").write_text(_description(world))
    except OSError as error:
        if not _is_written(folder, world):  # else another process wrote the same files first
            advice = "free some space" if is_disk_full(error) else "name another folder"
            raise UserError(f"The small world cannot be written to {folder} ({error.strerror}): {advice}.") from None
    return _paths(folder)


def _paths(folder: Path) -> Paths:
    return Paths(text=folder / "c4", tasks=folder / "metaicl", llm=folder / "llm")


def _description(world: World) -> str:
    # The settings and a sample of the generator's output, so that a changed generator is noticed, but a changed comment is not.
    rng, all_topics = random.Random("sample"), topics(world)
    meaning = draw_task(rng, world, all_topics, max(world.classes))
    made = [document(rng, world, all_topics) for _ in range(4)], vocabulary(world), MODEL_SIZE
    made += next(every_task(world)), test_files(rng, world, "sample", meaning)
    sample = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    return json.dumps({"sample": sample, **dataclasses.asdict(world)}, indent=1) + "\n"


def _is_written(folder: Path, world: World) -> bool:
    try:
        return (folder / "world.json").read_bytes() == _description(world).encode()
    except OSError:
        return False


def fingerprint(world: World) -> str:
    """The key of a world's folder in the cache: other settings or a changed generator give another folder."""
    return hashlib.sha256(_description(world).encode()).hexdigest()[:12]


def _write_text(folder: Path, world: World) -> None:
    folder.mkdir(parents=True)
    all_topics = topics(world)
    shards = (("train", 0, 2), ("train", 1, 2), ("validation", 0, 1))
    for split, shard, of in shards:
        count = (world.train_documents if split == "train" else world.validation_documents) // of
        rng = random.Random(f"{world.seed} {split} {shard}")
        path = folder / f"c4-{split}.{shard:05d}-of-{of:05d}.json.gz"
        # No name and no time in the header, so that the same world gives the same bytes.
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
    for split, task, meaning, files in every_task(world):
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
    # Spaces separate words and are dropped; a line break is a token of its own, so that the two templates differ.
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
    """A copy of the config with paths in place of the special values; writes the world if it is missing.

    `data.text` and `data.tasks` become paths below `data.cache`; both worlds share the same text. `llm.path` and
    `prefix.backbone` become the packaged models; stage "lm", which trains the LLM, gets a folder without weights.
    """
    config = config.copy_and_resolve_references()
    fresh_llm = config.stage == "lm" and config.llm.path == NAME
    wrong_labels = config.data.tasks == WRONG_LABELS
    if fresh_llm or wrong_labels or NAME in (config.data.text, config.data.tasks):
        world = WORLD_OF_WRONG_LABELS if wrong_labels else WORLD
        paths = write_small_world(Path(config.data.cache).expanduser() / f"{NAME}-{fingerprint(world)}", world)
        if config.data.text == NAME:
            config.data.text = str(paths.text)
        if config.data.tasks in (NAME, WRONG_LABELS):
            config.data.tasks = str(paths.tasks)
    if config.llm.path == NAME:
        config.llm.path = str(paths.llm if fresh_llm else PACKAGED_MODELS / "llm")
    if config.prefix.backbone == NAME:
        config.prefix.backbone = str(PACKAGED_MODELS / "backbone")
    return config


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes the small world in C4's and MetaICL's formats.")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed: another one gives other texts and tasks in the same language"
    )
    parser.add_argument(
        "--wrong_labels",
        type=float,
        default=0.0,
        help="share of wrong labels in the training examples and demonstrations",
    )
    parser.add_argument(
        "--demonstrations", type=int, default=16, help="demonstrations of each test task and seed: K, for data.k"
    )
    options = parser.parse_args(arguments)
    try:
        paths = write_small_world(
            options.out,
            World(seed=options.seed, wrong_labels=options.wrong_labels, demonstrations=options.demonstrations),
        )
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"text:  {paths.text}\ntasks: {paths.tasks}\nllm:   {paths.llm} (without weights)")


if __name__ == "__main__":
    main()
