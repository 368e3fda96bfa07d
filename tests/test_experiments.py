"""Experiments as data: their rows, what they share, and the runner that goes on where it stopped."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from conftest import ROOT
from data_files import make_world, tiny_config
from facts import says
from transformers import T5Config

from mend_jax.cli import command_line as cli
from mend_jax.cli import config_files
from mend_jax.cli.progress import Parts
from mend_jax.experiments import (
    ablations,
    attention,
    many_demonstrations,
    num_vectors,
    objectives,
    order,
    perturbations,
    run,
    templates,
    written,
)
from mend_jax.experiments import all as every
from mend_jax.experiments.methods import stage_configs
from mend_jax.experiments.table import Experiment, evaluation_key, of_methods, of_trainings
from mend_jax.experiments.trainings import of_method, of_stages, trained_elsewhere, with_fields
from mend_jax.experiments.written import printed_table

EXPERIMENTS = {table.EXPERIMENT.name: table.EXPERIMENT for table in every.TABLES}
PRETRAIN = ("pretrain", 1.0, 0.0, 0.0)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    c = config_files.load_config("configs/small_world.py:experiments")
    c.data.cache, c.experiment.training_seeds = str(tmp_path / "cache"), (0, 1)
    return c


def trainings(rows):
    return {one.folder: one for one in run.unique(row.training for row in rows if row.training is not None)}


def test_each_file_is_an_experiment():
    names = {path.stem for path in (ROOT / "mend_jax" / "experiments").glob("*.py")}
    assert EXPERIMENTS.keys() <= names
    assert len(EXPERIMENTS) == 12 and all(table.EXPERIMENT.name in table.__name__ for table in every.TABLES)


def test_a_soft_prompt_is_as_long_as_the_others_prefixes(config):
    cases = (
        ("distiller", 1, 40, 6),
        ("chunked", 1, 40, 96),
        ("chunked", 8, 40, 96),
        ("chunked", 8, 0, 12),
        ("chunked", 1, 0, 96),
    )
    for kind, demos, tokens, length in cases:
        fields = {"prefix.kind": kind, "prefix.length": 6, "prefix.chunks": 20}
        c = with_fields(config, fields | {"prefix.chunk_demos": demos, "prefix.chunk_tokens": tokens})
        [(_, run_of_methods)] = stage_configs(c, "prompt_tuning")
        for made in (run_of_methods, of_method(c, "prompt_tuning", 0).config):
            assert (made.prefix.kind, made.prefix.length) == ("soft_prompt", length)


def test_a_learning_rate_of_prompt_tuning_is_its_alone(config):
    c = with_fields(config, {"experiment.prompt_tuning_learning_rate": 0.25})
    assert {one.config.optimizer.learning_rate for one in of_method(c, "prompt_tuning", 0).chain} == {0.25}
    for method in ("mend", "hypertuning"):
        assert of_method(c, method, 0).key == of_method(config, method, 0).key
    assert of_method(config, "prompt_tuning", 0).config.optimizer.learning_rate == config.optimizer.learning_rate


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_rows(config, name):
    rows = EXPERIMENTS[name].rows(config)
    assert rows == [] or len({tuple(row.labels) for row in rows}) == 1  # one list of what is varied
    seen = [(tuple(row.labels.items()), row.seed) for row in rows]
    assert len(set(seen)) == len(seen)
    assert all(type(value) is str for row in rows for value in row.labels.values())
    assert all((row.seed is None) == (row.training is None) for row in rows)
    assert {row.seed for row in rows} <= {None, 0, 1}
    if EXPERIMENTS[name].x:
        assert all(float(row.labels[EXPERIMENTS[name].x]) > 0 for row in rows)


def test_the_printed_table_has_the_mean_over_settings():
    def scored(**per_seed):
        own = {"score": {"per_seed": per_seed, "mean": sum(per_seed.values()) / len(per_seed)}}
        return own | {"cost": {"prefix_length": 8}, "path": ""}

    evaluations = {"a": {"icl": scored(x=0.2, y=0.4)}, "b": {"icl": scored(x=0.6, y=0.4), "mend": scored(x=1, y=1)}}
    rows = [("icl", "a"), ("icl", "b"), ("mend", "b")]
    content = {
        "varied": ["method", "setting"],
        "rows": [{"labels": {"method": m, "setting": s}, "evaluation": s, "method": m} for m, s in rows],
    }
    last = printed_table(content, evaluations).splitlines()[5:]
    assert [[cell.strip() for cell in line.split("|")[1:4]] for line in last] == [
        ["icl", "mean of settings", "40.00 ± 0.00"]  # each of the same weight; mend lacks a setting
    ]


def test_what_is_the_same_is_trained_once(config):
    found = {name: trainings(experiment.rows(config)) for name, experiment in EXPERIMENTS.items()}
    mend = of_method(config, "mend", 0)
    for name in (
        "main_table",
        "perturbations",
        "ablations",
        "num_vectors",
        "templates",
        "hyperparameters",
        "objectives",
    ):
        assert mend.start.folder in found[name], name
    for name in ("perturbations", "retrieval", "order", "num_demonstrations", "domains"):
        assert mend.folder in found[name] and found[name].keys() <= found["main_table"].keys()
    both = found["main_table"]
    stages = [one.config.stage for one in both.values()]
    assert stages.count("pretrain") == 2 * 2  # MEND's and HyperTuning's, of two seeds, for both settings
    assert stages.count("finetune") == 2 * 2 * 3
    assert trainings(objectives.rows(config)).keys() & {one.folder for one in mend.chain} == {
        one.folder for one in mend.chain
    }
    lengths = [one.config.prefix.length for one in trainings(num_vectors.rows(config)).values() if one.start is None]
    # Two seeds of MEND, PromptTuning and HyperTuning for each l, and of MEND with nested lengths.
    assert sorted(lengths) == sorted([*(3 * 2 * config.experiment.num_vectors), 16, 16])


def test_lengths_of_chunks_have_no_nested_row(config):
    """What cannot have nested lengths is trained for each; and a soft prompt beside a distiller that has them is."""
    assert any(row.labels["method"] == "mend, nested" for row in num_vectors.rows(config))
    chunks = with_fields(config, {"prefix.kind": "chunked"})
    assert {row.labels["method"] for row in num_vectors.rows(chunks)} == {"icl", "prompt_tuning", "hypertuning", "mend"}
    nested = with_fields(config, {"prefix.nested": (2, 4)})
    assert of_method(nested, "prompt_tuning", 0).config.prefix.nested == ()
    assert of_method(nested, "mend", 0).config.prefix.nested == (2, 4)


def test_a_training_is_known_by_what_decides_it(config):
    key = of_method(config, "mend", 0).key
    for field, value in {
        "data.cache": "elsewhere", "train.log_every": 3, "evaluate.methods": ("icl",), "evaluate.perturb": "typos",
        "experiment.methods": ("icl",), "evaluate.batch_size": 2,
    }.items():  # fmt: skip
        assert of_method(with_fields(config, {field: value}), "mend", 0).key == key, field
    for field, value in {
        "optimizer.learning_rate": 1e-5, "data.k": 4, "loss.kd": 2.0, "experiment.pretrain_steps": 5, "llm.path": "other",
        "evaluate.seeds": (13,), "prefix.rms": 0.5,
    }.items():  # fmt: skip
        assert of_method(with_fields(config, {field: value}), "mend", 0).key != key, field
    assert of_method(config, "mend", 1).key != key != of_method(config, "mend", 0, {"data.beta": 0.5}).key
    own = with_fields(config, {"data.validation_seeds": (13,)})  # then the test's seeds choose no checkpoint
    assert of_method(own, "mend", 0).key != key
    assert of_method(own, "mend", 0).start.key == of_method(config, "mend", 0).start.key
    assert of_method(with_fields(own, {"evaluate.seeds": (21, 42)}), "mend", 0).key == of_method(own, "mend", 0).key
    for field, value in {
        "data.partition": "small_world_four",
        "loss.kd_tokens": "outputs",
    }.items():  # not its pretraining
        other = with_fields(config, {field: value})
        assert of_method(other, "mend", 0).start.key == of_method(config, "mend", 0).start.key, field
        assert of_method(other, "mend", 0).key != key, field
    assert of_method(other, "hypertuning", 0).key == of_method(config, "hypertuning", 0).key  # without L_distill


def test_evaluations_are_known_by_what_decides_predictions(config):
    key = evaluation_key(config)
    for same in (
        {"optimizer.learning_rate": 1.0},
        {"evaluate.methods": ("icl",)},
        {"prefix.length": 3},
        {"seed": 4},
        {"data.validation_seeds": (13,)},
    ):
        assert evaluation_key(with_fields(config, same)) == key, same
    for other in (
        {"evaluate.order": 1},
        {"data.k": 2},
        {"prefix.join": "mean"},
        {"evaluate.seeds": (13,)},
        {"llm.path": "x"},
    ):
        assert evaluation_key(with_fields(config, other)) != key, other


def test_rows_that_the_paper_has(config):
    found = [row.labels for row in perturbations.rows(config) if row.labels["method"] == "icl"]
    assert [labels["demonstrations"] for labels in found] == [
        "none",
        "no_label",
        "no_input",
        "random_label",
        "wrong_label",
    ]
    found = [
        (row.labels["trained"], row.labels["tested"], row.evaluation.data.template) for row in templates.rows(config)
    ]
    assert {one for one in found if one[0] != "-"} == {
        (a, b, b) for a in ("space", "newline") for b in ("space", "newline")
    }
    assert {row.evaluation.evaluate.order for row in order.rows(config)} == set(range(10))
    chunked = [row for row in many_demonstrations.rows(config) if "chunks" in row.labels["method"]]
    assert {(row.used_as, row.training.config.prefix.kind) for row in chunked} == {
        ("chunked", "distiller"),
        ("", "chunked"),
    }
    for c in (row.training.config for row in chunked if not row.used_as):
        assert (c.data.k, c.data.max_demo_tokens) == (2 * config.data.k, 2 * config.data.max_demo_tokens)
        assert c.prefix.chunk_tokens == config.data.max_demo_tokens  # a chunk is what a context was


def exported(folder, content="{}"):
    """A folder that is taken for what was trained."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(content)
    return folder


def test_what_was_trained_elsewhere(config, tmp_path):
    exported(tmp_path)
    config.experiment.trained = (f"mend={tmp_path}", f"pretraining={tmp_path}/cache")
    with says("pretraining", f"{tmp_path}/cache", "experiment.trained"):
        trained_elsewhere(config)
    exported(tmp_path / "cache", "[]")
    [row] = of_methods(config, ["mend"], {})
    assert (row.seed, row.training.folder, row.training.chain) == (None, str(tmp_path), [])
    assert {one.config.stage for one in trainings(objectives.rows(config)).values()} == {"finetune"}
    elsewhere = [row for row in ablations.rows(config) if row.training is not None and row.training.config is None]
    # Once for a setting, not for each seed.
    assert [(row.seed, row.labels["setting"], row.labels["pretraining"]) for row in elsewhere] == [
        (None, setting, "L_distill") for setting in ("small_world", "small_world_four")
    ]
    config.experiment.trained = (f"pretraining={tmp_path}",)
    others = trainings(EXPERIMENTS["main_table"].rows(config)).values()
    of_mend = [one for one in others if one.config.loss.kd and one.config.prefix.kind == "distiller"]
    assert {one.config.stage for one in of_mend} == {"finetune"} and len(of_mend) == 4  # two settings, two seeds
    assert {one.start.folder for one in of_mend} == {str(tmp_path)}
    config.experiment.trained = (f"mendd={tmp_path}",)
    with says("experiment.trained", f"'mendd={tmp_path}'", "did you mean mend=...?"):
        trained_elsewhere(config)


def test_several_trainings_from_elsewhere_are_those_of_one_row(config, tmp_path):
    one, other = exported(tmp_path / "one", "1"), exported(tmp_path / "other", "2")
    config.experiment.trained, config.experiment.methods = (f"mend={one}", f"mend={other}"), ("icl", "mend")
    for name, methods in (("main_table", {"mend"}), ("many_demonstrations", {"mend", "mend, chunks concat"})):
        rows = EXPERIMENTS[name].rows(config)
        for method in methods:
            own = [row for row in rows if row.labels["method"] == method]
            labels = {tuple(row.labels.items()) for row in own}
            assert len(own) == 2 * len(labels) and {row.seed for row in own} == {None}
            assert {row.training.folder for row in own} == {str(one), str(other)}
            assert len({(row.name, row.folder) for row in own}) == len(own)
    config.experiment.trained = (f"pretraining={one}", f"pretraining={other}")
    with says("two pretrainings", other):
        trained_elsewhere(config)
    shutil.copytree(one, tmp_path / "copy")
    config.experiment.trained = (f"mend={one}", f"mend={other}", f"mend={tmp_path / 'copy'}")
    with says("mend twice", one, tmp_path / "copy"):
        trained_elsewhere(config)


def test_what_is_trained_further_elsewhere_is_scored_anew(config, tmp_path):
    config.experiment.trained = (f"mend={exported(tmp_path / 'one', '1')}",)
    [before] = of_methods(config, ["mend"], {})
    exported(tmp_path / "one", "2")
    [after] = of_methods(config, ["mend"], {})
    assert before.name != after.name and before.folder == after.folder
    (tmp_path / "one").rename(tmp_path / "moved")  # only what is there counts
    config.experiment.trained = (f"mend={tmp_path / 'moved'}",)
    assert of_methods(config, ["mend"], {})[0].name == after.name
    (tmp_path / "moved" / "settings.json").unlink()
    with says(tmp_path / "moved", "holds no trained model"):
        trained_elsewhere(config)


def test_what_was_trained_elsewhere_is_tested_everywhere(config, tmp_path):
    exported(tmp_path)
    config.experiment.trained, config.experiment.methods = (f"mend={tmp_path}",), ("icl", "mend")
    for name, varied in (("main_table", "data.partition"), ("templates", "data.template")):
        rows = [row for row in EXPERIMENTS[name].rows(config) if row.labels["method"] == "mend"]
        section, field = varied.split(".")
        assert len(rows) == len({row.evaluation[section][field] for row in rows}) == 2
        assert {row.training.folder for row in rows} == {str(tmp_path)}
    assert {(row.labels["trained"], row.labels["tested"]) for row in rows} == {("space", "space"), ("space", "newline")}


# The runner


@pytest.fixture
def tiny(tmp_path, tiny_llm, tiny_backbone):
    c = tiny_config(make_world(tmp_path / "world"), "finetune")
    c.llm.path, c.prefix.backbone, c.prefix.rms = str(tiny_llm), str(tiny_backbone), 0.0
    c.train.batch_size, c.train.eval_every, c.train.log_every = 8, 10, 1
    c.data.demo_buckets, c.data.query_buckets, c.evaluate.batch_size = (60,), (16,), 4
    c.experiment.pretrain_steps = c.experiment.finetune_steps = 2
    c.experiment.training_seeds = (0, 1)
    return c


def tiny_rows(c):
    made = of_methods(c, ["icl"], {"finetuning": "-"})
    for name, weight in (("half", 0.5), ("whole", 1.0)):
        labels = {"method": "mend", "finetuning": name}
        made += of_trainings(
            c,
            "mend",
            labels,
            lambda seed, weight=weight: of_stages(c, [PRETRAIN, ("finetune", weight, 1.0, 0.0)], seed),
        )
    return made


TINY = Experiment("tiny", "A tiny experiment", "none", tiny_rows)


class Fakes:
    """Stand in for training and evaluation: what was called, in order."""

    def __init__(self, monkeypatch):
        self.calls, self.code = [], 0
        monkeypatch.setattr("mend_jax.train.train", self.train)
        monkeypatch.setattr("mend_jax.evaluate.evaluate", self.evaluate)
        monkeypatch.setattr("mend_jax.evaluate.load_the_llm", lambda *_: self.calls.append("llm"))
        monkeypatch.setattr(run, "check", lambda *_: self.calls.append("checked"))
        monkeypatch.setattr(run, "_release", lambda: None)  # half a second each time

    def train(self, config, workdir):
        self.calls.append((config.stage, config.seed, config.prefix.start_from))
        if not self.code:
            (Path(workdir) / "checkpoints").mkdir(parents=True)
        return self.code

    def evaluate(self, config, workdir, llm, prints, others):
        score = {"mean": 0.5, "std": 0.1, "per_seed": {"13": 0.4, "21": 0.6}}
        names = [spec.partition("=") for spec in config.evaluate.methods]
        self.calls.append(tuple(name for name, *_ in names))
        entry = {"score": score, "accuracy": score, "macro_f1": score}
        entry["per_task"] = {"t": entry | {"primary": "macro_f1"}}
        cost = {"prefix_length": 3.0, "cache_bytes": 1, "item_flops": 1, "item_flops_uncached": 1, "item_seconds": 1}
        found = {"methods": others | {name: {"path": path, **entry, "cost": cost} for name, _, path in names}}
        found |= {"partition": "tiny", "split": "test", "k": 4, "seeds": [13, 21], "missing_tasks": []}
        Path(workdir).mkdir(parents=True, exist_ok=True)
        (Path(workdir) / "scores.json").write_text(json.dumps(found))
        return found


@pytest.fixture
def fakes(monkeypatch):
    return Fakes(monkeypatch)


def test_it_goes_on_where_it_stopped(tiny, fakes, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    fakes.code = 75
    assert run.run_experiment(TINY, tiny, workdir) == 75
    assert fakes.calls == ["checked", ("pretrain", 0, "")]
    assert not (workdir / "tiny").exists()
    fakes.code, fakes.calls = 0, []
    assert run.run_experiment(TINY, tiny, workdir) == 0
    trained = [call for call in fakes.calls if call[0] in ("pretrain", "finetune")]
    assert [call[:2] for call in trained] == [(s, seed) for seed in (0, 1) for s in ("pretrain", "finetune")] + [
        ("finetune", 0),
        ("finetune", 1),
    ]
    starts = {call[1]: call[2] for call in trained if call[0] == "finetune"}
    assert all((tmp_path / "run") in Path(path).parents for path in starts.values())
    assert fakes.calls[-2:][0] == "llm" and len(fakes.calls[-1]) == 5
    said = capsys.readouterr()
    assert "part 1 of" in said.err and " left" in said.err and "| mend" in said.out
    content = json.loads((workdir / "tiny" / "experiment.json").read_text())
    assert (content["experiment"], content["varied"], content["x"]) == ("tiny", ["method", "finetuning"], None)
    assert [row["training_seed"] for row in content["rows"]] == [None, 0, 1, 0, 1]
    for row in content["rows"]:
        scores = json.loads((workdir / row["evaluation"] / "scores.json").read_text())
        assert row["method"] in scores["methods"]
    assert content["command"] and content["config"]["data"]["k"] == 4
    monkeypatch.setattr(written, "_commit", lambda: "later")  # what was scored before stays what it was
    fakes.calls = []
    assert run.run_experiment(TINY, tiny, workdir) == 0
    assert fakes.calls == []  # nothing is left to do
    assert json.loads((workdir / "tiny" / "experiment.json").read_text()) == content
    tiny.experiment.training_seeds = (0, 1, 2)
    assert run.run_experiment(TINY, tiny, workdir) == 0
    commits = json.loads((workdir / "tiny" / "experiment.json").read_text())["commit"]
    assert commits == f"{content['commit']}, later"


def test_experiments_share_what_they_need(tiny, fakes, tmp_path):
    def more(c):
        return [*of_methods(c, ["zero_shot", "icl"], {"finetuning": "-"}), *tiny_rows(c)[1:3]]

    assert run.run_experiments([TINY, Experiment("more", "Another", "none", more)], tiny, tmp_path / "run") == 0
    assert len([call for call in fakes.calls if call[0] == "finetune"]) == 4
    assert fakes.calls[-1] == ("zero_shot",)
    rows = [json.loads((tmp_path / "run" / name / "experiment.json").read_text())["rows"] for name in ("tiny", "more")]
    [folder] = {row["evaluation"] for part in rows for row in part}
    kept = json.loads((tmp_path / "run" / folder / "scores.json").read_text())["methods"]
    assert {row["method"] for part in rows for row in part} == kept.keys()


def test_a_workdir_belongs_to_one_config(tiny, fakes, tmp_path):
    workdir = tmp_path / "run"
    run.run_experiment(TINY, tiny, workdir)
    tiny.experiment.training_seeds, tiny.train.log_every = (0, 1, 2), 5
    assert run.run_experiment(TINY, tiny, workdir) == 0
    with says(workdir, "data.k=4", "now it is 3"):
        run.run_experiment(TINY, with_fields(tiny, {"data.k": 3}), workdir)
    with says(workdir, "experiment.finetune_steps=2", 9):
        run.run_experiment(TINY, with_fields(tiny, {"experiment.finetune_steps": 9}), workdir)
    older = json.loads((workdir / "experiments.json").read_text())
    del older["evaluate"]["order"]
    (workdir / "experiments.json").write_text(json.dumps(older))
    with says(workdir / "experiments.json", "changed"):
        run.open_workdir(tiny, workdir)
    del older["checksum"]
    (workdir / "experiments.json").write_text(json.dumps(older))
    run.open_workdir(tiny, workdir)  # a field that is younger than the workdir had its default
    (workdir / "experiments.json").write_text("{")
    with says(workdir / "experiments.json", "JSON"):
        run.open_workdir(tiny, workdir)
    run.open_workdir(tiny, tmp_path / "refused")
    run.open_workdir(with_fields(tiny, {"data.k": 3}), tmp_path / "refused")  # nothing has been done in it
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "config.json").write_text("{}")
    with says(tmp_path / "training", "config.json", "new folder"):
        run.open_workdir(tiny, tmp_path / "training")


def test_methods_that_an_experiment_does_not_show(tiny, fakes, tmp_path):
    tiny.experiment.methods = ("zero_shot",)
    with says("order has no row", "experiment.methods", "icl"):
        run.run_experiments([TINY, order.EXPERIMENT], tiny, tmp_path / "run")
    assert fakes.calls == []


def test_what_has_no_attention_or_cost_is_said_before_any_work(tiny, fakes, tmp_path, capsys, monkeypatch):
    run_every = lambda c: every.main(c, tmp_path / "run")  # noqa: E731
    with says("gpt3"):
        run_every(with_fields(tiny, {"experiment.cost_llms": ("gpt3",)}))
    T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    of_t5 = with_fields(tiny, {"llm.path": str(tmp_path / "t5")})
    with says("attention", tmp_path / "t5", "llm.path"):
        attention.check(of_t5)
    assert fakes.calls == []
    monkeypatch.setattr(every, "TABLES", ())
    assert run_every(of_t5) == 0 and "left out" in capsys.readouterr().err


def test_tasks_seeds_and_items_may_change_in_a_workdir(tiny, fakes, tmp_path):
    """What is chosen or scored by them is known by them."""
    run.run_experiment(TINY, tiny, tmp_path / "run")
    fakes.calls = []
    assert run.run_experiment(TINY, with_fields(tiny, {"evaluate.limit": 3}), tmp_path / "run") == 0
    assert [call[0] for call in fakes.calls if isinstance(call, tuple)].count("pretrain") == 0
    assert len(list((tmp_path / "run" / "evaluations").iterdir())) == 2


def test_a_result_that_is_lost_is_made_again(tiny, fakes, tmp_path):
    workdir = tmp_path / "run"
    run.run_experiment(TINY, tiny, workdir)
    [scores] = workdir.glob("evaluations/*/scores.json")
    scores.write_text('{"methods": {"icl"')
    fakes.calls = []
    assert run.run_experiment(TINY, tiny, workdir) == 0
    assert [len(call) for call in fakes.calls if isinstance(call, tuple)] == [5] and json.loads(scores.read_text())


@pytest.mark.slow
def test_a_tiny_experiment(tiny, tmp_path, capsys):
    """All of it for real: a training, scored with the files' demonstrations, perturbed ones and neighbours."""
    tiny.data.k, tiny.experiment.training_seeds = 2, (0,)

    def rows(c):
        return [
            row
            for what, fields in {
                "file": {},
                "no_label": {"evaluate.perturb": "no_label"},
                "dense": {"evaluate.demos": "dense"},
            }.items()
            for row in of_methods(c, ["icl", "prompt_tuning"], {"demonstrations": what}, fields)
        ]

    assert run.run_experiment(Experiment("tiny", "Tiny", "none", rows), tiny, tmp_path / "run") == 0
    content = json.loads((tmp_path / "run" / "tiny" / "experiment.json").read_text())
    assert len({row["evaluation"] for row in content["rows"]}) == 3
    for row in content["rows"]:
        scores = json.loads((tmp_path / "run" / row["evaluation"] / "scores.json").read_text())
        assert 0 <= scores["methods"][row["method"]]["score"]["mean"] <= 1
    assert len(list((tmp_path / "run" / "trainings").iterdir())) == 1
    assert capsys.readouterr().out.count("| icl") == 3


@pytest.mark.parametrize(
    ("break_it", "facts"),
    [
        ("no task", ["'none'", "meta-test"]),
        ("few", ["t_4_13_train.jsonl", "3 examples", "config.data.k = 4"]),
        ("equal", ["t_4_13_test.jsonl", "example 1", "1 different options"]),
        ("pool", ["'t'", "config.data.k = 9"]),
        ("encoder", ["nowhere"]),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(tiny, tmp_path, monkeypatch, break_it, facts):
    monkeypatch.setattr("mend_jax.train.train", lambda *_: pytest.fail("trained before the data were read"))
    monkeypatch.setattr("mend_jax.evaluate.load_the_llm", lambda *_: pytest.fail("loaded before the data were read"))
    here, fields = tmp_path / "world" / "metaicl", {}
    if break_it == "no task":
        partitions = {"tiny": {"train": ["a"], "test": ["t"]}, "none": {"train": ["a"], "test": []}}
        (here / "partitions.json").write_text(json.dumps(partitions))
        tiny.data.partition = "none"
    elif break_it == "few":
        path = here / "data" / "t" / "t_4_13_train.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    elif break_it == "equal":
        row = {"task": "t", "input": "w1", "output": "w2", "options": ["w2", "w2"]}
        (here / "data" / "t" / "t_4_13_test.jsonl").write_text(json.dumps(row) + "\n")
    elif break_it == "encoder":
        fields = {"evaluate.demos": "dense", "evaluate.encoder": str(tmp_path / "nowhere")}
    else:
        fields = {"data.k": 9, "evaluate.demos": "bm25"}
    experiment = Experiment("bad", "Bad", "none", lambda c: of_methods(c, ["icl"], {}, fields))
    with says(*facts):
        run.run_experiment(experiment, tiny, tmp_path / "run")


def test_the_time_left_is_estimated_kind_by_kind():
    parts = Parts([("training", 100), ("training", 300), ("evaluation", 2), ("evaluation", 1)])
    assert parts.begin() == "part 1 of 4"
    parts.end("training", 100, 60.0)
    assert parts.seconds_left() == 180.0 and parts.begin() == "part 2 of 4, 0:03:00 left"
    parts.end("training", 300, 240.0)
    assert parts.seconds_left() is None  # nothing is known of evaluations yet
    parts.end("evaluation", 2, 8.0)
    assert parts.seconds_left() == 4.0
    parts.end("evaluation", 1, 4.0)
    assert parts.seconds_left() is None


def test_sigterm_ends_with_75(tiny, fakes, tmp_path, monkeypatch):
    """In an evaluation; a training catches it itself."""

    def told(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("mend_jax.evaluate.evaluate", told)
    with pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(cli, "parse", lambda main, argv: [tiny, str(tmp_path / "run")])
        cli.run(lambda config, workdir: run.run_experiment(TINY, config, workdir), ["x"])
    assert ended.value.code == cli.STOPPED
