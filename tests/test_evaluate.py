"""The evaluate command on a folder of MetaICL's files: its scores, its files, going on after an interruption."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_world import METHODS, files, known_models, make_config, make_distiller, write_tasks
from facts import says

from mend_jax import evaluate as ev
from mend_jax.data.evaluation import load_tasks
from mend_jax.interchange.trained import method_spec
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.layout import make_layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return load_llm(tiny_llm)


@pytest.fixture(scope="module")
def distiller(llm, tiny_backbone):
    return make_distiller(llm, tiny_backbone)


@pytest.fixture(autouse=True, scope="module")
def _one_llm():
    """Each LLM is compiled for anew: all evaluations on one device share theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ev, "load_llm", functools.cache(ev.load_llm))
        yield


@pytest.fixture
def config(folder, tiny_llm):
    return make_config(folder, tiny_llm)


@pytest.fixture
def models(monkeypatch, distiller, llm):
    return known_models(monkeypatch, distiller, llm)


@functools.partial(jax.jit, static_argnums=0)
def log_probs_of(llm, embeds):
    return jax.nn.log_softmax(llm.logits(llm.params, llm.model.apply({"params": llm.params}, embeds))[0])


def naive_scores(llm, prefix, item):
    """No cache, no batch: the LLM re-reads prefix, input and option, with padding behind them alone."""
    scores = []
    for option in item.options_tokens:
        tokens = jnp.asarray([[*item.x_tokens, *option]], jnp.int32)
        row = jnp.concatenate([prefix.embeds[0, : int(prefix.length[0])], llm.embed(llm.params, tokens)[0]])
        log_probs = np.asarray(log_probs_of(llm, jnp.pad(row, ((0, llm.window - len(row)), (0, 0)))[None]))
        start = int(prefix.length[0]) + len(item.x_tokens) - 1
        scores.append(np.mean([log_probs[start + i, token] for i, token in enumerate(option)]))
    return scores


def test_everything_equals_a_naive_evaluation(config, models, llm, tmp_path):
    config.evaluate.methods, config.evaluate.limit, config.evaluate.seeds = METHODS, 3, (13,)
    summary = ev.evaluate(config, tmp_path)
    tasks, missing = load_tasks(config, llm, "test")
    assert not missing and len(tasks) == 2 and all(len(task.items) == 3 for task in tasks)
    for task in tasks:
        demos = jnp.asarray([np.concatenate([np.concatenate([x, y]) for x, y in task.demos])], jnp.int32)
        length = jnp.asarray([demos.shape[1]])
        prefixes = {
            "zero_shot": Prefix(jnp.zeros((1, 0, 32)), jnp.asarray([0])),
            "icl": Prefix(llm.embed(llm.params, demos), length),
            "prompt": Prefix(models["a/prompt"].params["vectors"][None], jnp.asarray([3])),
            "mend": models["a/distiller"].apply(models["a/distiller"].params, demos, length),
        }
        for name, prefix in prefixes.items():
            path = next(tmp_path.glob(f"predictions/{name}-*/{task.task}_13.jsonl"))
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line, item in zip(lines, task.items, strict=True):
                expected = naive_scores(llm, prefix, item)
                np.testing.assert_allclose(line["scores"], expected, atol=2e-5)
                assert line["prediction"] == item.options[int(np.argmax(expected))]
                assert line["gold"] == item.options[item.label]
            entry = summary["methods"][name]["per_task"][task.task]
            right = [line["prediction"] == line["gold"] for line in lines]
            assert entry["accuracy"]["per_seed"] == {13: pytest.approx(np.mean(right))}
            assert entry["primary"] == ("macro_f1" if task.task == "colour" else "accuracy")


@pytest.mark.slow
def test_the_files_that_are_left(config, models, tmp_path, capsys):
    config.evaluate.methods = METHODS
    summary = ev.evaluate(config, tmp_path)
    assert len(files(tmp_path)) == 4 * 2 * 2
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(config.to_json())
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["methods"]["mend"]["score"]["mean"] == summary["methods"]["mend"]["score"]["mean"]
    assert [scores["methods"][m]["cost"]["prefix_length"] for m in ("zero_shot", "prompt", "mend")] == [0, 3, 5]
    assert scores["methods"]["icl"]["cost"]["prefix_length"] > 20
    table = (tmp_path / "table.md").read_text()
    printed, said = capsys.readouterr()
    assert said.startswith("Evaluating ") and str(tmp_path) in said
    assert table.startswith(printed.strip())
    for text in ("| mend", "±", "Macro-F1", "prefix length", "| colour", "| choice"):
        assert text in table


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(config, models, tmp_path, monkeypatch, capsys):
    config.evaluate.methods = METHODS
    ev.evaluate(config, tmp_path / "whole")
    original, done = ev.evaluate_task, []

    def interrupted(llm, prefix_of, task, **options):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append((task.task, task.seed))
        return original(llm, prefix_of, task, **options)

    monkeypatch.setattr(ev, "evaluate_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ev.evaluate(config, tmp_path / "cut")
    # Zero-shot reads no demonstrations: what it says of two tasks is that of both seeds.
    assert len(files(tmp_path / "cut")) == 4 + 3 and not (tmp_path / "cut" / "scores.json").exists()
    done.clear()
    monkeypatch.setattr(ev, "evaluate_task", lambda *a, **k: done.append(1) or original(*a, **k))
    ev.evaluate(config, tmp_path / "cut")
    assert len(done) == 2 + 4 + 2 + 4 - 5
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    done.clear()
    first = (tmp_path / "cut" / "table.md").read_text()
    assert scored_before(capsys) == 1  # of four methods
    ev.evaluate(config, tmp_path / "cut")
    assert scored_before(capsys) == len(METHODS)
    assert not done and (tmp_path / "cut" / "table.md").read_text() == first


def scored_before(capsys):
    """Of how many methods the user was told that all was there already."""
    return len(re.findall(r"\bscored before\b", capsys.readouterr().err))


def test_a_cut_file_is_computed_again(config, tmp_path):
    ev.evaluate(config, tmp_path)
    before = files(tmp_path)
    path = next(tmp_path.glob("predictions/icl-*/choice_21.jsonl"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]) + '{"item": 4, "sc')
    ev.evaluate(config, tmp_path)
    assert files(tmp_path) == before


@pytest.mark.slow
def test_predictions_of_something_else_are_not_used(config, models, tmp_path, monkeypatch, folder):
    """Another checkpoint, template or number of demonstrations, or edited data: computed anew, never mixed."""
    original, done = ev.evaluate_task, []
    monkeypatch.setattr(ev, "evaluate_task", lambda *a, **k: done.append(1) or original(*a, **k))

    def computed():
        done.clear()
        ev.evaluate(config, tmp_path)
        return len(done)

    config.evaluate.methods = ("zero_shot", "mend=a/distiller")
    assert (computed(), computed()) == (2 + 4, 0)
    distiller = models["a/distiller"]
    placeholders = distiller.params["placeholders"] + 1.0
    models["a/distiller"] = dataclasses.replace(distiller, params=distiller.params | {"placeholders": placeholders})
    assert computed() == 4
    models["a/distiller"] = distiller
    assert computed() == 0
    config.data.template = "newline"
    assert computed() == 6
    config.data.template, config.evaluate.limit = "space", 5
    assert computed() == 6
    config.evaluate.limit = 0
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    train = copy / "data" / "choice" / "choice_4_13_train.jsonl"
    train.write_text("".join(reversed(train.read_text().splitlines(keepends=True))))
    config.data.tasks = str(copy)
    assert computed() == 1  # zero-shot reads no demonstrations


def test_seeds_that_ask_the_same_are_scored_once(config, models, tmp_path, monkeypatch, capsys, folder):
    """By what reads no demonstrations; other items of a seed are other questions."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    test = copy / "data" / "choice" / "choice_4_21_test.jsonl"
    test.write_text("".join(reversed(test.read_text().splitlines(keepends=True))))
    original, done = ev.evaluate_task, []
    monkeypatch.setattr(ev, "evaluate_task", lambda *a, **k: done.append(1) or original(*a, **k))
    config.data.tasks, config.evaluate.methods = str(copy), ("zero_shot", "icl")
    found = ev.evaluate(config, tmp_path / "out")["methods"]
    assert len(done) == (1 + 2) + 4 and "zero_shot" in capsys.readouterr().err
    assert found["zero_shot"]["score"]["per_seed"].keys() == {13, 21}
    one, other = (next((tmp_path / "out").glob(f"predictions/zero_shot-*/colour_{seed}.jsonl")) for seed in (13, 21))
    assert one.read_text() == other.read_text()


@pytest.mark.slow
def test_shuffled_demonstrations_are_fresh_per_item_and_the_same_each_time(config, models, tmp_path):
    config.evaluate.methods, config.evaluate.limit = ("zero_shot", "icl", "mend=a/distiller"), 4
    ev.evaluate(config, tmp_path / "plain")
    config.evaluate.shuffle_demos = True
    ev.evaluate(config, tmp_path / "one")
    ev.evaluate(config, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name, changes in {"zero_shot": False, "icl": True, "mend": True}.items():
        plain, shuffled = (
            next((tmp_path / run).glob(f"predictions/{name}-*/colour_13.jsonl")).read_text() for run in ("plain", "one")
        )
        assert (plain != shuffled) == changes


@pytest.mark.parametrize("beside, text", [("checkpoints", "the training's"), ("hub", '{"model_type": "gpt2"}')])
def test_an_evaluation_leaves_the_config_of_a_training_or_a_model_in_its_workdir(beside, text, config, tmp_path):
    (tmp_path / beside).mkdir()
    (tmp_path / "config.json").write_text(text)
    config.evaluate.methods, config.evaluate.limit = ("zero_shot",), 1
    for _ in range(2):
        ev.evaluate(config, tmp_path)
        assert (tmp_path / "config.json").read_text() == text


@pytest.mark.slow
def test_on_a_mesh_both_models_lie_in_parts_and_predict_as_on_one_device(config, models, tmp_path):
    config.evaluate.methods, config.evaluate.seeds = METHODS, (13,)
    ev.evaluate(config, tmp_path / "one")
    config.train.parallel, config.mesh.data, config.mesh.fsdp, config.mesh.tensor = "mesh", 2, 2, 2
    ev.evaluate(config, tmp_path / "mesh")
    for name, text in files(tmp_path / "one").items():
        found = (tmp_path / "mesh" / name).read_text()
        for line, wanted in zip(*(map(json.loads, part.splitlines()) for part in (found, text)), strict=True):
            np.testing.assert_allclose(line.pop("scores"), wanted.pop("scores"), atol=2e-5)
            assert line == wanted
    llm, methods = ev.load_models(config, make_layout("mesh", config.mesh))
    for params in (llm.params, methods[-1].model.params["backbone"]):
        kernel = params["layers"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    config.mesh.fsdp, config.mesh.tensor = 1, 4
    with says("mesh.tensor=4", "2 heads"):
        ev.evaluate(config, tmp_path / "mesh")


def test_the_sum_is_the_mean_times_the_length(config, models, tmp_path):
    """evaluate.option_score: another choice of answers, and predictions of their own."""
    config.evaluate.methods, config.evaluate.limit, config.evaluate.seeds = ("zero_shot",), 3, (13,)
    ev.evaluate(config, tmp_path)
    config.evaluate.option_score = "sum"
    ev.evaluate(config, tmp_path)
    both = [json.loads(line) for text in files(tmp_path).values() for line in text.splitlines()]
    assert len(both) == 12
    for line in both:
        twins = [other for other in both if (other["item"], other["options"]) == (line["item"], line["options"])]
        lengths = [len(option.split()) for option in line["options"]]
        means, sums = (np.asarray(twin["scores"]) for twin in sorted(twins, key=lambda twin: -sum(twin["scores"])))
        np.testing.assert_allclose(sums, means * lengths, atol=1e-4)
        assert line["prediction"] == line["options"][int(np.argmax(line["scores"]))]


def test_times_are_of_what_was_not_compiled_on_the_way(config, models, tmp_path):
    config.evaluate.methods, config.evaluate.seeds = ("mend=a/distiller",), (13, 21)
    jax.clear_caches()
    ev.evaluate(config, tmp_path)
    costs = [json.loads(text) for text in files(tmp_path, ".cost.json").values()]
    costs = [{name: cost[name] for name in cost.keys() - {"checksum", "predictions"}} for cost in costs]
    assert {cost["compiled"] for cost in costs} == {True, False}
    mean = ev._mean_cost(costs)
    assert mean["item_seconds"] == np.median([cost["item_seconds"] for cost in costs if not cost["compiled"]])
    assert "compiled" not in mean and mean["prefix_length"] == 5
    cold = ev._mean_cost([cost for cost in costs if cost["compiled"]])
    assert cold["item_seconds"] is None and cold["prefix_length"] == 5


def test_the_parts_of_a_method():
    for text, parts in (
        ("runs/x", ("", 0, "runs/x")),
        ("first8:runs/x", ("", 8, "runs/x")),
        ("chunked:runs/x", ("chunked", 0, "runs/x")),
        ("chunked:first8:runs/x", ("chunked", 8, "runs/x")),
        ("C:/runs/x", ("", 0, "C:/runs/x")),
    ):
        assert method_spec(text) == parts
