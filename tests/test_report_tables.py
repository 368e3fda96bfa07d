"""What the report's tables, figures and names say of experiments whose answers are made up."""

import dataclasses
import json

import answer_files
import numpy as np
import pytest
from answer_files import write_evaluation, write_experiment

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from mend_jax.cli.text import counted
from mend_jax.report.looks import KNOWN, OTHERS, looks
from mend_jax.report.names import joined
from mend_jax.report.page import as_markdown
from mend_jax.report.results import read_results
from mend_jax.report.sections import section_of
from mend_jax.report.studies import scored_rows
from mend_jax.report.trainings import read_trainings


def test_the_spread_over_orders_is_that_within_a_seed(tmp_path):
    """Seeds have orders of their own: where one gains what the other loses, the mean over seeds stays, and each goes apart."""
    rows = []
    for order, shares in enumerate(((0.2, 0.9), (0.9, 0.2))):
        folder = tmp_path / "evaluations" / str(order)
        write_evaluation(folder, {"icl": dict(zip((13, 21), shares, strict=True))}, items=60)
        rows.append(({"method": "icl", "order": str(order)}, None, f"evaluations/{order}", "icl"))
    write_experiment(tmp_path, "order", rows)
    (result,) = read_results(tmp_path)
    values = np.array([one.draws.values.mean((0, 1)) for one in scored_rows(result)])  # (orders, seeds)
    (table, *_) = section_of(result).tables
    found = dict(zip(table.data_header, table.data_rows[0], strict=True))
    assert found["std_over_orders"] == pytest.approx(100 * values.std(0, ddof=1).mean(), abs=1e-5)
    assert found["apart"] == pytest.approx(100 * np.ptp(values, 0).mean(), abs=1e-5)
    assert found["apart"] > 40 > 10 > 100 * np.ptp(values.mean(1)) and "within one seed" in table.note


def test_a_prefix_that_stops_growing_is_said(tmp_path):
    lengths = {"1": 20, "4": 80, "16": 300, "64": 310}
    rows = [({"method": "icl", "K": k}, f"icl-{k}", length) for k, length in lengths.items()]
    rows += [({"method": "mend", "K": k}, f"mend-{k}", 8) for k in lengths]
    result = _of_one_evaluation(tmp_path, "num_demonstrations", rows, x="K")
    note = _table(result, "num_demonstrations_rows").note
    assert (
        "Vanilla ICL: beyond K=16 the prefix, of 300 positions, grows by less than K, to 310" in note
        and "same length for every K: MEND." in note
    )
    (drawing,) = section_of(result).drawings
    assert note in drawing.caption


def test_pairs_are_of_methods_under_equal_labels_or_of_few_rows(tmp_path):
    rows = [({"method": m, "kind": k}, f"{m}-{k}", 8) for k in "ab" for m in ("zero_shot", "icl", "mend")]
    table = _table(_of_one_evaluation(tmp_path / "1", "perturbations", rows), "perturbations_pairs")
    names = ("Vanilla ICL", "zero-shot"), ("MEND", "zero-shot"), ("MEND", "Vanilla ICL")
    across = [(*pair, k) for k in "ab" for pair in names]
    within = [("b", "a", name) for name in ("zero-shot", "Vanilla ICL", "MEND")]  # with the first of its method
    assert _columns(table, "one", "other", "both") == across + within and table.folded
    rows = [({"objective": name}, name, 8) for name in "abcd"]
    assert len(_table(_of_one_evaluation(tmp_path / "2", "objectives", rows), "objectives_pairs").rows) == 6
    rows = [({"objective": name}, name, 8) for name in "abcdefghijklm"]
    many = section_of(_of_one_evaluation(tmp_path / "3", "objectives", rows))
    assert [table.name for table in many.tables] == ["objectives_rows", "objectives_tasks"]


def test_a_hyperparameters_values_are_compared_with_each_other(tmp_path):
    rows = [
        ({"hyperparameter": h, "value": v}, f"{h}-{v}", 8)
        for h, v in (("beta", "0.5"), ("beta", "0.8"), ("gamma", "0"), ("gamma", "1"))
    ]
    result = _of_one_evaluation(tmp_path, "hyperparameters", rows)
    found = [one.baseline and one.baseline.label("hyperparameter") for one in scored_rows(result)]
    assert found == [None, "beta", None, "gamma"]
    assert _columns(_table(result, "hyperparameters_pairs"), "one", "other") == [
        ("beta=0.8", "beta=0.5"),
        ("gamma=1", "gamma=0"),
    ]


def test_ablations_of_several_settings_are_compared_within_each(tmp_path):
    """Settings may have the same test tasks: their rows are then one study."""
    stages = ("icl", "-"), ("mend", "L_distill"), ("mend", "none")
    rows = [({"method": m, "setting": s, "pretraining": p}, f"{m}-{s}-{p}", 8) for s in "ab" for m, p in stages]
    result = _of_one_evaluation(tmp_path, "ablations", rows)
    assert len(_table(result, "ablations_pairs").rows) == 2 * 3
    found = [one.baseline and one.baseline.label("setting") for one in scored_rows(result)]
    assert found == [None, None, "a", "a", None, "b"]  # Vanilla ICL, which is alone in b, is compared with itself in a


def test_the_loss_of_another_template(tmp_path):
    rows = [
        ({"method": "mend", "trained": a, "tested": b}, f"mend-{a}-{b}", 8)
        for a in ("space", "newline")
        for b in ("space", "newline")
    ]
    table = _table(_of_one_evaluation(tmp_path, "templates", rows), "templates_diff")
    assert [row[:2] for row in _columns(table, "trained", "tested")] == [("space", "newline"), ("newline", "space")]
    for own, other, diff in _columns(table, "own", "other", "diff"):
        assert diff == pytest.approx(other - own, abs=1e-5)


def test_the_mean_over_settings_has_an_interval(tmp_path):
    rows = [({"method": m, "setting": s}, f"{m}-{s}", 8) for s in "ab" for m in ("icl", "mend")]
    table = _table(_of_one_evaluation(tmp_path, "main_table", rows), "main_table_by_method")
    for a, b, mean, low, high in _columns(table, "a", "b", "mean", "mean_low", "mean_high"):
        assert mean == pytest.approx((a + b) / 2, abs=1e-5) and low < mean < high


def test_metrics_that_repeat_the_score_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(answer_files, "TASKS", {"colour": answer_files.TASKS["colour"]})
    result = _of_one_evaluation(tmp_path, "methods", [({"method": m}, m, 8) for m in ("icl", "mend")])
    header = _table(result, "methods_rows").header
    assert "accuracy [95%]" in header and "Macro-F1 [95%]" not in header and len(set(header)) == len(header)


def test_noise_has_a_panel_for_each_kind(tmp_path):
    where = {"tasks": "own"}
    rows = [({"method": "mend", **where, "demonstrations": "none", "share": "0"}, "mend", 8)]
    rows += [
        ({"method": "mend", **where, "demonstrations": kind, "share": share}, f"{kind}-{share}", 8)
        for kind in ("typos", "irrelevant")
        for share in ("0.5", "1")
    ]
    clean, noise = section_of(_of_one_evaluation(tmp_path, "domains", rows)).drawings
    assert [row[0] for row in clean.rows] == ["MEND"]
    assert [row[:3] for row in noise.rows] == [
        [kind, share, "MEND"] for kind in ("typos", "irrelevant") for share in ("50", "100", "0")
    ]
    assert [axis.get_title() for axis in noise.figure.axes] == ["typos", "irrelevant"]


def test_a_method_looks_the_same_in_every_figure():
    both, alone = looks(["other", "MEND", "Vanilla ICL"]), looks(["Vanilla ICL", "MEND"])
    assert both["MEND"] == alone["MEND"] and both["Vanilla ICL"] == alone["Vanilla ICL"]
    for own in (KNOWN.values(), OTHERS):
        assert len({(look.marker, look.dashes) for look in own}) == len(own)
    assert len({look.line for look in OTHERS}) == len(OTHERS) and {look.hatch for look in OTHERS} >= {"xxx", "..."}


def test_trainings_are_named_after_the_rows_that_use_them(tmp_path):
    trained = {"finetune-aaaaaaaa": (0, "pretrain-bbbbbbbb"), "finetune-cccccccc": (1, "pretrain-dddddddd")}
    trained |= {"pretrain-bbbbbbbb": (0, ""), "pretrain-dddddddd": (1, ""), "finetune-eeeeeeee": (0, "")}
    for name, (seed, start) in trained.items():
        folder = tmp_path / "trainings" / name
        folder.mkdir(parents=True)
        config = {"seed": seed, "prefix": {"start_from": f"/elsewhere/trainings/{start}" if start else ""}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    write_evaluation(tmp_path / "e", {"icl": 0.4, "mend-aaaaaaaa": 0.5, "mend-cccccccc": 0.6})
    rows = [({"method": "icl", "l": "8"}, None, "e", "icl")]
    rows += [({"method": "mend", "l": l}, s, "e", f"mend-{k}") for l, s, k in (("8", 0, 8 * "a"), ("16", 1, 8 * "c"))]
    write_experiment(tmp_path, "num_vectors", rows, x="l")
    rows = [({"method": "mend", "order": str(i)}, 0, "e", "mend-aaaaaaaa") for i in range(2)]
    write_experiment(tmp_path, "order", rows)
    found = read_trainings(tmp_path, read_results(tmp_path))
    assert {stage: [name for name, _ in own.values()] for stage, own in found.items()} == {
        "finetune": ["MEND, seed=0", "MEND, l=16, seed=1", "finetune-eeeeeeee, of no finished experiment"],
        "pretrain": ["pretraining of MEND, seed=0", "pretraining of MEND, l=16, seed=1"],
    }


@pytest.mark.parametrize(
    ("paper", "heading"),
    [("Table 3", "(the paper's Table 3)"), ("asked for by reviewers", ""), ("", "")],
)
def test_headings_read_well(tmp_path, paper, heading):
    result = _of_one_evaluation(tmp_path, "order", [({"method": "icl", "order": "0"}, "icl", 8)])
    result = dataclasses.replace(result, head=result.head | {"paper": paper})
    text = as_markdown("t", [], [section_of(result)])
    assert f"\n## The experiment order {heading}".rstrip() + "\n" in text
    assert counted(1, "task") == "1 task" and counted(2, "task") == "2 tasks"
    assert joined([("method", "icl"), ("a", "-"), ("b", "-")]) == "Vanilla ICL, untrained"


def _of_one_evaluation(folder, name, rows, **more):
    """The result of an experiment whose rows are (labels, method, prefix length): all answered the same."""
    shares = {method: 0.3 + 0.05 * i for i, (_, method, _) in enumerate(rows)}
    write_evaluation(folder / "e", shares, items=12)
    scores = json.loads((folder / "e" / "scores.json").read_text())
    for _, method, length in rows:
        scores["methods"][method]["cost"] = {"prefix_length": length}
    del scores["checksum"]
    (folder / "e" / "scores.json").write_text(json.dumps(scores))
    write_experiment(folder, name, [(labels, None, "e", method) for labels, method, _ in rows], **more)
    (result,) = read_results(folder)
    return result


def _table(result, name):
    (found,) = (table for table in section_of(result).tables if table.name == name)
    return found


def _columns(table, *names):
    return [tuple(row[table.data_header.index(name)] for name in names) for row in table.data_rows]
