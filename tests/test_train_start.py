"""What training checks before its first step: tokenizers, dev examples, the run that it starts from."""

import json

import jax
import pytest
from data_files import make_world, tiny_config, words
from tiny_training import config, model_folder, write_tokenizer

from mend_jax import reporting, task_scoring, train
from mend_jax.data import tokenize
from mend_jax.errors import UserError


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture
def no_data(monkeypatch):
    """Nothing may be read or prepared before the checks."""
    monkeypatch.setattr(train, "make_batches", lambda *_, **__: pytest.fail("the checks come first"))


@pytest.fixture
def finetuning(tmp_path, tiny_llm, tiny_backbone):
    """A config that finetunes two steps on real files and evaluates after each."""
    c = tiny_config(make_world(tmp_path / "world"), "finetune")
    c.llm.path, c.prefix.backbone = str(tiny_llm), str(tiny_backbone)
    c.train.batch_size, c.train.steps, c.train.eval_every = jax.device_count(), 2, 1
    return c


@pytest.mark.parametrize("stage", ["pretrain", "lm"])
def test_no_tokenizer(stage, tmp_path, no_data):
    folder = model_folder(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"{folder} holds no tokenizer: put the LLM's tokenizer files there"):
        train.train(config(folder, stage=stage), tmp_path / "run")


def test_tokenizer_of_another_llm(tmp_path, no_data):
    folder = model_folder(tmp_path / "model", words=41)
    with pytest.raises(UserError, match="gives ids up to 40, but the LLM knows 40 tokens"):
        train.train(config(folder), tmp_path / "run")


def test_tokenizer_of_another_backbone(model, tmp_path, no_data):
    backbone = model_folder(tmp_path / "backbone")
    write_tokenizer(backbone, [f"w{i}" for i in range(39, -1, -1)])
    with pytest.raises(UserError, match="'w0' is 0 in one and 39 in the other; set prefix.backbone"):
        train.train(config(model, **{"prefix.backbone": str(backbone)}), tmp_path / "run")


def test_backbone_with_fewer_tokens(model):
    tokenizer = train.load(config(model)).tokenizer
    tokenize.check_backbone(tokenizer, None, 40, "small")
    with pytest.raises(UserError, match="ids up to 39, but the backbone small knows 39 tokens: set prefix.backbone"):
        tokenize.check_backbone(tokenizer, None, 39, "small")


def test_bad_dev_file_is_found_before_the_first_step(finetuning, tmp_path, no_data):
    path = tmp_path / "world/metaicl/data/t/t_4_21_dev.jsonl"
    path.write_text(path.read_text() + "{nothing\n")
    with pytest.raises(UserError, match=f"{path}, line 5 is not valid JSON"):
        train.train(finetuning, tmp_path / "run")
    assert not (tmp_path / "world" / "cache").exists()


@pytest.mark.parametrize(
    "length, said",
    [
        (120, "t, seed 21, dev: A query with its longest option needs .* positions"),
        (90, "No demonstration of t, seed 21 fits into 3 tokens"),
    ],
)
def test_dev_item_that_does_not_fit_is_found_before_the_first_step(length, said, finetuning, tmp_path, no_data):
    path = tmp_path / "world/metaicl/data/t/t_4_21_dev.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["options"] = [words(0, length), rows[2]["output"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=said):
        train.train(finetuning, tmp_path / "run")


def test_dev_examples_are_read_once(finetuning, tmp_path, monkeypatch):
    reads, load_tasks = [], task_scoring.load_tasks
    monkeypatch.setattr(task_scoring, "load_tasks", lambda *args: reads.append(args[2]) or load_tasks(*args))
    assert train.train(finetuning, tmp_path / "run") == 0
    lines = reporting.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "dev_score" in line] == [1, 2]
    assert reads == ["dev"]
