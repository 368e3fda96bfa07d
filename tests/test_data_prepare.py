"""Tokenising once: found again, resumed after an interruption, by several processes, mistakes in one sentence."""

import copy
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, save_tokenizer
from data_files import make_world, tiny_config, words, write_text
from facts import says

from mend_jax import prepare
from mend_jax.cli import command_line as cli
from mend_jax.data import c4, prepared, tokenize
from mend_jax.data.stores import TaskStore, TextStore, text_splits


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def documents(manifest, split="train"):
    store = TextStore(manifest, [shard for shard in manifest["shards"] if shard["split"] == split])
    return [store[i].tolist() for i in range(len(store))]


def expected(tokenizer, world, split="train"):
    texts = [row["text"] for file in c4.text_files(world / "c4")[split] for row in c4.read_documents(file)]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_text_round_trip(world, tokenizer):
    manifest = prepared.prepare_text(tiny_config(world, "pretrain"), tokenizer)
    for split in ("train", "validation"):
        assert documents(manifest, split) == expected(tokenizer, world, split)
    assert sum(shard["tokens"] for shard in manifest["shards"]) == sum(
        map(len, expected(tokenizer, world) + expected(tokenizer, world, "validation"))
    )


def test_tasks_round_trip_with_the_separator(world, tokenizer):
    config = tiny_config(world, "finetune")
    manifest = prepared.prepare_tasks(config, tokenizer, ["b"])
    store = TaskStore(manifest["shards"][0], manifest["dtype"])
    path = world / "metaicl" / "data" / "b" / "b_16384_100_train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(store) == len(rows) == 20
    for i, row in enumerate(rows):
        x, y = store.example(i, 4)
        assert x.tolist() == tokenizer(" " + row["input"])["input_ids"][:4]
        assert y.tolist() == tokenizer(" " + row["output"])["input_ids"]
        assert store.cut_lengths(4)[i] == len(x) + len(y)


def test_many_examples_take_several_records(world, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize, "BLOCK", 7)
    manifest = prepared.prepare_tasks(tiny_config(world, "finetune"), tokenizer, ["a"])
    store = TaskStore(manifest["shards"][0], manifest["dtype"])
    assert len(store) == 20
    assert store.example(19, 99)[1].tolist() == tokenizer("w51")["input_ids"]


def test_nothing_is_tokenised_twice(world, tokenizer, monkeypatch):
    config = tiny_config(world, "pretrain")
    first = prepared.prepare_text(config, tokenizer), prepared.prepare_tasks(config, tokenizer, ["a", "b"])
    monkeypatch.setattr(prepared, "run_job", None)
    assert (prepared.prepare_text(config, tokenizer), prepared.prepare_tasks(config, tokenizer, ["a", "b"])) == first
    prepared.prepare_tasks(config, tokenizer, ["b"])  # another set of the same files: the shards are there
    with pytest.raises(TypeError):  # a task that was not tokenised yet
        prepared.prepare_tasks(config, tokenizer, ["b", "c"])


def test_keyed_by_tokenizer_template_and_source(world, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    config = tiny_config(world, "finetune")
    path = lambda: prepared.prepare_tasks(config, tokenizer, ["a"])["shards"][0]["path"]  # noqa: E731
    seen = {path()}
    config.data.template = "newline"
    seen.add(path())
    tokenizer.add_tokens(["w60"])
    seen.add(path())
    file = world / "metaicl" / "data" / "a" / "a_16384_100_train.jsonl"
    file.write_text(file.read_text().replace("w3", "w4"))
    seen.add(path())
    assert len(seen) == 4
    text = prepared.prepare_text(config, tokenizer)
    write_text(world / "c4", "c4-train.00000-of-00002.json.gz", [words(1, 40)])
    assert len(documents(prepared.prepare_text(config, tokenizer))) == len(documents(text)) - 39


def test_goes_on_where_it_stopped(world, tokenizer, monkeypatch):
    config, done = tiny_config(world, "pretrain"), []

    def stop_at_second(tok, job, report):
        if done and len(done) == 1:
            raise KeyboardInterrupt
        done.append(job["name"])
        return tokenize.run_job(tok, job, report)

    monkeypatch.setattr(prepared, "run_job", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        prepared.prepare_text(config, tokenizer)
    assert not list(Path(config.data.cache).glob("text-*.json"))
    rest = []
    monkeypatch.setattr(
        prepared, "run_job", lambda tok, job, r: rest.append(job["name"]) or tokenize.run_job(tok, job, r)
    )
    manifest = prepared.prepare_text(config, tokenizer)
    assert len(rest) == 2 and done[0] not in rest
    assert documents(manifest) == expected(tokenizer, world)


def test_processes_give_the_same_files(world, tokenizer, monkeypatch):
    alone = prepared.prepare_text(tiny_config(world, "pretrain"), tokenizer)
    monkeypatch.setattr(prepared, "IN_PROCESS", 0)
    together = tiny_config(world, "pretrain", cache=str(world / "other"), processes=2)
    together = prepared.prepare_text(together, tokenizer)
    for a, b in zip(alone["shards"], together["shards"], strict=True):
        assert Path(a["path"]).read_bytes() == Path(b["path"]).read_bytes() and a["path"] != b["path"]


def test_a_mistake_in_a_worker_is_one_sentence(world, tokenizer, monkeypatch):
    monkeypatch.setattr(prepared, "IN_PROCESS", 0)
    bad = b'{"text": "w1"}\n{"text": \n'
    path = world / "c4" / "c4-train.00001-of-00002.json.gz"
    path.write_bytes(gzip.compress(bad))
    with says(f"{path}, line 2", "JSON"):
        prepared.prepare_text(tiny_config(world, "pretrain", processes=2), tokenizer)


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from data_files import tiny_config
from transformers import AutoTokenizer
from mend_jax.data import prepared
prepared.IN_PROCESS = 0
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
prepared.prepare_text(tiny_config(Path({world!r}), "pretrain", processes=2), tokenizer)
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, tokenizer):
    """kill -9 while two processes work: what is there is whole, and the next run makes the rest."""
    for i in range(6):
        write_text(
            tmp_path / "c4", f"c4-train.{i:05d}-of-00006.json.gz", [words(i + j, 50 + j % 50) for j in range(2_000)]
        )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    facts = {
        "root": str(ROOT),
        "tests": str(ROOT / "tests"),
        "world": str(tmp_path),
        "tokenizer": str(tmp_path / "tokenizer"),
    }
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(**facts)], stderr=subprocess.DEVNULL)
    shards = lambda: list(tmp_path.glob("cache/shards-*/*.array_record"))  # noqa: E731
    while process.poll() is None and not shards():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert shards()
    for path in shards():
        assert tokenize.shard_counts(path, "text")["items"] == 2_000
    manifest = prepared.prepare_text(tiny_config(tmp_path, "pretrain"), tokenizer)
    assert documents(manifest) == expected(tokenizer, tmp_path)


def test_prepared_tfds_directory(world, tokenizer):
    pytest.importorskip("tensorflow_datasets")
    c4.c4_builder(world / "c4", world / "tfds").download_and_prepare(file_format="array_record")
    manifest = prepared.prepare_text(tiny_config(world, "pretrain", text=str(world / "tfds" / "c4" / "en")), tokenizer)
    for split in ("train", "validation"):
        assert sorted(documents(manifest, split)) == sorted(expected(tokenizer, world, split))


def test_full_disk(world, tokenizer, monkeypatch):
    writer = tokenize.ArrayRecordWriter
    monkeypatch.setattr(tokenize, "ArrayRecordWriter", lambda path, options: writer("/dev/full", options))
    with says("disk", "full", "config.data.cache"):
        prepared.prepare_text(tiny_config(world, "pretrain"), tokenizer)
    assert not list(world.glob("cache/shards-*/*"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"dtype": "uint16", "shards": [{}]}', '"dtype"'])
def test_a_damaged_manifest_is_made_again(world, tokenizer, content):
    config = tiny_config(world, "pretrain")
    made = prepared.prepare_text(config, tokenizer)
    [manifest] = (world / "cache").glob("text-*.json")
    manifest.write_text(content)
    assert prepared.prepare_text(config, tokenizer) == made


def test_a_source_that_cannot_be_read_is_named(world, tokenizer, monkeypatch):
    def broken(file, report=None):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(c4, "read_documents", broken)
    with says(world / "c4/c4-train.00000-of-00002.json.gz", "Input/output error"):
        prepared.prepare_text(tiny_config(world, "pretrain"), tokenizer)
    assert not list(world.glob("cache/shards-*/*"))


def test_a_source_that_cannot_be_opened_is_named(world, tokenizer):
    (world / "c4" / "c4-train.00002.json.gz").mkdir()
    with says(world / "c4/c4-train.00002.json.gz", "a folder"):
        prepared.prepare_text(tiny_config(world, "pretrain"), tokenizer)


def test_a_cache_that_cannot_be_made(world, tokenizer):
    (world / "file").write_text("")
    with says(re.compile(f"{world}/file/cache/"), "Not a directory", "config.data.cache"):
        prepared.prepare_text(tiny_config(world, "pretrain", cache=str(world / "file" / "cache")), tokenizer)


def test_a_damaged_shard_is_named(world, tokenizer):
    config = tiny_config(world, "pretrain")
    manifest = prepared.prepare_text(config, tokenizer)
    path = Path(manifest["shards"][0]["path"])
    os.truncate(path, path.stat().st_size // 2)
    with says(path, "damaged", "delete"):
        text_splits(prepared.prepare_text(config, tokenizer), 4)
    path.unlink()
    assert documents(prepared.prepare_text(config, tokenizer)) == expected(tokenizer, world)


def test_a_damaged_record_is_named(world, tokenizer):
    manifest = prepared.prepare_text(tiny_config(world, "pretrain"), tokenizer)
    path = Path(manifest["shards"][1]["path"])
    content = bytearray(path.read_bytes())
    at = content.find(np.asarray(expected(tokenizer, world)[45], np.uint16).tobytes()[:16])
    for i in range(at, at + 8) if at >= 0 else range(200, 400):  # compressed: somewhere in the first records
        content[i] ^= 0xFF
    path.write_bytes(content)
    with says(path, "damaged", "delete"):
        documents(manifest)


def test_a_cache_can_be_moved(world, tokenizer):
    manifest = prepared.prepare_text(tiny_config(world, "pretrain"), tokenizer)
    (world / "cache").rename(world / "moved")
    moved = prepared.prepare_text(tiny_config(world, "pretrain", cache=str(world / "moved")), tokenizer)
    assert documents(moved) == expected(tokenizer, world)
    assert [s["tokens"] for s in moved["shards"]] == [s["tokens"] for s in manifest["shards"]]


def test_without_held_out_files_the_last_texts_are(world, tokenizer):
    (world / "c4" / "c4-validation.00000-of-00001.json.gz").unlink()
    manifest = prepared.prepare_text(tiny_config(world, "pretrain"), tokenizer)
    splits = text_splits(manifest, 8)
    assert splits["train"][1] == range(52) and splits["validation"][1] == range(52, 60)
    with says(world / "c4", "60 texts", "config.data.validation_items = 60"):
        text_splits(manifest, 60)


def test_tokenizer_that_does_not_fit(tokenizer):
    largest = max(tokenizer.get_vocab().values())
    tokenize.check_tokenizer(tokenizer, largest + 1, "llm")
    with says(f"ids up to {largest}", "LLM", f"{largest} tokens"):
        tokenize.check_tokenizer(tokenizer, largest, "llm")
    with says("llm", "no tokenizer", "LLM"):
        tokenize.check_tokenizer(None, largest, "llm")


def test_a_large_vocabulary_is_kept_in_32_bits(world, tokenizer):
    class Large(type(tokenizer)):
        def get_vocab(self):
            return {"far": 70_000}

    large = Large(tokenizer_object=tokenizer.backend_tokenizer)
    manifest = prepared.prepare_text(tiny_config(world, "pretrain"), large)
    assert manifest["dtype"] == "uint32" and documents(manifest) == expected(tokenizer, world)
    small = prepared.prepare_text(tiny_config(world, "pretrain", cache=str(world / "small")), tokenizer)
    assert small["dtype"] == "uint16" and documents(small) == documents(manifest)
    assert np.dtype(small["dtype"]).itemsize == 2


def test_command(world, tiny_llm, capsys):
    flags = [f"--config.{k}={v}" for k, v in {
        "llm.path": tiny_llm, "prefix.backbone": tiny_llm, "data.text": world / "c4", "data.tasks": world / "metaicl", "data.cache": world / "cache",
        "data.partition": "tiny"}.items()]  # fmt: skip
    argv = ["prepare", f"--config={ROOT / 'configs' / 'base.py'}"]
    with pytest.raises(SystemExit) as end:
        cli.run(prepare.main, argv + flags)
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "text: 70 documents, " in out and "tasks: 60 examples, " in out
    with pytest.raises(SystemExit) as end:
        cli.run(prepare.main, [*argv, *flags, f"--config.data.text={world / 'no'}"])
    assert end.value.code == 2
    assert f"error: {world / 'no'} is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.run(prepare.main, [*argv, f"--config.llm.path={tiny_llm}"])
    assert end.value.code == 2 and "nothing to prepare" in capsys.readouterr().err
