"""The experiments that are no table of scores, and all of them in one workdir, from their command's function to their files."""

import json
import re

import pytest
from data_files import make_world, tiny_config

from mend_jax.compare import compare
from mend_jax.experiments import all as every
from mend_jax.experiments import attention, cost, main_table, order
from mend_jax.experiments.merge import merge
from mend_jax.experiments.report import report
from mend_jax.measure.regimes import METHODS, REGIMES

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path, tiny_llm, tiny_backbone):
    """Of a tiny LLM and tasks, without a training."""
    c = tiny_config(make_world(tmp_path / "world"), "finetune")
    c.llm.path, c.prefix.backbone, c.prefix.rms = str(tiny_llm), str(tiny_backbone), 0.0
    c.data.demo_buckets, c.data.query_buckets, c.evaluate.batch_size = (60,), (16,), 4
    c.experiment.methods, c.experiment.training_seeds, c.experiment.orders = ("zero_shot", "icl"), (0,), 2
    c.experiment.attention_sequences, c.experiment.attention_length, c.experiment.attention_items = 2, 20, 3
    c.experiment.cost_llms, c.experiment.cost_rows, c.experiment.cost_repeats = (), (1, 3), 1
    return c


def results(workdir, name):
    """What an experiment left in a workdir: (its experiment.json, its table)."""
    return json.loads((workdir / name / "experiment.json").read_text()), (workdir / name / "table.md").read_text()


def test_attention(config, tmp_path, capsys):
    assert attention.main(config, tmp_path / "run") == 0
    report, table = results(tmp_path / "run", "attention")
    assert table.strip() in capsys.readouterr().out and "to icl's prefix" in table
    heads = report["heads"]
    assert len(heads) == 4 and [one["score"] for one in heads] == sorted((one["score"] for one in heads), reverse=True)
    assert max(max(layer) for layer in report["scores"]) == heads[0]["score"]
    assert report["examples"] and {one["method"] for one in report["examples"]} == {"icl"}
    for seen in (head for one in report["examples"] for head in one["heads"]):
        assert seen["share"] + sum(seen["input"]) == pytest.approx(1, abs=1e-3)  # nothing else can be seen
        assert 0 < max(seen["prefix"]) <= seen["share"]


def test_cost(config, tmp_path, capsys, monkeypatch):
    assert cost.main(config, tmp_path / "run") == 0
    said = capsys.readouterr()
    report, table = results(tmp_path / "run", "cost")
    rows = report["costs"]
    assert [(row["method"], row["rows"]) for row in rows] == [(m, count) for m in METHODS for count in (1, 3)]
    assert all(name in said.out and name in table for name in (*METHODS, "gpt2-large"))
    for row in rows:
        flops, seconds = row["flops"], row["seconds"]
        assert flops["b"]["query"] == flops["c"]["once"] + flops["c"]["query"]
        assert min(seconds[regime]["query"] for regime in REGIMES) > 0
        assert (seconds["c"]["once"] > 0) == (row["method"] != "zero_shot")
    monkeypatch.setattr(cost, "cost_of", lambda *_: pytest.fail("what is kept was computed again"))
    assert cost.main(config, tmp_path / "run") == 0
    assert capsys.readouterr().out == said.out


def test_all(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(every, "TABLES", (order,))
    monkeypatch.setattr(cost, "METHODS", ("icl", "mend"))  # half the programs to compile
    config.experiment.methods, config.experiment.finetune_steps = ("zero_shot", "icl", "prompt_tuning"), 2
    config.experiment.cost_rows, config.experiment.cost_repeats = (1,), 0
    config.train.batch_size, config.train.eval_every, config.train.log_every = 8, 10, 1
    run = tmp_path / "run"
    assert every.main(config, run) == 0
    out = capsys.readouterr().out
    assert all(results(run, name)[1] for name in ("order", "attention", "cost"))
    assert out.index("| order") < out.index("prefix matching") < out.index("TFLOP/query")
    rows = results(run, "order")[0]["rows"]
    assert {row["labels"]["order"] for row in rows} == {"0", "1"}
    methods = {example["method"] for example in results(run, "attention")[0]["examples"]}
    assert methods == {"icl", "prompt_tuning"}
    assert len(list((run / "trainings").iterdir())) == 1  # what the table trained is what attention looks at


def test_two_seeds_in_two_workdirs_are_one_experiment(config, tmp_path, capsys):
    config.experiment.methods, config.experiment.finetune_steps = ("zero_shot", "icl", "prompt_tuning"), 2
    config.experiment.partitions = ()
    config.train.batch_size, config.train.eval_every, config.train.log_every = 8, 10, 1
    for seed in (0, 1):
        config.experiment.training_seeds = (seed,)
        assert main_table.main(config, tmp_path / f"seed{seed}") == 0
    out = tmp_path / "both"
    merge(str(out), [str(tmp_path / f"seed{seed}") for seed in (0, 1)])
    content, table = results(out, "main_table")
    assert [row["training_seed"] for row in content["rows"]] == [None, None, 0, 1]
    capsys.readouterr()
    compare([str(path) for path in (out / "evaluations").iterdir()], trainings=True)
    printed = capsys.readouterr().out
    assert re.search(r"\| prompt_tuning +\| 2 ", printed) and "differ in more than their seed" not in printed
    assert "Warning" not in printed
    scores = [json.loads(path.read_text())["methods"] for path in tmp_path.glob("seed*/evaluations/*/scores.json")]
    own = [entry["score"]["mean"] for methods in scores for name, entry in methods.items() if "prompt" in name]
    assert len(own) == 2 and f"{50 * sum(own):.2f}" in table
    report(str(out))
    assert "Training seeds 0, 1" in (out / "report" / "report.md").read_text()
