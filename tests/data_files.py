"""Small raw files for the data tests, in exactly C4's and MetaICL's formats, and a config that reads them."""

import gzip
import json

from configs import base


def write_text(folder, name, texts):
    """One C4 file; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with gzip.open(path, "wt") as out:
        for i, text in enumerate(texts):
            print(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"http://a.b/{i}"}), file=out)
    return path


def words(start, count):
    """`count` words of the tiny tokenizer, each one token."""
    return " ".join(f"w{(start + i) % 60}" for i in range(count))


def write_examples(path, task, pairs, options):
    """One MetaICL file of (input, output) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"task": task, "input": x, "output": y, "options": options} for x, y in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_world(folder, train_tasks=("a", "b", "c"), examples=20, k=4, seeds=(13, 21)):
    """A text folder, meta-training tasks a, b, c and a meta-test task t, all of the tiny tokenizer's words."""
    write_text(folder / "c4", "c4-train.00000-of-00002.json.gz", [words(i, 30 + 7 * (i % 9)) for i in range(40)])
    write_text(folder / "c4", "c4-train.00001-of-00002.json.gz", [words(5 * i, 90) for i in range(20)])
    write_text(folder / "c4", "c4-validation.00000-of-00001.json.gz", [words(3 * i, 60) for i in range(10)])
    tasks = folder / "metaicl"
    for t, task in enumerate(train_tasks):
        pairs = [(words(t * 10 + i, 2 + i % 5), f"w{50 + i % 2}") for i in range(examples)]
        write_examples(tasks / "data" / task / f"{task}_16384_100_train.jsonl", task, pairs, ["w50", "w51"])
    for seed in seeds:
        for split, count in (("train", k), ("dev", k), ("test", 7)):
            pairs = [(words(seed + i, 3), f"w{50 + i % 2}") for i in range(count)]
            write_examples(
                tasks / "data" / "t" / f"t_{k}_{seed}_{split}.jsonl", "t", pairs, ["w50", "w51 w52"][:1] + ["w51"]
            )
    (tasks / "partitions.json").write_text(json.dumps({"tiny": {"train": list(train_tasks), "test": ["t"]}}))
    return folder


def tiny_config(world, stage, **data):
    c = base.get_config()
    c.stage, c.prefix.length, c.train.batch_size = stage, 4, 4
    c.data.text, c.data.tasks, c.data.cache = str(world / "c4"), str(world / "metaicl"), str(world / "cache")
    c.data.partition, c.data.k, c.data.processes = "tiny", 4, 1
    c.data.max_text_tokens, c.data.max_demo_tokens, c.data.max_input_tokens = 64, 60, 6
    c.data.demo_buckets, c.data.query_buckets, c.data.bucket_window = (16, 32, 60), (4, 8, 16), 4
    c.data.sequence_length, c.data.text_share, c.data.validation_items = 32, 0.5, 8
    c.evaluate.seeds = (13, 21)
    c.data.update(data)
    return c
