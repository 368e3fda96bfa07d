"""The small world: public formats, the same bytes every time, answers known from the demonstrations alone."""

import collections
import dataclasses
import gzip
import hashlib
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from facts import says

from mend_jax.data import small_world
from mend_jax.data.small_world import resolve, write_small_world
from mend_jax.data.small_world_language import LABELS, SEEDS, World
from mend_jax.models.families import from_hf_config, to_hf_config

TINY = World(train_tasks=3, test_tasks=3, four_tasks=2, train_documents=6, validation_documents=2)
CONFIGS = ("llm", "backbone", "quick", "full", "experiments", "pretrain", "finetune")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The default world, written once: 2 s."""
    return write_small_world(tmp_path_factory.mktemp("world") / "small")


def get_config(name):
    path = Path(__file__).parents[1] / "configs" / "small_world.py"
    spec = importlib.util.spec_from_file_location("small_world_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(name)


def rows(world, task, name):
    return [json.loads(line) for line in (world.tasks / "data" / task / f"{task}_{name}.jsonl").open()]


def partition(world, name="small_world"):
    return json.loads((world.tasks / "partitions.json").read_text())[name]


def texts(path):
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "world.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_other_seed_other_tasks_in_the_same_language(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_small_world(tmp_path / name, World(**{**TINY.__dict__, "seed": seed}))
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    changed = {name for name in a if a[name] != c[name]}
    assert any("c4-train" in name for name in changed) and any("small-test-000_16_13_train" in name for name in changed)
    assert not any("tokenizer" in name for name in changed)


@pytest.mark.slow
def test_text_is_c4s_format(world):
    names = sorted(path.name for path in world.text.iterdir())
    assert names == [
        "c4-train.00000-of-00002.json.gz",
        "c4-train.00001-of-00002.json.gz",
        "c4-validation.00000-of-00001.json.gz",
    ]
    documents = [texts(world.text / name) for name in names]
    assert [len(part) for part in documents] == [20_000, 20_000, 1_000]
    assert all(set(row) == {"text", "timestamp", "url"} for part in documents for row in part)
    assert len({row["url"] for part in documents for row in part}) == 41_000
    assert len({row["text"] for part in documents for row in part}) == 41_000
    assert min(len(row["text"].replace("\n", " \n ").split(" ")) for row in documents[2]) >= 88


def test_tasks_are_metaicls_format(world):
    tasks, four = partition(world), partition(world, "small_world_four")
    assert len(tasks["train"]) == 6_000 and len(tasks["test"]) == 24
    assert four["train"] == tasks["train"] and len(four["test"]) == 12
    assert partition(world, "small_world_first") == {"train": tasks["train"][:1_200], "test": tasks["test"]}
    every = tasks["train"] + tasks["test"] + four["test"]
    assert sorted(path.name for path in (world.tasks / "data").iterdir()) == sorted(every)
    kinds = json.loads((world.tasks / "tasks.json").read_text())
    classes = [{len(kinds[task]["options"]) for task in part} for part in (tasks["train"], tasks["test"], four["test"])]
    assert classes == [{2, 3, 4}, {2, 3}, {4}]
    for task in every[::20] + tasks["test"] + four["test"]:
        assert kinds[task]["task_type"] == "classification"
        names = {path.name for path in (world.tasks / "data" / task).iterdir()}
        if task in tasks["train"]:
            assert names == {f"{task}_16384_100_train.jsonl"}
        else:
            parts = {f"{task}_16_{s}_{part}.jsonl" for s in SEEDS for part in ("train", "dev", "test")}
            assert names == parts | {f"{task}_16384_100_train.jsonl"}
        for name in names:
            for row in rows(world, task, name.removeprefix(f"{task}_").removesuffix(".jsonl")):
                assert set(row) == {"task", "input", "output", "options"}
                assert row["task"] == task and row["output"] in row["options"] == kinds[task]["options"]


def test_demonstrations_show_every_label_and_no_test_input(world):
    drawn = set()
    for task in partition(world)["test"] + partition(world, "small_world_four")["test"]:
        test = rows(world, task, "16_13_test")
        count = collections.Counter(row["output"] for row in test)
        assert len(set(count.values())) == 1 and set(count) == set(test[0]["options"]), "guessing is worth 1 / classes"
        for seed in SEEDS:
            assert rows(world, task, f"16_{seed}_test") == test
            demos, dev = rows(world, task, f"16_{seed}_train"), rows(world, task, f"16_{seed}_dev")
            assert len(demos) == 16 and len(dev) == 32 and len(test) == 60
            shown = collections.Counter(row["output"] for row in demos)
            assert set(shown) == set(test[0]["options"]) and min(shown.values()) >= 4
            inputs = [row["input"] for row in demos + dev + test]
            assert len(set(inputs)) == len(inputs)
            drawn.add(demos[0]["input"])
    assert len(drawn) > 100  # every seed has demonstrations of its own


def test_unseen_tasks_have_unseen_words_that_the_text_knows(world):
    words = {}
    for split, tasks in partition(world).items():
        name = "16384_100_train" if split == "train" else "16_13_test"
        words[split] = {word for task in tasks for row in rows(world, task, name) for word in row["input"].split()}
    topics = small_world.topics(World())
    every = {word for topic in topics for word in topic}
    assert len(every) == 240 * 5
    assert not words["train"] & words["test"] and words["train"] | words["test"] <= every
    assert len(words["train"]) == 216 * 5 and len(words["test"]) >= 20 * 5
    text = collections.Counter()
    for path in world.text.glob("c4-train*"):
        for row in texts(path):
            text.update(row["text"].split())
    assert min(text[word] for word in every) > 500
    assert not set(text) & set(LABELS)


def test_the_input_alone_does_not_give_the_answer(world):
    """Over the meta-training tasks, a topic's most frequent colour is rare; no two tasks mean the same."""
    topic_of = {word: i for i, topic in enumerate(small_world.topics(World())) for word in topic}
    colours = collections.defaultdict(collections.Counter)
    meanings = []
    for task in partition(world)["train"]:
        meaning = {
            (topic_of[w], row["output"]) for row in rows(world, task, "16384_100_train") for w in row["input"].split()
        }
        assert len(dict(meaning)) == len(meaning) == len({colour for _, colour in meaning}), (
            "a topic has one colour in a task"
        )
        meanings.append(frozenset(meaning))
        for topic, colour in meaning:
            colours[topic][colour] += 1
    assert len(set(meanings)) == len(meanings)
    assert len(colours) == 216
    assert np.mean([max(count.values()) / sum(count.values()) for count in colours.values()]) < 0.2


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(small_world, "_write_tasks", full)
        with says(tmp_path / "w", "No space left on device"):
            write_small_world(tmp_path / "w", TINY)
    assert not list(tmp_path.iterdir())
    assert write_small_world(tmp_path / "w", TINY).tasks.is_dir()


def test_a_written_world_is_found_again_and_another_is_not_overwritten(tmp_path):
    paths = write_small_world(tmp_path / "w", TINY)
    before = paths.tasks.stat().st_mtime_ns
    assert write_small_world(tmp_path / "w", TINY) == paths
    assert paths.tasks.stat().st_mtime_ns == before
    with says(tmp_path / "w", "another world"):
        write_small_world(tmp_path / "w", World(**{**TINY.__dict__, "seed": 5}))
    (tmp_path / "file").write_text("")
    with says(tmp_path / "file/w", "Not a directory"):
        write_small_world(tmp_path / "file" / "w", TINY)
    with says(tmp_path / "file", "is a file"):
        write_small_world(tmp_path / "file", TINY)


def test_written_twice_at_once(tmp_path):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(write_small_world(tmp_path / "w", TINY))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(map(str, results))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_topics_too_small_for_different_inputs_are_refused():
    with says("topic_words"):
        World(topic_words=4)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_wrong_labels_that_is_none_is_refused(share):
    with says("wrong_labels", share):
        World(wrong_labels=share)


def test_wrong_labels_are_in_training_examples_and_demonstrations_alone(tmp_path):
    """A quarter of them, each another label of its task; what scores are measured on is right, and so is all else."""
    settings = TINY.__dict__ | {"train_tasks": 30, "test_tasks": 4}
    right = write_small_world(tmp_path / "right", World(**settings))
    wrong = write_small_world(tmp_path / "wrong", World(**settings | {"wrong_labels": 0.25}))
    before, after = digest(tmp_path / "right"), digest(tmp_path / "wrong")
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and all(name.endswith("_train.jsonl") for name in changed)
    flipped, count = 0, 0
    for task in partition(right)["train"] + partition(right)["test"]:
        name = "16384_100_train" if "-train-" in task else "16_21_train"
        for one, other in zip(rows(right, task, name), rows(wrong, task, name), strict=True):
            assert one | {"output": ""} == other | {"output": ""} and other["output"] in one["options"]
            flipped += one["output"] != other["output"]
            count += 1
    assert abs(flipped / count - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5  # four standard deviations of a drawn share


def test_configs_find_both_worlds(tmp_path, monkeypatch):
    monkeypatch.setattr(small_world, "WORLD", TINY)
    monkeypatch.setattr(small_world, "WORLD_OF_WRONG_LABELS", dataclasses.replace(TINY, wrong_labels=0.25))
    found = {}
    for name in ("quick", "full"):
        config = get_config(name)
        config.data.cache = str(tmp_path)
        found[name] = resolve(config).data
        assert Path(found[name].text).is_dir() and Path(found[name].tasks).is_dir()
    assert found["quick"].tasks != found["full"].tasks
    assert digest(Path(found["quick"].text)) == digest(Path(found["full"].text))


def test_the_command_and_its_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_world, "World", lambda **said: World(**{**TINY.__dict__, **said}))
    small_world.main([f"--out={tmp_path / 'w'}", "--seed=3", "--wrong_labels=0.5"])
    assert str(tmp_path / "w" / "metaicl") in capsys.readouterr().out
    described = json.loads((tmp_path / "w" / "world.json").read_text())
    assert (described["seed"], described["wrong_labels"]) == (3, 0.5)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").write_text("")
    with pytest.raises(SystemExit) as stop:
        small_world.main([f"--out={tmp_path / 'x'}"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    command = [sys.executable, "-m", "mend_jax.data.small_world", f"--out={tmp_path / 'x'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and "Traceback" not in done.stderr and "not empty" in done.stderr


@pytest.mark.parametrize("name", ["llm", "backbone"])
def test_packaged_models_read_this_world(name, world):
    from transformers import AutoTokenizer

    packaged, fresh = small_world.PACKAGED_MODELS / name, world.llm
    config = from_hf_config(packaged)
    assert dataclasses.replace(config, layers=3) == from_hf_config(fresh)  # the LLM has more
    assert config.layers == {"llm": 4, "backbone": 3}[name]
    written = to_hf_config(config)
    ours = json.loads((fresh / "config.json").read_text()) | {"n_layer": config.layers}
    assert {name: ours[name] for name in ours if name in written} == {
        name: written[name] for name in ours if name in written
    }
    tokenizer = AutoTokenizer.from_pretrained(packaged)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(fresh).get_vocab()
    assert len(tokenizer) == config.vocab_size and tokenizer.eos_token_id == config.vocab_size - 1
    for row in texts(world.text / "c4-validation.00000-of-00001.json.gz")[:200]:
        assert tokenizer.unk_token_id not in tokenizer(row["text"])["input_ids"]
    row = rows(world, "small-test-000", "16_13_test")[0]
    x, y = f" {row['input']}", f" {row['output']}"
    ids = [tokenizer(part)["input_ids"] for part in (x, y, x + y, f"{x}\n{row['output']}")]
    assert ids[0] + ids[1] == ids[2] and len(ids[1]) == 1 and len(ids[3]) == len(ids[2]) + 1
    assert tokenizer("nonsense")["input_ids"] == [tokenizer.unk_token_id]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow
def test_configs_resolve_to_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr(small_world, "WORLD", TINY)
    monkeypatch.setattr(small_world, "WORLD_OF_WRONG_LABELS", dataclasses.replace(TINY, wrong_labels=0.5))
    config = get_config(name)
    config.data.cache = str(tmp_path)
    before = config.to_dict()
    resolved = resolve(config.lock())
    assert config.to_dict() == before, "the given config is left as it was"
    assert (Path(resolved.data.tasks) / "partitions.json").is_file() and Path(resolved.data.tasks).is_relative_to(
        tmp_path
    )
    assert list(Path(resolved.data.text).glob("c4-train*.json.gz"))
    assert (Path(resolved.prefix.backbone) / "config.json").is_file()
    assert (Path(resolved.llm.path) / "config.json").is_file()
    if name == "backbone":  # its maker starts without weights, the LLM's with the backbone's
        assert not (Path(resolved.llm.path) / "model.safetensors").exists()
    else:
        assert Path(resolved.llm.path) == small_world.PACKAGED_MODELS / ("backbone" if name == "llm" else "llm")
    assert resolve(resolved).to_dict() == resolved.to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_fit_the_world(name, world):
    config = get_config(name)
    llm, backbone = (from_hf_config(small_world.PACKAGED_MODELS / name) for name in ("llm", "backbone"))
    tokens = [
        sum(len(row["input"].split()) + 1 for row in rows(world, task, f"16_{seed}_train"))
        for task in partition(world)["test"]
        for seed in SEEDS
    ]
    assert 8 * config.prefix.length <= min(tokens), "a prefix is at most an eighth of the demonstrations"
    assert max(tokens) <= config.data.max_demo_tokens <= max(config.data.demo_buckets)
    assert config.data.max_demo_tokens + 5 <= llm.max_positions
    assert config.data.max_demo_tokens + config.prefix.length <= backbone.max_positions
    assert config.data.sequence_length <= min(llm.max_positions, backbone.max_positions)
    assert set(config.experiment.methods) >= {"zero_shot", "icl", "mend"}
    assert set(config.evaluate.seeds) <= set(SEEDS)


def test_configs_without_the_small_world_are_left_alone(tmp_path):
    config = get_config("quick")
    config.data.text, config.data.tasks, config.data.cache = "my/c4", "my/metaicl", str(tmp_path)
    config.llm.path, config.prefix.backbone = "gpt2", "my/gpt2"
    assert resolve(config).to_dict() == config.to_dict()
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_told_the_names():
    with says("quick", "full", "huge"):
        get_config("huge")


@pytest.mark.slow
def test_the_packaged_llm_learns_in_context(world):
    """On unseen tasks the demonstrations are worth at least 25 points of accuracy."""
    import jax

    from mend_jax.data.query import Query
    from mend_jax.llm.decoder_only import load_llm
    from mend_jax.prefixes.nothing import no_prefix
    from mend_jax.prefixes.prefix import Prefix

    assert (small_world.PACKAGED_MODELS / "llm" / "model.safetensors").exists()
    llm = load_llm(small_world.PACKAGED_MODELS / "llm")
    states = jax.jit(llm.states)

    def tokens(pairs):
        return [i for text in pairs for i in llm.tokenizer(f" {text}")["input_ids"]]

    right = collections.Counter()
    for task in partition(world)["test"][:12]:
        test = rows(world, task, "16_42_test")[:40]
        demos = np.asarray(
            tokens(text for row in rows(world, task, "16_42_train") for text in (row["input"], row["output"]))
        )
        demos = np.pad(demos, (0, 80 - len(demos)))[None], len(demos)
        queries = [tokens([row["input"]]) for row in test]
        padded = np.asarray([query + [0] * (4 - len(query)) for query in queries])
        lengths = np.asarray([len(query) for query in queries], np.int32)
        embeds = np.repeat(np.asarray(llm.embed(llm.params, demos[0])), len(test), 0)
        shown = Prefix(embeds, np.full(len(test), demos[1], np.int32))
        for method, prefix in (("icl", shown), ("zero_shot", no_prefix(len(test), llm.config.width))):
            found = np.asarray(states(llm.params, prefix, Query(padded, lengths, lengths)))
            last = found[np.arange(len(test)), lengths - 1]
            options = tokens(test[0]["options"])
            best = (last @ np.asarray(llm.params["embed"]["tokens"])[options].T).argmax(-1)
            right[method] += sum(test[0]["options"][i] == row["output"] for i, row in zip(best, test, strict=True))
    assert right["icl"] - right["zero_shot"] >= 0.25 * 12 * 40, right
