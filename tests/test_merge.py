"""The command experiments.merge, on files alone: what several workdirs hold becomes one, and they stay as they are."""

import gzip
import json
import re
import shutil

import pytest
from answer_files import write_evaluation, write_experiment
from facts import says

from mend_jax.cli.config_files import base_config
from mend_jax.compare import compare, together
from mend_jax.experiments.merge import merge
from mend_jax.experiments.trainings import with_fields
from mend_jax.report.results import read_results
from mend_jax.report.trainings import read_trainings
from mend_jax.run import reading, saved_config
from mend_jax.run.sealed import write_sealed
from mend_jax.scoring.answers import Source, read_answers

KEYS = {0: "0a1b2c3d", 1: "99887766"}  # of the trainings, by seed


def make_workdir(folder, seed, methods=("icl",), key="k", **fields):
    """A workdir with a pretraining, a finetuning and a finished main_table of one training seed."""
    config = with_fields(
        base_config(), {"experiment.training_seeds": (seed,), "experiment.methods": (*methods, "mend")} | fields
    )
    mend = f"mend-{KEYS[seed]}"
    shares = dict.fromkeys(methods, 0.6) | {mend: 0.8}  # the first are drawn alike
    write_evaluation(folder / "evaluations" / key, shares, trained=f"{folder}/trainings/finetune-{{key}}")
    start, times = "", {}
    for stage, own in (("pretrain", f"{seed}" * 8), ("finetune", KEYS[seed])):
        there = folder / "trainings" / f"{stage}-{own}"
        (there / "checkpoints" / "4").mkdir(parents=True)
        (there / "checkpoints" / "4" / "weights").write_text("large")
        (there / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 1.0}) + "\n")
        (there / ".lock").touch()
        saved_config.write_config(
            there, with_fields(config, {"stage": stage, "seed": seed, "prefix.start_from": start})
        )
        start, times[f"trainings/{there.name}"] = str(there), {"seconds": 1.5, "finished": True}
    (folder / "times.json").write_text(json.dumps(times | {f"evaluations/{key}": {"seconds": 2.0, "finished": True}}))
    plain = json.loads(config.to_json())
    write_sealed(folder / "experiments.json", plain)
    labels = {"setting": "tiny"}
    rows = [({"method": method} | labels, None, f"evaluations/{key}", method) for method in methods]
    rows += [({"method": "mend"} | labels, seed, f"evaluations/{key}", mend)]
    write_experiment(folder, "main_table", rows, config=plain)
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def two(tmp_path):
    return make_workdir(tmp_path / "w0", 0, ("icl", "zero_shot")), make_workdir(tmp_path / "w1", 1)


def test_two_seeds_are_one_experiment(two, tmp_path, capsys):
    before, out = [content(folder) for folder in two], tmp_path / "out"
    merge(str(out), [str(two[1]), str(two[0])])  # whatever the order
    said = capsys.readouterr().out
    assert [content(folder) for folder in two] == before
    own = json.loads((out / "main_table" / "experiment.json").read_text())
    assert [(row["labels"]["method"], row["training_seed"]) for row in own["rows"]] == [
        ("icl", None),
        ("zero_shot", None),
        ("mend", 0),
        ("mend", 1),
    ]
    assert sorted(own["config"]["experiment"]["training_seeds"]) == [0, 1]
    assert sorted(json.loads((out / "experiments.json").read_text())["experiment"]["training_seeds"]) == [0, 1]
    table = (out / "main_table" / "table.md").read_text()
    assert table.strip() in said
    means = [json.loads((w / "evaluations/k/scores.json").read_text())["methods"] for w in two]
    mean = sum(means[seed][f"mend-{KEYS[seed]}"]["score"]["mean"] for seed in (0, 1)) / 2
    [line] = [line for line in table.splitlines() if line.startswith("| mend")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3].startswith(f"{100 * mean:.2f} ±") and cells[4] == "2"
    compare([str(out / "main_table")])
    assert re.search(r"\| MEND +\| 2 ", capsys.readouterr().out)
    for folder in two:  # the trainings are found in the new workdir alone
        folder.rename(f"{folder}-gone")
    found, notes = together([str(out / "evaluations" / "k")])
    assert notes == [] and {name: len(sources) for name, sources in found.items()} == {
        "icl": 1,
        "mend": 2,
        "zero_shot": 1,
    }
    assert [len(row.sources) for row in read_results(out)[0].rows] == [1, 1, 2]
    stages = read_trainings(out, read_results(out))
    assert {name for stage in stages.values() for name, _ in stage.values()} == {
        f"{what}MEND, seed={seed}" for seed in (0, 1) for what in ("", "pretraining of ")
    }
    times = json.loads((out / "times.json").read_text())
    assert len(times) == 5 and times["evaluations/k"] == {"seconds": 4.0, "finished": True}


def test_answers_are_packed_and_the_same(two, tmp_path, monkeypatch):
    merge(str(tmp_path / "out"), [str(two[0])])  # of one workdir it is what can be published
    for method in ("icl", f"mend-{KEYS[0]}"):
        new = tmp_path / "out" / "evaluations" / "k"
        both = (read_answers(Source(folder, method)) for folder in (new, two[0] / "evaluations" / "k"))
        assert next(both).lines == next(both).lines
    packed = sorted(new.rglob("*.jsonl.gz"))
    assert packed and not list(new.rglob("*.jsonl"))
    assert 4 * sum(len(file.read_bytes()) for file in packed) < sum(
        len(text) for name, text in content(two[0]).items() if "/predictions/" in name and name.endswith(".jsonl")
    )
    for damage in (lambda old: old[:-20], lambda old: b"x" + old):
        packed[0].write_bytes(damage(packed[0].read_bytes()))
        with says("predictions of", new, "missing or not those"):
            compare([str(new)])
    packed[1].write_bytes(gzip.compress(bytes(10_000)))  # more than it seems
    monkeypatch.setattr(reading, "LARGEST", 1000)
    with says(packed[1], "more than 1,000 bytes", "do this"):
        reading.read_text(packed[1], "do this")


def test_weights_are_copied_where_they_are_wanted(two, tmp_path):
    for name, weights in (("bare", False), ("whole", True)):
        merge(str(tmp_path / name), [str(folder) for folder in two], weights=weights)
        there = {path.name for path in (tmp_path / name / "trainings").rglob("*") if path.is_file()}
        assert there == {"config.json", "metrics.jsonl"} | ({"weights"} if weights else set())


def test_of_two_that_have_a_training_the_one_that_has_ended_is_taken(two, tmp_path, capsys):
    shutil.copytree(two[0], tmp_path / "begun")
    (tmp_path / "begun" / "times.json").unlink()
    [training] = (tmp_path / "begun" / "trainings").glob("finetune-*")
    (training / "metrics.jsonl").write_text("")
    shutil.rmtree(tmp_path / "begun" / "main_table")
    merge(str(tmp_path / "out"), [str(tmp_path / "begun"), str(two[0])])
    assert (tmp_path / "out" / "trainings" / training.name / "metrics.jsonl").read_text()
    said = capsys.readouterr()
    assert "main_table is not finished in" in said.err and str(tmp_path / "begun") in said.err
    assert "has not ended" not in said.err


def test_what_is_no_comparison_is_refused(two, tmp_path):
    out, (one, other) = tmp_path / "out", two

    def refused(*facts, workdirs=two, target=out):
        with says(*facts):
            merge(str(target), [str(folder) for folder in workdirs])
        assert not out.exists() and not list(tmp_path.glob(".out*"))

    refused("named twice", one, workdirs=(one, one))
    refused("there already", other, target=other)
    refused("inside", one, target=one / "out")
    refused("no workdir of experiments", one / "trainings", workdirs=(one, one / "trainings"))
    refused("experiments.json", tmp_path / "nowhere", workdirs=(tmp_path / "nowhere",))
    of = {
        "rate": {"optimizer.learning_rate": 0.5},
        "key": {"key": "other"},
    }
    made = {name: make_workdir(tmp_path / name, 1, **more) for name, more in of.items()}
    refused("optimizer.learning_rate", 0.5, one, made["rate"], workdirs=(one, made["rate"]))
    refused("method icl", one / "evaluations" / "k", made["key"] / "evaluations" / "other", workdirs=(one, made["key"]))
    shutil.rmtree(other / "evaluations" / "k")
    shares = {"icl": 0.1, f"mend-{KEYS[1]}": 0.8}
    write_evaluation(other / "evaluations" / "k", shares)
    refused("answers of icl", one / "evaluations" / "k", other / "evaluations" / "k")
    shutil.rmtree(other / "evaluations" / "k")
    write_evaluation(other / "evaluations" / "k", {f"mend-{KEYS[1]}": 0.8}, facts={"template": "qa"})
    shutil.rmtree(one / "evaluations" / "k")
    write_evaluation(one / "evaluations" / "k", {"icl": 0.6, f"mend-{KEYS[0]}": 0.8}, facts={"template": "space"})
    refused("template=qa", "template=space")
