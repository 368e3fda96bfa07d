"""Which changes of a config a run goes on with, and which earlier run may be its start."""

import json
import shutil

import numpy as np
import pytest
from facts import says, states
from tiny_training import config, model_folder

from configs.base import get_config
from mend_jax.cli.errors import UserError
from mend_jax.run import checkpoint, resume, saved_config
from mend_jax.run.checkpoint import Checkpoints
from mend_jax.scoring.results import tree_hash


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with two models that differ in one byte of their weights: "one" and "other"."""
    folder = tmp_path_factory.mktemp("models")
    weights = model_folder(folder / "one") / "model.safetensors"
    shutil.copytree(folder / "one", folder / "other")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    (folder / "other" / "model.safetensors").write_bytes(content)
    return folder


def written(workdir, c, value=None):
    """A workdir as the training of `c` leaves it; with a value, with a checkpoint."""
    workdir.mkdir(parents=True, exist_ok=True)
    saved_config.write_config(workdir, c)
    start = tree_hash(checkpoint.load_best(c.prefix.start_from)[0]) if c.prefix.start_from else None
    resume.write_sources(workdir, c, {}, start)
    if value is not None:
        checkpoints = Checkpoints(workdir, False)
        params = {"vectors": np.full((4, 16), value, np.float32)}
        checkpoints.save(1, params, params, {}, 0.5)
        checkpoints.close()
    return workdir


def of_model(folder, now=None):
    """What is said of the model in a folder, whose files lie in `now` meanwhile: its path, and what tells its content."""
    return f'"{folder}"', resume.fingerprint(now or folder)


def test_config_is_compared(tmp_path):
    c = get_config()
    c.data.demo_buckets = (128, 256, 512, 900)
    saved_config.write_config(tmp_path, c)
    resume.check_resume(tmp_path, c, False)
    c.train.save_every, c.data.cache, c.experiment.pretrain_steps = 1, "elsewhere", 5
    resume.check_resume(tmp_path, c, False)
    c.data.demo_buckets = (128, 900)
    with says(tmp_path, "data.demo_buckets=[128, 256, 512, 900]", "[128, 900]"):
        resume.check_resume(tmp_path, c, False)


def test_field_of_a_newer_version_had_its_default(tmp_path):
    older = get_config().to_dict()
    del older["data"]["beta"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    c = get_config()
    resume.check_resume(tmp_path, c, False)
    c.data.beta = 0.5
    with says(tmp_path, "data.beta=0.8", 0.5):
        resume.check_resume(tmp_path, c, False)


def test_field_of_an_older_version(tmp_path):
    older = get_config().to_dict()
    older["prefix"]["gone"] = 1
    (tmp_path / "config.json").write_text(json.dumps(older))
    with says(tmp_path, "prefix.gone=1", "this version"):
        resume.check_resume(tmp_path, get_config(), False)
    resume.check_resume(tmp_path, get_config(), True)


EVALUATION = {"seeds": (1, 2), "tasks": ("t",), "limit": 3, "shuffle_demos": True, "batch_size": 7, "split": "dev"}


@pytest.mark.parametrize(
    "fields, finished, refused",
    [
        ({"stage": "pretrain"}, False, []),
        ({"stage": "lm", "data.text_share": 1.0}, False, []),
        ({"stage": "lm", "data.text_share": 0.5}, False, ["seeds"]),  # the dev examples are its validation data
        ({"stage": "finetune"}, False, ["seeds", "tasks", "limit", "shuffle_demos"]),
        ({"stage": "finetune", "prefix.kind": "soft_prompt"}, False, ["seeds", "tasks", "limit"]),
        ({"stage": "finetune"}, True, []),
    ],
)
def test_evaluation_settings_matter_where_they_change_the_rest_of_a_run(fields, finished, refused, models, tmp_path):
    saved_config.write_config(tmp_path, config(models / "one", **fields))
    found = []
    for name, value in EVALUATION.items():
        try:
            resume.check_resume(tmp_path, config(models / "one", **fields, **{f"evaluate.{name}": value}), finished)
        except UserError as error:
            assert f"evaluate.{name}=" in str(error)
            found.append(name)
    assert found == refused


@pytest.mark.parametrize("objective, refused", [("forward_kl", False), ("info_nce", True)])
def test_the_parts_of_a_batch_matter_where_a_loss_contrasts_its_queries(objective, refused, models):
    c = config(models / "one", **{"loss.objective": objective, "loss.kd": 1.0})
    parts = ("train.accumulate", "train.parallel", "mesh.fsdp")
    assert [resume.matters(name, c) for name in parts] == [refused] * 3


@pytest.mark.parametrize(
    "stage, kd, refused", [("finetune", 1.0, True), ("finetune", 0.0, False), ("pretrain", 1.0, False)]
)
def test_the_tokens_of_l_distill_matter_where_finetuning_computes_it(stage, kd, refused, models):
    c = config(models / "one", **{"stage": stage, "loss.kd": kd})
    assert resume.matters("loss.kd_tokens", c) == refused


def test_finished_run_of_another_meaning_is_refused(models, tmp_path):
    saved_config.write_config(tmp_path, config(models / "one"))
    with says(tmp_path, "seed=0", 1):
        resume.check_resume(tmp_path, config(models / "one", seed=1), True)


def test_folders_that_a_stage_does_not_read_may_change(models, tmp_path):
    saved_config.write_config(tmp_path, config(models / "one", stage="pretrain"))
    resume.check_resume(tmp_path, config(models / "one", stage="pretrain", **{"data.tasks": "elsewhere"}), False)
    with says(tmp_path, 'data.text=""', '"elsewhere"'):
        resume.check_resume(tmp_path, config(models / "one", **{"data.text": "elsewhere"}), False)


def test_one_folder_written_in_two_ways(models, tmp_path, monkeypatch):
    names = ("data.text", "prefix.start_from")
    written(tmp_path / "start", config(models / "one"), 1.0)
    monkeypatch.chdir(tmp_path)
    run = written(tmp_path / "run", config(models / "one", **dict.fromkeys(names, "start")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (str(tmp_path / "start"), "../start"):
        resume.check_resume(run, config(models / "one", **dict.fromkeys(names, path)), False)


@pytest.mark.parametrize("finished", [True, False])
def test_models_are_known_by_their_content(finished, models, tmp_path):
    llm = shutil.copytree(models / "one", tmp_path / "llm")
    run = written(tmp_path / "run", config(llm))
    llm.rename(tmp_path / "moved")
    resume.check_resume(run, config(tmp_path / "moved"), finished)
    with says(run, *of_model(llm, models / "one"), *of_model(models / "other")):
        resume.check_resume(run, config(models / "other", **{"prefix.backbone": str(tmp_path / "moved")}), finished)


def test_another_model_under_the_old_name(models, tmp_path):
    llm = shutil.copytree(models / "one", tmp_path / "llm")
    run = written(tmp_path / "run", config(llm))
    shutil.rmtree(llm)
    shutil.copytree(models / "other", llm)
    with says(run, *of_model(llm, models / "one"), *of_model(llm)):
        resume.check_resume(run, config(llm, **{"prefix.backbone": str(models / "one")}), False)


def test_an_llm_that_a_run_was_not_trained_for_is_said(models, tmp_path, caplog):
    run = written(tmp_path / "run", config(models / "one"))
    resume.check_llm(run, models / "one")
    assert not caplog.messages
    resume.check_llm(run, models / "other")
    [said] = caplog.messages
    states(said, run, f"for the LLM in {models / 'one'}", f"not for that in {models / 'other'}")


def test_another_tokenizer_beside_the_same_weights(models, tmp_path):
    llm = shutil.copytree(models / "one", tmp_path / "llm")
    (llm / "tokenizer.json").write_text("{}")
    run = written(tmp_path / "run", config(llm))
    resume.check_resume(run, config(llm), False)
    before = of_model(llm)
    (llm / "tokenizer.json").write_text("{ }")
    with says(run, *before, *of_model(llm)):
        resume.check_resume(run, config(llm), False)


def test_start_that_moved(models, tmp_path):
    start = written(tmp_path / "start", config(models / "one"), 1.0)
    run = written(tmp_path / "run", config(models / "one", **{"prefix.start_from": str(start)}))
    start.rename(tmp_path / "moved")
    moved = config(models / "one", **{"prefix.start_from": str(tmp_path / "moved")})
    resume.check_resume(run, moved, False)
    resume.write_sources(run, moved, {})  # the fingerprint is kept when the run goes on
    (tmp_path / "moved").rename(tmp_path / "again")
    resume.check_resume(run, config(models / "one", **{"prefix.start_from": str(tmp_path / "again")}), False)
    other = str(written(tmp_path / "other", config(models / "one"), 2.0))
    with says(run, f'prefix.start_from="{start}"', f'"{other}"'):
        resume.check_resume(run, config(models / "one", **{"prefix.start_from": other}), False)


@pytest.mark.parametrize("older", [False, True])
def test_start_of_the_same_meaning(older, models, tmp_path):
    """Steps, losses and data may differ; "auto" is what it stands for; older runs have no sources.json."""
    start = written(tmp_path / "start", config(models / "one"), 1.0)
    if older:
        (start / "sources.json").unlink()
    moved = shutil.copytree(models / "one", tmp_path / "moved")
    fields = {"prefix.start_from": str(start), "prefix.projection": "identity", "loss.kd": 0.5, "data.k": 3}
    resume.check_start(config(moved, stage="finetune", **fields))


@pytest.mark.parametrize(
    "field, value, facts",
    [
        ("prefix.kind", "soft_prompt", ['prefix.kind="distiller"', '"soft_prompt"']),
        ("prefix.length", 5, ["prefix.length=4", 5]),
        ("prefix.projection", "tanh", ['prefix.projection="auto"', '"tanh"']),
        ("data.template", "newline", ['data.template="space"', '"newline"']),
        ("llm.path", "other", ["llm.path={one[0]}", "{one[1]}", "{other[0]}", "{other[1]}"]),
        ("prefix.backbone", "other", ["prefix.backbone={one[0]}", "{one[1]}", "{other[0]}", "{other[1]}"]),
    ],
)
def test_start_of_another_meaning_is_refused(field, value, facts, models, tmp_path):
    start = written(tmp_path / "start", config(models / "one"), 1.0)
    value = str(models / value) if value == "other" else value
    c = config(models / "one", stage="finetune", **{"prefix.start_from": str(start), field: value})
    both = {name: of_model(models / name) for name in ("one", "other")}
    with says(f"prefix.start_from={start}", *(str(fact).format(**both) for fact in facts)):
        resume.check_start(c)


def test_start_that_is_none(models, tmp_path):
    def start_from(folder, *facts):
        with says(f"prefix.start_from={folder}", *facts):
            resume.check_start(config(models / "one", **{"prefix.start_from": str(folder)}))

    start_from(tmp_path / "nothing", "not a folder")
    (tmp_path / "empty").mkdir()
    start_from(tmp_path / "empty", "config.json")
    start_from(written(tmp_path / "new", config(models / "one")), "checkpoint")
    start_from(
        written(tmp_path / "lm", config(models / "one", stage="lm"), 1.0), 'stage="lm"', "llm.path", "prefix.backbone"
    )
