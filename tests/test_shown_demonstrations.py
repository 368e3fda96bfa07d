"""Evaluations whose demonstrations are not the files': each item's own, perturbed, in another order."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_world import files, make_config, write_tasks
from facts import says
from test_evaluate import naive_scores

from mend_jax import evaluate as ev
from mend_jax.data import metaicl
from mend_jax.data.evaluation import load_tasks
from mend_jax.llm.decoder_only import load_llm
from mend_jax.llm.embeddings import encoder_of, mean_states
from mend_jax.prefixes import Demonstrations
from mend_jax.prefixes.prefix import Prefix
from mend_jax.scoring import tasks as task_scoring


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return load_llm(tiny_llm)


@pytest.fixture
def config(folder, tiny_llm, tmp_path):
    c = make_config(folder, tiny_llm)
    c.data.cache, c.evaluate.seeds = str(tmp_path / "cache"), (13,)
    return c


def shown(task, item):
    return task.demos if item.shown is None else [task.demos[i] for i in item.shown]


def texts(task, item):
    return [(x.tolist(), y.tolist()) for x, y in shown(task, item)]


def test_each_item_after_its_own_prefix_equals_a_naive_evaluation(config, llm, tmp_path):
    """Batches of prefixes and items, of which the last is not full, and rows of several lengths."""
    config.evaluate.methods, config.evaluate.tasks = ("icl",), ("choice",)
    config.evaluate.demos, config.data.k, config.evaluate.limit, config.evaluate.batch_size = "random", 2, 5, 3
    ev.evaluate(config, tmp_path / "run", llm)
    [task], _ = load_tasks(config, llm, "test")
    assert len({item.shown for item in task.items}) > 1 and all(len(item.shown) == 2 for item in task.items)
    lines = next((tmp_path / "run").glob("predictions/icl-*/choice_13.jsonl")).read_text().splitlines()
    embed = jax.jit(lambda tokens: llm.embed(llm.params, tokens))
    for line, item in zip(lines, task.items, strict=True):
        demos = np.concatenate([np.concatenate(pair) for pair in shown(task, item)])
        embeds = embed(np.pad(demos, (0, 32 - len(demos)))[None])
        expected = naive_scores(llm, Prefix(embeds, np.asarray([len(demos)])), item)
        np.testing.assert_allclose(json.loads(line)["scores"], expected, atol=2e-5)


def test_the_neighbours_of_the_llms_own_states(config, llm):
    assert encoder_of(config, llm) is None
    config.evaluate.demos, config.data.k = "dense", 3
    encoder = encoder_of(config, llm)
    others = [
        encoder_of(config, dataclasses.replace(llm, **change))[0] for change in ({"bos": 1}, {"dtype": "bfloat16"})
    ]
    config.llm.weights = "int8"
    assert len({encoder[0], encoder_of(config, llm)[0], *others}) == 4  # neighbours are kept under this name
    config.llm.weights = "full"
    tasks, _ = load_tasks(config, llm, "test", encoder)
    assert len(tasks) == 2 and all(len(item.shown) == 3 for task in tasks for item in task.items)
    sentences = ["w1 w2 w3", "w4", "w1 w2 w3 w5 w6"]
    alone = [mean_states(llm, [text])[0] for text in sentences]
    np.testing.assert_allclose(encoder[1](sentences), alone, atol=1e-5)
    tokens = jnp.asarray([llm.tokenizer(sentences[0], add_special_tokens=False)["input_ids"]], jnp.int32)
    states = jax.jit(lambda ids: llm.model.apply({"params": llm.params}, llm.embed(llm.params, ids)))(tokens)
    np.testing.assert_allclose(alone[0], np.asarray(states)[0].mean(0), atol=1e-5)


def test_perturbed_and_reordered_ones_are_read(config, llm):
    [plain, _], _ = load_tasks(config, llm, "test")
    config.evaluate.perturb = "no_input"
    [labels, _], _ = load_tasks(config, llm, "test")
    assert [(len(x), y.tolist()) for x, y in labels.demos] == [(0, y.tolist()) for _, y in plain.demos]
    config.evaluate.perturb, config.data.template = "no_label", "qa"
    [inputs, _], _ = load_tasks(config, llm, "test")
    assert all(len(x) > 0 and len(y) == 0 for x, y in inputs.demos)
    assert all("" not in pair[:1] and pair[1] == "" for pair in inputs.texts)
    config.evaluate.perturb, config.data.template, config.evaluate.order = "none", "space", 3
    [ordered, _], _ = load_tasks(config, llm, "test")
    as_texts = [[(x.tolist(), y.tolist()) for x, y in task.demos] for task in (plain, ordered)]
    assert as_texts[0] != as_texts[1] and sorted(as_texts[0]) == sorted(as_texts[1])


def test_the_demonstrations_of_another_task(config, llm):
    config.evaluate.perturb = "irrelevant"
    (first, second), _ = load_tasks(config, llm, "test")
    config.evaluate.perturb = "none"
    (own, other), _ = load_tasks(config, llm, "test")
    assert {str(texts(first, first.items[0])[i]) for i in range(4)} <= {
        str(pair) for pair in texts(other, other.items[0])
    }
    config.evaluate.perturb, config.evaluate.tasks = "irrelevant", ("colour",)
    with says("'colour'", "evaluate.perturb"):
        load_tasks(config, llm, "test")


def test_validation_in_training_reads_the_files(config, llm):
    model = Demonstrations.beside(llm)
    plain = task_scoring.dev_tasks(config, llm, model)
    config.evaluate.demos, config.data.k = "pool", 5  # more than a file has
    longer = task_scoring.dev_tasks(config, llm, model)
    assert {len(task.demos) for task in longer} == {5}
    for short, long in zip(plain, longer, strict=True):  # the same ones and another
        assert all(
            np.array_equal(a, b)
            for x, y in zip(short.demos, long.demos, strict=False)
            for a, b in zip(x, y, strict=True)
        )
    config.data.k, config.evaluate.demos, config.evaluate.perturb, config.evaluate.order = 4, "random", "wrong_label", 2
    found = task_scoring.dev_tasks(config, llm, model)
    assert [task_scoring.content_of(task, True) for task in plain] == [
        task_scoring.content_of(task, True) for task in found
    ]


def test_a_pool_begins_with_the_seeds_file_for_seed_100_too(config):
    """The pool's own file is named by seed 100 (MetaICL's training files are)."""
    folder = metaicl.data_folder(config.data.tasks) / "colour"
    file = metaicl.example_file(config.data.tasks, "colour", 4, 13, "train")
    (folder / file.name.replace("_13_", "_100_")).write_text(file.read_text())
    (folder / f"colour_{metaicl.META_TRAIN}.jsonl").write_text(2 * file.read_text())
    names = [metaicl.largest_file(config.data.tasks, "colour", seed, "train").name for seed in (13, 100)]
    assert names[1] == names[0].replace("_13_", "_100_")
    assert metaicl.largest_file(config.data.tasks, "colour", 99, "train") is None


def test_validation_in_training_has_its_own_seeds(config, llm):
    model, config.evaluate.seeds = Demonstrations.beside(llm), (13, 21)
    seeds = config.evaluate.seeds
    assert {task.seed for task in task_scoring.dev_tasks(config, llm, model)} == set(seeds)
    files = metaicl.held_out_files(config)
    config.data.validation_seeds = seeds[:1]
    assert {task.seed for task in task_scoring.dev_tasks(config, llm, model)} == set(seeds[:1])
    assert set(metaicl.held_out_files(config)) < set(files)
    config.evaluate.tasks = ("colour",)
    fewer = metaicl.held_out_files(config)
    config.stage = "lm"  # holds out examples of every task
    assert set(fewer) < set(metaicl.held_out_files(config))
    config.stage, config.evaluate.tasks = "finetune", ()
    config.data.validation_seeds = (77,)
    with says("config.data.validation_seeds", 77):
        task_scoring.dev_tasks(config, llm, model)
    config.evaluate.seeds = (21, 66)
    with says("--config.evaluate.seeds=21", 66):
        load_tasks(config, llm, "dev")


def test_predictions_after_other_demonstrations_are_kept_apart(config, llm, monkeypatch, tmp_path):
    def answered(llm, prefix_of, task, **_):
        lines = [
            {
                "prediction": item.options[0],
                "gold": item.options[item.label],
                "options": list(item.options),
                "scores": [-float(i) for i in range(len(item.options))],
            }
            for item in task.items
        ]
        cost = {"prefix_length": 1.0, "prefix_seconds": 0.0, "item_seconds": 0.0, "compiled": False}
        return task_scoring.TaskResult(lines, cost)

    monkeypatch.setattr(ev, "evaluate_task", answered)
    config.evaluate.methods, config.evaluate.limit, config.evaluate.seeds = ("zero_shot", "icl"), 2, (13, 21)
    ev.evaluate(config, tmp_path, llm)
    before = files(tmp_path)
    config.evaluate.perturb = "wrong_label"
    ev.evaluate(config, tmp_path, llm, prints=False)
    after = files(tmp_path)
    assert before.items() <= after.items() and len(after) == len(before) + 4  # of icl alone
    config.evaluate.perturb, config.evaluate.demos, config.data.k = "none", "bm25", 2
    found = ev.evaluate(config, tmp_path, llm, prints=False)
    assert found["methods"]["icl"]["scored"] == 2  # of two seeds with the same items and neighbours, one
    config.evaluate.shuffle_demos = True
    found = ev.evaluate(config, tmp_path, llm, prints=False)
    assert found["methods"]["icl"]["scored"] == 4  # their orders are drawn by the seed


def test_a_pool_that_is_too_small(config, llm):
    config.evaluate.demos, config.data.k = "bm25", 100
    with says("'colour' (", "'choice' (", "config.data.k = 100"):
        load_tasks(config, llm, "test")
