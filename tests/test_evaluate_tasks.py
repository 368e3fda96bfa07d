"""What a method scores on a task, in training and in the evaluate command alike; mistakes that an evaluation ends in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_world import files, known_models, make_config, make_distiller, write_tasks
from facts import says

from mend_jax import evaluate as ev
from mend_jax.data.evaluation import EvalTask, Item, load_tasks
from mend_jax.llm.decoder_only import load_llm
from mend_jax.models.decoder import init_params
from mend_jax.models.families import DecoderConfig
from mend_jax.prefixes import Demonstrations
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.soft_prompt import SoftPrompt
from mend_jax.run.layout import make_layout
from mend_jax.scoring import tasks as task_scoring
from mend_jax.scoring.results import tree_hash
from mend_jax.scoring.tasks import evaluate_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return load_llm(tiny_llm)


@pytest.fixture(scope="module")
def distiller(llm, tiny_backbone):
    return make_distiller(llm, tiny_backbone)


@pytest.fixture
def config(folder, tiny_llm):
    return make_config(folder, tiny_llm)


@pytest.fixture
def models(monkeypatch, distiller, llm):
    return known_models(monkeypatch, distiller, llm)


def test_demonstrations_that_do_not_fit_are_left_out(config, llm):
    task = load_tasks(config, llm, "test")[0][0]
    lengths = [len(x) + len(y) for x, y in task.demos]
    icl = Demonstrations.beside(llm)
    config.data.max_demo_tokens = sum(lengths[:3])
    assert len(task_scoring.make_context(config, llm, icl, task)) == sum(lengths[:3])
    config.data.max_demo_tokens = sum(lengths[:3]) - 1
    assert len(task_scoring.make_context(config, llm, icl, task)) == sum(lengths[:2])
    config.data.max_demo_tokens = lengths[0] - 1
    with says("colour", "seed 13", f"{lengths[0] - 1} tokens", "data.max_demo_tokens"):
        task_scoring.make_context(config, llm, icl, task)


@pytest.mark.slow
def test_test_and_dev_scores_have_one_precision(config, models, llm, distiller, tmp_path):
    """prefix.dtype is that of a trained distiller too, and its predictions are kept apart from float32's."""
    config.evaluate.methods, config.evaluate.seeds, config.evaluate.limit = ("mend=a/distiller",), (13,), 3
    ev.evaluate(config, tmp_path)
    config.prefix.dtype = "bfloat16"
    ev.evaluate(config, tmp_path)
    assert len(files(tmp_path)) == 2 * 2
    [method] = ev.load_methods(config, llm, make_layout("pmap"))
    task = load_tasks(config, llm, "test")[0][0]
    in_training = dataclasses.replace(distiller, dtype="bfloat16")
    methods = [task_scoring.Method("mend", model) for model in (method.model, in_training, distiller)]
    prefixes = [task_scoring.prefix_maker(config, llm, method)(task) for method in methods]
    assert np.array_equal(prefixes[0].embeds, prefixes[1].embeds)
    assert 0 < np.abs(prefixes[0].embeds - prefixes[2].embeds).max() < 0.2


@pytest.mark.slow
def test_dev_score_follows_the_params_without_compiling_again(config, llm, distiller):
    tasks = task_scoring.dev_tasks(config, llm, distiller)
    first = task_scoring.dev_score(config, llm, distiller, distiller.params, tasks)
    compiled = task_scoring._apply._cache_size()
    other = jax.tree.map(lambda a: -3 * a, distiller.params)
    second = task_scoring.dev_score(config, llm, distiller, other, tasks)
    assert task_scoring._apply._cache_size() == compiled
    assert 0 <= first <= 1 and 0 <= second <= 1
    replaced = dataclasses.replace(distiller, params=other)
    assert task_scoring.dev_score(config, llm, replaced, other, tasks) == second


@pytest.mark.parametrize("shuffled", [False, True])
def test_dev_score_takes_the_order_of_the_demonstrations_of_the_test(config, llm, distiller, monkeypatch, shuffled):
    original, orders = task_scoring.evaluate_task, []

    def watched(llm, prefix_of, task, *args, **options):
        return original(llm, lambda t, *own: orders.append(own) or prefix_of(t, *own), task, *args, **options)

    monkeypatch.setattr(task_scoring, "evaluate_task", watched)
    config.evaluate.shuffle_demos, config.evaluate.seeds, config.evaluate.limit = shuffled, (13,), 2
    tasks = task_scoring.dev_tasks(config, llm, distiller)
    task_scoring.dev_score(config, llm, distiller, distiller.params, tasks)
    assert len(orders) == 2 and all(len(own) == shuffled for own in orders)
    for [of_items] in orders if shuffled else ():
        assert (
            len(of_items) == 2 and of_items[0] != of_items[1] and all(sorted(one) == [0, 1, 2, 3] for one in of_items)
        )
    orders.clear()
    prompt = SoftPrompt({"vectors": distiller.params["projection"]["kernel"][:3]})
    task_scoring.dev_score(config, llm, prompt, prompt.params, tasks)
    assert orders == [(), ()]


def test_the_hash_of_weights_sees_every_change():
    params = init_params(DecoderConfig("gpt2", 11, 8, 1, 2, 16, 8), 0)
    changed = jax.tree.map(np.array, params)
    assert tree_hash(params) == tree_hash(changed)
    changed["final_norm"]["bias"][3] = 1e-20
    assert tree_hash(params) != tree_hash(changed)


@pytest.mark.parametrize(
    "methods, facts",
    [
        (("zeroshot",), ["'zeroshot'", "zero_shot", "NAME=PATH"]),
        (("icl", "icl"), ["'icl'", "twice"]),
        (("icl=a/distiller",), ["'icl=a/distiller'", "NAME"]),
        (("a/b=a/distiller",), ["'a/b=a/distiller'", "NAME"]),
        (("mend=/nowhere/at/all",), ["/nowhere/at/all"]),
        ((), ["config.evaluate.methods", "empty"]),
    ],
)
def test_bad_methods_are_one_sentence(config, tmp_path, methods, facts):
    config.evaluate.methods = methods
    with says(*facts):
        ev.evaluate(config, tmp_path)
    assert not (tmp_path / "scores.json").exists()


def test_a_model_for_another_llm_is_refused(config, models, distiller, tmp_path):
    models["a/distiller"] = dataclasses.replace(distiller, llm_width=48)
    config.evaluate.methods = ("mend=a/distiller",)
    with says("width 48", 32):
        ev.evaluate(config, tmp_path)


def test_scores_that_are_not_numbers_stop_the_evaluation(config, models, distiller, tmp_path):
    broken = distiller.params | {"placeholders": distiller.params["placeholders"].at[0, 0].set(jnp.nan)}
    models["a/distiller"] = dataclasses.replace(distiller, params=broken)
    config.evaluate.methods = ("mend=a/distiller",)
    with says("colour, seed 13", "item 0", "not finite"):
        ev.evaluate(config, tmp_path)
    assert not files(tmp_path)


def test_an_item_that_cannot_be_scored_is_said_with_its_task(llm):
    items = [Item(np.zeros(0, np.int32), [np.ones(1, np.int32)] * 2, ("a", "b"), 0)]
    task = EvalTask("t", 13, [], items, True)
    with says("t, seed 13", "input", "empty"):
        evaluate_task(llm, lambda *_: no_prefix(1, llm.config.width), task, batch_size=4)


def test_a_workdir_that_cannot_be_written_is_said(config, tmp_path):
    (tmp_path / "file").write_text("")
    with says(tmp_path / "file", "cannot be written"):
        ev.evaluate(config, tmp_path / "file")
