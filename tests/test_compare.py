"""The command compare, on files alone."""

import json
import math
import shutil

import numpy as np
import pytest
from answer_files import write_evaluation, write_experiment
from facts import says

from mend_jax.cli.command_line import parse
from mend_jax.cli.config_files import base_config
from mend_jax.compare import compare, together, told_apart
from mend_jax.experiments.trainings import with_fields
from mend_jax.run import saved_config
from mend_jax.scoring import answers
from mend_jax.scoring.answers import Source, numbered, read_all, read_answers
from mend_jax.scoring.likeness import likenesses
from mend_jax.scoring.statistics import estimate


@pytest.fixture
def evaluation(tmp_path):
    return write_evaluation(tmp_path / "a", {"zero_shot": 0.4, "icl": 0.6, "mend": 0.95})


def test_three_tables(evaluation, capsys, tmp_path):
    compare([str(evaluation)], out=str(tmp_path / "tables.md"))
    printed = capsys.readouterr().out
    assert (tmp_path / "tables.md").read_text() == printed
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ") and "---" not in line]
    assert rows[:6] == ["method", "zero_shot", "icl", "mend", "most frequent label", "random option"]
    assert rows[6:10] == ["methods", "icl − zero_shot", "mend − zero_shot", "mend − icl"]
    assert rows[10:] == ["task", "colour", "choice"]
    score = json.loads((evaluation / "scores.json").read_text())["methods"]["mend"]["score"]
    assert f"| {100 * score['mean']:.2f} ± {100 * score['std']:.2f} " in printed
    capsys.readouterr()
    compare([str(evaluation)])
    assert capsys.readouterr().out == printed  # the same to the last digit


def test_methods_of_the_same_name(evaluation, tmp_path, capsys):
    other = write_evaluation(tmp_path / "b", {"icl": 0.6, "mend": 0.9}, seed=1)
    assert list(told_apart([str(evaluation), str(other)])) == [
        "zero_shot",
        f"icl in {evaluation}",
        f"mend in {evaluation}",
        f"icl in {other}",
        f"mend in {other}",
    ]
    both, notes = together([str(evaluation), str(other)])
    assert both["mend"] == [Source(evaluation, "mend"), Source(other, "mend")] and notes == []
    assert both["icl"] == [Source(evaluation, "icl")]  # it was not trained
    tasks, answers = numbered(read_all({"mend": both["mend"]}))
    assert [task.name for task in tasks] == ["colour", "choice"] and answers["mend"]["colour"][0].shape == (2, 24)
    compare([str(evaluation), str(other)], trainings=True, methods="icl,mend")
    assert "| mend                | 2 " in capsys.readouterr().out


def test_trainings_in_the_evaluation_of_an_experiment(tmp_path):
    """Their names end with the keys of their trainings; other evaluations of the same items stand beside them."""
    whole = write_evaluation(tmp_path / "e", {"mend-0a1b2c3d": 0.9, "mend-99887766": 0.8, "mend-lite": 0.6}, seed=0)
    short = write_evaluation(tmp_path / "short", {"short": 0.5}, seed=0)
    found, _ = together([str(whole), str(short)])
    assert found == {
        "mend": [Source(whole, "mend-0a1b2c3d"), Source(whole, "mend-99887766")],
        "mend-lite": [Source(whole, "mend-lite")],
        "short": [Source(short, "short")],
    }
    assert len(told_apart([str(whole)])) == 3


def test_trainings_that_differ_in_more_than_their_seed_are_methods_of_their_own(tmp_path, capsys):
    """As a workdir of several experiments has them in one evaluation; they are found where they were, or beside the evaluation."""
    keys = {key: 0.5 + place / 20 for place, key in enumerate("abcdef9")}
    names = {f"mend-{key * 8}": share for key, share in keys.items()}
    folder = write_evaluation(tmp_path / "w" / "evaluations" / "k", names | {"icl": 0.6})

    def trained(key, stage="finetune", **fields):
        there = tmp_path / "w" / (f"mend-{key * 8}" if stage == "finetune" else f"before-{key}") / "0"
        there.mkdir(parents=True)
        fields = {name.replace("__", "."): value for name, value in fields.items()}
        saved_config.write_config(there, with_fields(base_config(), fields | {"stage": stage}))
        return str(there)

    before = {beta: trained(beta, "pretrain", data__beta=beta) for beta in (0.8, 0.5)}
    same = {"prefix__start_from": before[0.8], "data__cache": "elsewhere", "train__log_every": 3}
    trained("a", seed=0, prefix__start_from=before[0.8])
    trained("b", seed=1, **same)
    trained("c", seed=0, prefix__start_from=before[0.8], loss__kd=0.25)
    trained("d", seed=1, prefix__start_from=before[0.8], loss__kd=0.25)
    trained("e", seed=0, prefix__start_from=before[0.5], data__beta=0.5)
    trained("f", seed=0)
    found, [note] = together([str(folder)])
    assert {name: [source.method[-1] for source in own] for name, own in found.items()} == {
        "mend": ["a", "b"],
        "mend, loss.kd=0.25": ["c", "d"],
        "mend, data.beta=0.5": ["e"],  # of the pretraining too, which is said once
        "mend, prefix.start_from=nothing": ["f"],
        "mend, settings not known": ["9"],
        "icl": ["l"],
    }
    assert "prefix.start_from=pretrain" in note and f"loss.kd={base_config().loss.kd}" in note
    compare([str(folder)], trainings=True, methods="mend,mend, loss.kd=0.25")
    printed = capsys.readouterr().out
    assert note in printed and "| mend, loss.kd=0.25  | 2 " in printed
    moved = tmp_path / "moved"
    (tmp_path / "w").rename(moved)
    assert list(together([str(moved / "evaluations" / "k")])[0]) == list(found)


def test_what_a_reader_of_a_comparison_must_know(tmp_path, capsys):
    """Tasks that are left out, a training that counts twice, settings that differ."""

    def warned(*folders, **options):
        compare([str(folder) for folder in folders], **options)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]

    facts = {"template": "qa", "k": 16, "limit": 0}
    a = write_evaluation(tmp_path / "a", {"icl": 0.6, "mend": 0.9}, facts=facts)
    assert warned(a) == []
    b = write_evaluation(tmp_path / "b", {"mend": 0.8}, seed=1, tasks=("choice",), facts=facts)
    [left] = warned(a, b)
    assert "colour" in left and "choice" not in left
    shutil.copytree(a, tmp_path / "copy")
    [twice] = warned(a, tmp_path / "copy", trainings=True)
    assert f"mend in {a}" in twice and f"mend in {tmp_path / 'copy'}" in twice and "icl" not in twice
    other = {"template": "space", "option_score": "sum"}
    c = write_evaluation(tmp_path / "c", {"mend": 0.8, "short": 0.7}, seed=2, facts=facts | other)
    mean, template = sorted(warned(a, c), key=lambda line: "template" in line)
    assert f"option_score=mean (icl, mend in {a}) and option_score=sum (mend in {c}, short)" in mean
    assert "template=qa" in template and "template=space" in template
    with says("trainings of mend", "template=qa", "template=space", a, c):  # no mean of two trainings
        compare([str(a), str(c)], trainings=True)
    d = write_evaluation(tmp_path / "d", {"zero_shot": 0.4}, facts=facts | {"k": 4})
    [k] = warned(a, d)
    assert "k=16" in k and "k=4 (zero_shot)" in k
    scores = json.loads((d / "scores.json").read_text())
    scores["methods"]["zero_shot"]["cost"] |= {"demo_tokens": 0}
    (d / "scores.json").write_text(json.dumps({name: value for name, value in scores.items() if name != "checksum"}))
    assert warned(a, d) == []  # it read none


def test_how_closely_methods_answer_as_another(tmp_path, capsys, monkeypatch):
    """Against the definition, item by item; a method answers as itself."""

    def with_scores(source, found=None):  # those of the files are all alike
        random, read = np.random.default_rng(len(source.method)), read_answers(source, found)
        for line in (line for seeds in read.lines.values() for own in seeds.values() for line in own):
            line["scores"] = random.normal(size=len(line["options"])).tolist()
        return read

    def likeness(sources, reference):
        return likenesses(read_all(sources), reference.method, with_scores(reference))

    monkeypatch.setattr("mend_jax.scoring.answers.read_answers", with_scores)
    folder = write_evaluation(tmp_path / "e", {"icl": 0.7, "mend": 0.6}, seed=0)
    mend, icl = (with_scores(Source(folder, name)).lines for name in ("mend", "icl"))
    wanted = []
    for task in icl:
        pairs = [pair for seed in icl[task] for pair in zip(icl[task][seed], mend[task][seed], strict=True)]
        kls = []
        for theirs, ours in pairs:
            p, q = (np.exp(line["scores"]) / np.exp(line["scores"]).sum() for line in (theirs, ours))
            kls.append((p * np.log(p / q)).sum())
        wanted.append((np.mean(kls), np.mean([a["prediction"] == b["prediction"] for a, b in pairs])))
    found = likeness({"mend": [Source(folder, "mend")], "icl": [Source(folder, "icl")]}, Source(folder, "icl"))
    kl, same = estimate(found["mend"].kl, highest=math.inf), estimate(found["mend"].same)
    np.testing.assert_allclose([kl.value, same.value], np.mean(wanted, 0), rtol=1e-6)
    assert 0 < kl.low < kl.value < kl.high and 0 < same.low < same.value < same.high < 1
    assert (estimate(found["icl"].kl).high, estimate(found["icl"].same).low) == (0, 1)
    compare([str(folder)], methods="mend", like="icl")
    printed = capsys.readouterr().out
    assert (
        f"| mend   | {kl.value:.3f} [{kl.low:.3f}, {kl.high:.3f}]" in printed
        and f"| {100 * same.value:.2f} [" in printed
    )
    both = write_evaluation(tmp_path / "two", {"mend-0a1b2c3d": 0.6, "mend-99887766": 0.6, "icl": 0.7, "short": 0.5})
    compare([str(both)], trainings=True, like="icl")
    printed = capsys.readouterr().out
    two = [Source(both, "mend-0a1b2c3d"), Source(both, "mend-99887766")]
    own = likeness({"mend": two}, Source(both, "icl"))["mend"]
    assert own.kl.values.shape == (2, 2, 2) and ", ".join(f"{x:.3f}" for x in own.kl.values.mean((0, 2))) in printed
    assert "| short − mend |" in printed or "| mend − short |" in printed
    with says("--like", "icl, mend"):
        compare([str(folder)], like="nothing")
    with says("--like=icl,mend", "2 methods"):
        compare([str(folder)], like="icl,mend")
    for name, asked in (
        ("other", {"items": 12}),
        ("others", {"asked": 8}),
    ):  # the second: as many items, with the same options
        other = write_evaluation(tmp_path / name, {"mend": 0.6}, **asked)
        with says("reference icl", "different items"):
            likeness({"mend": [Source(other, "mend")]}, Source(folder, "icl"))


@pytest.mark.parametrize("methods", ["", "mend"])
def test_answers_are_read_from_disk_once(evaluation, methods, monkeypatch, capsys):
    """With the tables of likeness as without: those of the reference too, whether it is compared or not."""
    read, real = [], answers.kept_predictions
    monkeypatch.setattr(answers, "kept_predictions", lambda *given: (read.append(given), real(*given))[1])
    compare([str(evaluation)], methods=methods, like="icl")
    assert "KL from icl" in capsys.readouterr().out
    files = {(folder, task, seed) for folder, task, seed, _ in read}
    assert len(read) == len(files) and len({folder for folder, *_ in files}) == (2 if methods else 3)


def test_the_rows_of_an_experiment(tmp_path, capsys):
    """Trainings of a row are grouped; pairs are of methods under equal labels, or of all rows of one method."""
    for seed, k in enumerate(("4", "8")):
        write_evaluation(tmp_path / "e" / k, {"icl": 0.5, "mend-0": 0.9, "mend-1": 0.8}, seed=seed)
    rows = [({"method": "icl", "K": k}, None, f"e/{k}", "icl") for k in ("4", "8")]
    rows += [({"method": "mend", "K": k}, seed, f"e/{k}", f"mend-{seed}") for k in ("4", "8") for seed in (0, 1)]
    there = write_experiment(tmp_path, "num_demonstrations", rows, x="K")
    compare([str(there)])
    printed = capsys.readouterr().out
    first = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ") and "---" not in line]
    assert first[:5] == ["method", "Vanilla ICL, K=4", "Vanilla ICL, K=8", "MEND, K=4", "MEND, K=8"]
    assert first[7:] == [
        "methods",
        "MEND, K=4 − Vanilla ICL, K=4",
        "MEND, K=8 − Vanilla ICL, K=8",
        "Vanilla ICL, K=8 − Vanilla ICL, K=4",
        "MEND, K=8 − MEND, K=4",
    ]
    assert "| MEND, K=4           | 2 " in printed
    compare([str(there)], methods="mend")
    said = capsys.readouterr().out
    assert "| K=8 − K=4 " in said
    compare([str(there)], methods="MEND")  # as its table calls it
    assert capsys.readouterr().out == said
    with says("'memd'", "icl, mend"):
        compare([str(there)], methods="memd")
    with says(there, "alone"):
        compare([str(there), str(tmp_path / "e" / "4")])
    with says("experiment.json", "no rows"):
        compare([str(write_experiment(tmp_path, "cost", []))])


def test_predictions_of_another_key_are_not_taken(evaluation):
    """A folder of an earlier config, whose answers are not those of the scores."""
    source = Source(evaluation, "mend")
    lines = read_answers(source).lines
    write_evaluation(evaluation.parent / "old", {"mend": 0.1}, seed=5)
    (old,) = (evaluation.parent / "old" / "predictions").iterdir()
    old.rename(evaluation / "predictions" / old.name)
    assert read_answers(source).lines == lines


def test_what_cannot_be_compared(evaluation, tmp_path):
    with says("no scores.json", "finished evaluation"):
        compare([str(tmp_path)])
    with says("is a file"):
        compare([str(evaluation / "scores.json")])
    with says("'memd'", "zero_shot, icl, mend"):
        compare([str(evaluation)], methods="icl,memd")
    longer = write_evaluation(tmp_path / "b", {"icl": 0.5}, items=9)
    with says("different items of colour", "evaluate.limit"):
        compare([str(evaluation), str(longer)])
    seeds = write_evaluation(tmp_path / "c", {"icl": 0.5}, seeds=(13, 42))
    with says("different seeds", "evaluate.seeds"):
        compare([str(evaluation), str(seeds)])
    with says("cannot be written"):
        compare([str(evaluation)], out=str(tmp_path / "nowhere" / "t.md"))
    next((evaluation / "predictions").glob("icl-*/*.jsonl")).unlink()
    with says("predictions of icl", "run the evaluation again"):
        compare([str(evaluation)])
    (evaluation / "scores.json").write_text("{")
    with says(evaluation / "scores.json", "run the evaluation again"):
        compare([str(evaluation)])


def test_words_on_the_command_line():
    assert parse(compare, ["compare", "a", "b", "--trainings"]) == [["a", "b"], "", "score", True, "", ""]
    with says("EVALUATION [EVALUATION ...] is missing", "workdirs of evaluations"):
        parse(compare, ["compare", "--metric=accuracy"])
