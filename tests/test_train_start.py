"""What training checks before its first step: tokenizers, dev examples, the run that it starts from."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from data_files import make_world, tiny_config, words
from facts import says, states
from tiny_training import RandomBatches, config, model_folder

from mend_jax import train
from mend_jax.data import tokenize
from mend_jax.interchange.export import export
from mend_jax.run import build, checkpoint, checks, reporting
from mend_jax.scoring import tasks as task_scoring

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture
def no_data(monkeypatch):
    """Nothing may be read or prepared before the checks."""
    monkeypatch.setattr(build, "make_batches", lambda *_, **__: pytest.fail("the checks come first"))


@pytest.fixture
def finetuning(tmp_path, tiny_llm, tiny_backbone):
    """A config that finetunes two steps on real files and evaluates after each."""
    c = tiny_config(make_world(tmp_path / "world"), "finetune")
    c.llm.path, c.prefix.backbone = str(tiny_llm), str(tiny_backbone)
    c.train.batch_size, c.train.steps, c.train.eval_every = jax.device_count(), 2, 1
    return c


@pytest.fixture
def no_models(monkeypatch):
    monkeypatch.setattr(build, "load", lambda config: pytest.fail("the settings are checked first"))


@pytest.mark.parametrize(
    "stage, fields, facts",
    [
        ("pretrain", {"prefix.length": 47}, ["48 tokens", "no room", "prefix.length = 47"]),
        ("finetune", {"prefix.length": 48}, ["48 tokens", "no room", "prefix.length = 48"]),
        (
            "pretrain",
            {"data.max_text_tokens": 1024},
            [
                "data.max_text_tokens = 1024",
                "205 tokens",
                48,
                "prefix.length = 4",
                "lower data.max_text_tokens to 220",
                "or prefix.length",
            ],
        ),
        (
            "pretrain",
            {"prefix.length": 44},
            ["8 tokens", 48, "prefix.length = 44", "lower prefix.length"],
        ),
        (
            "finetune",
            {"data.max_input_tokens": 44},
            ["data.max_input_tokens = 44", 48, "prefix.length = 4", "less than 44", "or prefix.length"],
        ),
        ("lm", {"data.sequence_length": 49}, ["config.data.sequence_length", 49, "48 tokens"]),
    ],
)
def test_lengths_that_do_not_fit_are_said_before_the_models_are_loaded(
    stage, fields, facts, model, tmp_path, no_models
):
    with says(*facts):
        train.train(config(model, stage=stage, **fields), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "fields", "facts"),
    [
        ({"n_positions": 4}, {}, ["distiller", "4 tokens", "config.prefix.length = 4"]),
        (
            {"n_embd": 8},
            {"prefix.projection": "identity"},
            ['prefix.projection="identity"', "backbone", 8, 16, '"tanh"', '"linear"'],
        ),
        (
            {"n_head": 1},
            {"train.parallel": "mesh", "mesh.tensor": 2},
            ["mesh.tensor=2", "1 heads", re.compile("/backbone")],
        ),
    ],
)
def test_a_backbone_that_does_not_do(change, fields, facts, model, tmp_path, no_models):
    backbone = model_folder(tmp_path / "backbone", with_weights=False)
    (backbone / "config.json").write_text(json.dumps(json.loads((backbone / "config.json").read_text()) | change))
    with says(*facts):
        train.train(config(model, **{"prefix.backbone": str(backbone)} | fields), tmp_path / "run")


def test_longest_lengths_that_fit(model, caplog):
    """The lengths that the sentences above name do fit; a context that cannot be had is no mistake, but is said."""
    for fields in (
        {"stage": "pretrain", "data.max_text_tokens": 220},
        {"stage": "finetune", "data.max_input_tokens": 43},
        {"stage": "finetune", "data.max_input_tokens": 1, "prefix.length": 46, "prefix.kind": "soft_prompt"},
    ):
        checks.check_config(config(model, **fields))
    assert not caplog.records
    checks.check_config(config(model, stage="finetune", **{"data.max_demo_tokens": 45}))
    [said] = caplog.messages
    states(said, "data.max_demo_tokens", 45, "44 at most", "left out")


@pytest.mark.parametrize("stage", ["pretrain", "lm"])
def test_no_tokenizer(stage, tmp_path, no_data):
    folder = model_folder(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with says(folder, "no tokenizer", "LLM"):
        train.train(config(folder, stage=stage), tmp_path / "run")


def test_tokenizer_of_another_llm(tmp_path, no_data):
    folder = model_folder(tmp_path / "model", words=41)
    with says("ids up to 40", "LLM", "40 tokens"):
        train.train(config(folder), tmp_path / "run")


def test_backbone_with_fewer_tokens(model):
    tokenizer = build.load(config(model)).tokenizer
    tokenize.check_backbone(tokenizer, None, 40, "small")
    with says("ids up to 39", "backbone small", "39 tokens", "prefix.backbone"):
        tokenize.check_backbone(tokenizer, None, 39, "small")


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"mesh.tensor": 4}, ["mesh.tensor=4", "2 heads", re.compile("/model")]),
        ({"mesh.data": 3}, ["mesh.data=3 x mesh.fsdp=-1 x mesh.tensor=1", "8 devices"]),
        ({"train.batch_size": 12}, ["train.batch_size=12", "mesh.data=1 x mesh.fsdp=8", "multiple of 8"]),
    ],
)
def test_a_mesh_that_does_not_divide(fields, facts, model, tmp_path, no_models):
    with says(*facts):
        train.train(config(model, **{"train.parallel": "mesh"} | fields), tmp_path / "run")


def test_bad_dev_file_is_found_before_the_first_step(finetuning, tmp_path, no_data):
    path = tmp_path / "world/metaicl/data/t/t_4_21_dev.jsonl"
    path.write_text(path.read_text() + "{nothing\n")
    with says(f"{path}, line 5", "JSON"):
        train.train(finetuning, tmp_path / "run")
    assert not (tmp_path / "world" / "cache").exists()


@pytest.mark.parametrize(
    "length, facts",
    [
        (120, ["t, seed 21, dev", "longest option", re.compile(r"\d+ positions"), "at most 96"]),
        (90, ["No demonstration", "t, seed 21", "3 tokens", "data.max_demo_tokens", "data.max_input_tokens"]),
    ],
)
def test_dev_item_that_does_not_fit_is_found_before_the_first_step(length, facts, finetuning, tmp_path, no_data):
    path = tmp_path / "world/metaicl/data/t/t_4_21_dev.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["options"] = [words(0, length), rows[2]["output"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with says(*facts):
        train.train(finetuning, tmp_path / "run")


def test_dev_examples_are_read_once(finetuning, tmp_path, monkeypatch):
    reads, load_tasks = [], task_scoring.load_tasks
    monkeypatch.setattr(task_scoring, "load_tasks", lambda *args: reads.append(args[2]) or load_tasks(*args))
    assert train.train(finetuning, tmp_path / "run") == 0
    lines = reporting.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "dev_score" in line] == [1, 2]
    assert reads == ["dev"]


def test_run_goes_on_with_the_same_examples_wherever_they_lie_and_with_no_others(finetuning, tmp_path):
    assert train.train(finetuning, tmp_path / "run") == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    (tmp_path / "world").rename(tmp_path / "moved")
    finetuning.data.tasks = str(tmp_path / "moved" / "metaicl")
    for file in ("b/b_16384_100_train.jsonl", "t/t_4_21_dev.jsonl"):  # what is learnt, what chooses the best
        path = tmp_path / "moved" / "metaicl" / "data" / file
        before = path.read_text()
        path.write_text(before.replace("w2", "w3"))  # no length changes
        with says(f"data.tasks={tmp_path}/moved/metaicl", tmp_path / "run", tmp_path / "world/metaicl"):
            train.train(finetuning, tmp_path / "run")
        path.write_text(before)
    assert train.train(finetuning, tmp_path / "run") == 0


def test_a_contrast_with_nothing_is_refused(model):
    """Of a single query info_nce is 0, and so is its gradient: nothing would be trained."""
    fields = {"loss.objective": "info_nce", "train.batch_size": 2 * jax.device_count(), "train.accumulate": 2}
    with says("info_nce", "train.batch_size", "train.accumulate=2", "data.queries"):
        checks.check_config(config(model, **fields))
    checks.check_config(config(model, stage="finetune", **fields | {"data.queries": 2}))
    checks.check_config(config(model, **fields | {"loss.kd": 0.0, "loss.clm": 1.0}))


@pytest.mark.parametrize("fields", [{}, {"prefix.train_embeddings": False}])
def test_a_training_starts_from_an_exported_distiller_as_from_its_workdir(fields, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    folder = model_folder(tmp_path / "llm")
    assert train.train(config(folder, **{"train.steps": 2}, **fields), tmp_path / "first") == 0
    export(tmp_path / "first", tmp_path / "exported")
    started = {}
    for name in ("first", "exported"):
        c = config(folder, **{"train.steps": 2, "prefix.start_from": str(tmp_path / name)}, **fields)
        assert train.train(c, tmp_path / f"after {name}") == 0
        started[name] = checkpoint.load_best(tmp_path / f"after {name}")[0]
    jax.tree.map(np.testing.assert_array_equal, started["first"], started["exported"])
    other = config(folder, **{"prefix.length": 5, "prefix.start_from": str(tmp_path / "exported")}, **fields)
    with says("prefix.start_from", "exported", "num_vectors=4", "5"):
        train.train(other, tmp_path / "other")
    assert not (tmp_path / "other" / "checkpoints").exists()
