"""What evaluation reads: the demonstrations of each seed, the items with all their options, and what is refused."""

import json
from types import SimpleNamespace

import pytest
from conftest import save_tokenizer
from data_files import make_world, tiny_config, write_examples
from facts import says, states

from mend_jax.data.evaluation import load_tasks


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(folder), path=folder, config=SimpleNamespace(vocab_size=64)
    )


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def raw(world, name):
    return [json.loads(line) for line in (world / "metaicl" / "data" / "t" / name).read_text().splitlines()]


@pytest.mark.parametrize("split", ["test", "dev"])
def test_every_task_and_seed(world, llm, split):
    tasks, missing = load_tasks(tiny_config(world, "finetune"), llm, split)
    assert [(task.task, task.seed) for task in tasks] == [("t", 13), ("t", 21)] and missing == []
    ids = lambda text: llm.tokenizer(" " + text)["input_ids"]  # noqa: E731
    for task in tasks:
        assert task.classification
        assert [(x.tolist(), y.tolist()) for x, y in task.demos] == [
            (ids(row["input"]), ids(row["output"])) for row in raw(world, f"t_4_{task.seed}_train.jsonl")
        ]
        rows = raw(world, f"t_4_{task.seed}_{split}.jsonl")
        assert len(task.items) == len(rows)
        for item, row in zip(task.items, rows, strict=True):
            assert item.x_tokens.tolist() == ids(row["input"])
            assert [option.tolist() for option in item.options_tokens] == [ids(option) for option in row["options"]]
            assert item.options == tuple(row["options"]) and item.options[item.label] == row["output"]


def test_separators_stand_in_the_tokens(world, shared):
    from transformers import AutoTokenizer

    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    llm = SimpleNamespace(tokenizer=gpt2, path="gpt2", config=SimpleNamespace(vocab_size=50257))
    config = tiny_config(world, "finetune", max_input_tokens=900)
    for template, mark in (("space", " "), ("newline", "\n")):
        config.data.template = template
        task = load_tasks(config, llm, "test")[0][0]
        text = "".join(gpt2.decode(part) for pair in task.demos for part in pair)
        rows = raw(world, "t_4_13_train.jsonl")
        assert text == "".join(mark + part for row in rows for part in (row["input"], row["output"]))
        item = task.items[0]
        assert gpt2.decode(item.options_tokens[0]) == mark + item.options[0]


def test_inputs_are_cut_and_options_are_not(world, llm):
    long = " ".join(["w1"] * 9)
    for seed in (13, 21):
        for split in ("train", "test"):
            path = world / "metaicl" / "data" / "t" / f"t_4_{seed}_{split}.jsonl"
            write_examples(path, "t", [(long, long)] * 4, [long, "w2"])
    for task in load_tasks(tiny_config(world, "finetune"), llm, "test")[0]:
        assert {len(x) for x, _ in task.demos} == {6} and {len(y) for _, y in task.demos} == {9}
        assert {len(item.x_tokens) for item in task.items} == {6}
        assert {len(item.options_tokens[0]) for item in task.items} == {9}


def test_limit_and_chosen_tasks(world, llm):
    config = tiny_config(world, "finetune")
    config.evaluate.limit = 3
    config.evaluate.tasks = ("t",)
    assert [len(task.items) for task in load_tasks(config, llm, "test")[0]] == [3, 3]
    config.evaluate.tasks = ("tt",)
    with says("config.evaluate.tasks", "'tt'", "meta-test", "'tiny'", "'t'"):
        load_tasks(config, llm, "test")


def test_the_metric_is_that_of_all_items_of_all_seeds(world, llm):
    """Without a tasks.json the options decide; those of one item are always the same."""
    rows = [(f"w{i} w2", "w3") for i in range(4)]
    for seed, options in ((13, ["w3", "w4"]), (21, ["w3", "w5"])):
        write_examples(world / "metaicl" / "data" / "t" / f"t_4_{seed}_test.jsonl", "t", rows, options)
    config = tiny_config(world, "finetune")
    for limit in (0, 1):
        config.evaluate.limit = limit
        assert [task.classification for task in load_tasks(config, llm, "test")[0]] == [False, False]


def test_missing_tasks(world, llm, caplog):
    partitions = {"tiny": {"train": [], "test": ["zz", "t"]}, "none": {"train": [], "test": ["zz"]}}
    (world / "metaicl" / "partitions.json").write_text(json.dumps(partitions))
    config = tiny_config(world, "finetune")
    tasks, missing = load_tasks(config, llm, "test")
    assert {task.task for task in tasks} == {"t"} and missing == ["zz"]
    states(caplog.messages[0], "1 of 2", "meta-test", "zz")
    config.data.partition = "none"
    with says("meta-test", "'none'", world / "metaicl/data/zz/zz_4_13_train.jsonl", "config.data.tasks"):
        load_tasks(config, llm, "test")
    config.data.partition, config.evaluate.seeds = "tiny", (13, 99)
    config.evaluate.tasks = ("t",)
    with says("seed 13", 99, "--config.evaluate.seeds=13"):
        load_tasks(config, llm, "test")


def test_no_task_with_all_seeds(world, llm):
    """Each seed has files of some task: the first file that is missing is named."""
    config = tiny_config(world, "finetune")
    (world / "metaicl" / "partitions.json").write_text(json.dumps({"tiny": {"train": [], "test": ["t"]}}))
    (world / "metaicl" / "data" / "t" / "t_4_21_dev.jsonl").unlink()
    with says("seed 13", 21, "--config.evaluate.seeds=13"):
        load_tasks(config, llm, "dev")
    other = world / "metaicl" / "data" / "s"
    other.mkdir()
    for split in ("train", "dev"):
        write_examples(other / f"s_4_21_{split}.jsonl", "s", [("w1", "w2")] * 4, ["w2"])
    (world / "metaicl" / "partitions.json").write_text(json.dumps({"tiny": {"train": [], "test": ["t", "s"]}}))
    with says(world / "metaicl/data/t/t_4_21_dev.jsonl", "config.data.k", 4, "config.evaluate.seeds"):
        load_tasks(config, llm, "dev")


def test_free_form_items_are_refused(world, llm):
    path = world / "metaicl" / "data" / "t" / "t_4_13_test.jsonl"
    write_examples(path, "t", [("w1", "w2")], [])
    with says(f"{path}, example 1", "0 different options"):
        load_tasks(tiny_config(world, "finetune"), llm, "test")


def test_identical_options_are_one(world, llm):
    """As in MetaICL's commonsense_qa, where the right one stands twice now and then."""
    path = world / "metaicl" / "data" / "t" / "t_4_13_test.jsonl"
    write_examples(path, "t", [("w1", "w9"), ("w2", "w8 w7")], ["w8 w7", "w9", "w9", "w8 w7"])
    items = load_tasks(tiny_config(world, "finetune"), llm, "test")[0][0].items
    assert [item.options for item in items] == [("w8 w7", "w9")] * 2 and [item.label for item in items] == [1, 0]
    assert [len(option) for option in items[0].options_tokens] == [2, 1]
    write_examples(path, "t", [("w1", "w9")], ["w9", "w9"])
    with says(f"{path}, example 1", "1 different options"):
        load_tasks(tiny_config(world, "finetune"), llm, "test")


def test_options_that_the_tokenizer_cannot_tell_apart_are_said(world, llm, caplog):
    path = world / "metaicl" / "data" / "t" / "t_4_13_test.jsonl"
    write_examples(path, "t", [("w1", "cat"), ("w2", "dog")], ["cat", "w9", "dog"])
    load_tasks(tiny_config(world, "finetune"), llm, "test")
    [said] = caplog.messages
    states(said, "t", "tokenizer", "2 items", "'cat' and 'dog'")


def test_empty_task_and_bad_line(world, llm):
    path = world / "metaicl" / "data" / "t" / "t_4_21_test.jsonl"
    path.write_text("")
    with says(path, "no examples"):
        load_tasks(tiny_config(world, "finetune"), llm, "test")
    path.write_text('{"task": "t", "input": "w1", "output": "w9", "options": ["w1", "w2"]}\n')
    with says(f"{path}, line 1", "output 'w9'", "['w1', 'w2']"):
        load_tasks(tiny_config(world, "finetune"), llm, "test")


def test_tokenizers_that_do_not_do(world, llm):
    config = tiny_config(world, "finetune")
    with says("here", "no tokenizer"):
        load_tasks(config, SimpleNamespace(tokenizer=None, path="here", config=llm.config), "test")
    small = SimpleNamespace(tokenizer=llm.tokenizer, path="here", config=SimpleNamespace(vocab_size=10))
    with says(61, "LLM", 10):
        load_tasks(config, small, "test")


def test_real_tasks(shared, llm, tmp_path):
    config = tiny_config(tmp_path, "finetune", tasks=str(shared / "metaicl"), partition="class_to_class", k=16)
    tasks, missing = load_tasks(config, llm, "dev")
    assert missing == [] and all(task.classification for task in tasks)
    assert len({task.task for task in tasks}) == 16 and all(len(task.demos) == 16 for task in tasks)
