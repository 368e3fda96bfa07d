"""The report: one page that needs nothing else, with all that an experiment left; and a sentence for what is missing."""

import csv
import itertools
import json
import re

import numpy as np
import pytest
from answer_files import write_evaluation, write_experiment
from facts import says

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from mend_jax.experiments import paper
from mend_jax.experiments.report import report
from mend_jax.report.drawing import Bar
from mend_jax.report.figures import bars
from mend_jax.report.results import read_results
from mend_jax.report.score_figures import rank_figures
from mend_jax.report.sections import section_of
from mend_jax.report.studies import scored_rows

GPT2_LARGE = {"llm": {"path": "models/gpt2-large"}, "data": {"partition": "class_to_class"}}
HEADS = [{"layer": 1, "head": 2, "score": 0.9}, {"layer": 0, "head": 1, "score": 0.5}]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Experiments whose numbers are made up: a table, a curve, hyperparameters, costs, attention, a training."""
    folder = tmp_path_factory.mktemp("experiments")
    shares = {"icl": 0.6, "mend-0": 0.8, "mend-1": 0.85}
    for seed, name in enumerate(("none", "no_label", "four", "eight")):
        write_evaluation(
            folder / "evaluations" / name, {n: share - 0.2 * (seed == 1) for n, share in shares.items()}, seed=seed
        )
    table, curve = [], []
    for kind in ("none", "no_label"):
        table.append(({"method": "icl", "demonstrations": kind}, None, f"evaluations/{kind}", "icl"))
        table += [({"method": "mend", "demonstrations": kind}, s, f"evaluations/{kind}", f"mend-{s}") for s in (0, 1)]
    for k, name in (("4", "four"), ("8", "eight")):
        curve += [
            ({"method": m, "K": k}, None, f"evaluations/{name}", key) for m, key in (("icl", "icl"), ("mend", "mend-0"))
        ]
    write_experiment(folder, "perturbations", table, config=GPT2_LARGE)
    write_experiment(folder, "num_demonstrations", curve, x="K")
    values = [
        ({"hyperparameter": "beta", "value": v}, 0, "evaluations/none", key)
        for v, key in (("0.1", "icl"), ("0.8", "mend-1"))
    ]
    write_experiment(folder, "hyperparameters", values)
    write_experiment(
        folder, "cost", [], costs=[_cost(m, rows) for m in ("icl", "mend") for rows in (1, 8)], ratios=[RATIO]
    )
    random = np.random.default_rng(0)
    examples = [
        {"task": f"t{i}", "seed": 13, "item": 0, "method": method, "heads": [_seen(random) for _ in HEADS]}
        for i in range(3)
        for method in ("icl", "mend")
    ]
    more = {"scores": random.random((3, 4)).tolist(), "heads": HEADS, "examples": examples, "columns": 20}
    write_experiment(folder, "attention", [], **more, by_chance=0.01, sequence_length=48)
    training = folder / "trainings" / "finetune-1a2b3c4d"
    training.mkdir(parents=True)
    (training / "config.json").write_text("{}")
    lines = [
        {"step": step, "loss": 3 / step} | ({"dev_score": step / 100, "recovered": step / 90} if step % 20 == 0 else {})
        for step in range(10, 70, 10)
    ]
    (training / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "objectives").mkdir()
    report(str(folder))
    return folder


RATIO = {
    "llm": "gpt2-large",
    "task": "Class",
    "paper": 0.286,
    "as_the_paper_counts": 0.29,
    "ours": 0.3,
    "ours_to_the_papers_icl": 0.27,
}


def _cost(method, rows):
    both = {r: {"once": 1e11 if r == "c" else 0, "query": 1e12} for r in "abc"}
    row = {"llm": "gpt2-large", "lengths": "the paper", "name": "Class", "demos": 469, "method": method, "rows": rows}
    row |= {"flops": both, "peak_bytes": dict.fromkeys("abc", 10**9), "cache": 10**6, "stored": 2000}
    row |= {"compilers_flops": both, "seconds": {r: {"once": 0.1, "query": 0.5} for r in "abc"}} if rows == 1 else {}
    return row | ({"pays_from": {"a": 1, "b": 7, "c": None}} if method == "mend" else {})


def _seen(random):
    return {"prefix": random.random(5).tolist(), "input": random.random(random.integers(2, 30)).tolist(), "share": 0.4}


def test_the_page_needs_nothing_else(workdir):
    page = (workdir / "report" / "index.html").read_text()
    assert (
        not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page) and "<script" not in page and "@import" not in page
    )
    assert 'name="viewport"' in page
    files = {path.relative_to(workdir / "report").as_posix() for path in (workdir / "report").rglob("*.*")}
    linked = set(re.findall(r'href="((?:figures|data)/[^"]+)"', page))
    assert linked == files - {"index.html", "report.md"}
    assert page.count("<svg ") == sum(name.endswith(".png") for name in files) == 12
    marks = re.findall(r'\bid="([^"]+)"', page)
    assert len(marks) == len(set(marks))  # figures in one page must not use each other's parts
    assert set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', page)) <= set(marks)


def test_every_result_is_on_both_pages(workdir):
    page, text = ((workdir / "report" / name).read_text() for name in ("index.html", "report.md"))
    for result in read_results(workdir):
        for fact in (result.head["title"], result.head["command"], "abc1234", "2 cores", "2026-11-29"):
            assert fact in page and fact in text
        assert f'<h2 id="{result.name}"' in page
    assert "objectives" in page and "not finished" in page
    assert "never" in page and "finetune-1a2b3c4d, of no finished experiment" in page


@pytest.mark.parametrize("name", ["cost", "attention"])
def test_a_result_that_lacks_its_numbers_is_one_sentence(name, tmp_path):
    write_experiment(tmp_path, name, [])
    with says(name, "experiment.json", "again"):
        report(str(tmp_path))


def test_names_from_results_are_shown_and_lead_nowhere(tmp_path):
    evil = "$\\frac a \x1b[31m|<b>`x` \u202e"
    write_evaluation(tmp_path / "e", {"icl": 0.6, "mend": 0.8}, items=6)
    rows = [({"method": method, evil: f"{evil}{i}"}, None, "e", method) for i, method in enumerate(("icl", "mend"))]
    folder = write_experiment(tmp_path, "order", rows)
    report(str(tmp_path))
    for name in ("index.html", "report.md"):
        page = (tmp_path / "report" / name).read_text()
        assert (
            "\x1b" not in page and "\u202e" not in page and "<b>" not in page.replace("\\<b", "") and "frac a" in page
        )
    content = json.loads((folder / "experiment.json").read_text())
    (folder / "experiment.json").write_text(json.dumps(content | {"experiment": "../../out"}))
    with says("../../out", "experiment.json"):
        report(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"e", "order", "report"}


def test_the_data_of_a_table_are_its_numbers(workdir):
    (row,) = (r for r in _csv(workdir, "perturbations_by_method") if r["method"] == "MEND")
    scores = json.loads((workdir / "evaluations" / "none" / "scores.json").read_text())["methods"]
    mean = np.mean([scores[name]["score"]["mean"] for name in ("mend-0", "mend-1")])
    assert float(row["unchanged"]) == pytest.approx(100 * mean, abs=1e-5) and float(row["unchanged_std"]) > 0
    papers = {r["method"]: r for r in _csv(workdir, "perturbations_by_method")}["MEND, paper"]
    assert [float(papers[kind]) for kind in ("unchanged", "no_label")] == [
        paper.TABLE_3[kind]["mend"] for kind in ("none", "no_label")
    ]
    long = {(r["method"], r["demonstrations"]): r for r in _csv(workdir, "perturbations_rows")}
    mine = long["MEND", "unchanged"]
    assert mine["trainings"] == "2" and long["Vanilla ICL", "unchanged"]["trainings"] == ""
    assert (
        float(mine["score_low"]) <= float(mine["score"]) <= float(mine["score_high"])
        and float(mine["prefix_length"]) == 8
    )
    assert float(mine["p"]) > 0 and int(mine["tasks_won"]) + int(mine["tasks_lost"]) <= 2
    assert (
        long["MEND", "no_label"]["compared with"] == "Vanilla ICL, no_label"
        and long["Vanilla ICL", "no_label"]["compared with"] == "Vanilla ICL, unchanged"
    )
    assert {"most frequent label", "random option"} <= {r["method"] for r in _csv(workdir, "perturbations_rows")}
    assert len(_csv(workdir, "perturbations_tasks")) == 4 * 2
    bars = _csv(workdir, "num_demonstrations")
    assert [r["K"] for r in bars] == ["4", "8", "4", "8"] and all(
        float(r["low"]) <= float(r["value"]) <= float(r["high"]) for r in bars
    )
    costs = _csv(workdir, "cost")
    assert {r["peak_bytes_a"] for r in costs} == {"1000000000"} and {r["flops_a"] for r in costs} == {"1000000000000.0"}


def test_data_are_numbers_and_ascii(workdir):
    for path in (workdir / "report" / "data").glob("*.csv"):
        text = path.read_text(encoding="utf-8")
        assert text.isascii() and not re.search(r"\d \[|\d [kM]?B\b", text), path


def test_the_whole_config_is_beside_the_data_and_the_page_shows_what_differs(workdir):
    page, text = ((workdir / "report" / name).read_text() for name in ("index.html", "report.md"))
    file = "data/perturbations_config.json"
    assert json.loads((workdir / "report" / file).read_text()) == GPT2_LARGE
    assert f'href="{file}"' in page and f"[{file}]({file})" in text
    (result,) = (r for r in read_results(workdir) if r.name == "perturbations")
    changed = section_of(result).changed_config
    assert 'llm.path = "models/gpt2-large"' in changed and "data.partition" not in changed  # it is the default


def test_a_rows_labels_stay_in_sight_together(workdir):
    page = (workdir / "report" / "index.html").read_text()
    assert "<td>MEND, K=4</td>" in page and "<td>Vanilla ICL, no_label</td>" in page
    assert "<td>beta=0.8</td>" in page and '<th scope="col"></th>' not in page


def test_the_same_report_every_time(tmp_path):
    write_evaluation(tmp_path / "evaluation", {"icl": 0.7})
    made = []
    for _ in range(2):
        report(str(tmp_path))
        made.append({path: path.read_bytes() for path in (tmp_path / "report").rglob("*.*")})
    assert made[0] == made[1] and len(made[0]) == 6  # two pages, a figure with its data, two tables


def test_the_average_rank_of_a_hyperparameters_values(workdir):
    (result,) = (r for r in read_results(workdir) if r.name == "hyperparameters")
    (drawing,) = rank_figures(scored_rows(result))
    ranks = {row[0]: row[2] for row in drawing.rows}
    assert ranks == {"beta = 0.1": 2.0, "beta = 0.8": 1.0}  # the first is worse on both tasks


def test_an_evaluation_alone_is_reported(tmp_path):
    write_evaluation(tmp_path / "run" / "evaluation", {"zero_shot": 0.4, "icl": 0.7})
    (result,) = read_results(tmp_path / "run")
    section = section_of(result)
    assert [row[0] for row in section.tables[0].rows][:2] == ["zero-shot", "Vanilla ICL"]


def test_names_below_bars_stand_apart():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [f"domain-{what}, none, 0" for what in ("arithmetic", "code", "format")]
    names += [f"small_world, {noise}, {share}" for noise in ("irrelevant", "adversarial") for share in (0.25, 0.5, 1)]
    figure = bars("name", "caption", [Bar(name, "score", 50.0) for name in names], "score").figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    seen = 0
    for axis in figure.axes:
        boxes = [label.get_window_extent(renderer) for label in axis.get_xticklabels()]
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
        seen += len(boxes)
    assert seen == len(names) and len({axis.get_ylim() for axis in figure.axes}) == 1


def test_costs_of_several_queries_to_a_pass_alone(tmp_path):
    write_experiment(tmp_path, "cost", [], costs=[_cost(method, 8) for method in ("icl", "mend")], ratios=[])
    (result,) = read_results(tmp_path)
    assert [len(drawing.rows) for drawing in section_of(result).drawings] == [
        2 + 2 * 5,
        2,
    ]  # beside the paper's, and alone


def test_what_cannot_be_reported(tmp_path):
    with says("not a folder"):
        report(str(tmp_path / "nowhere"))
    with says(tmp_path, "no result", "run an experiment"):
        report(str(tmp_path))
    write_evaluation(tmp_path / "evaluations" / "e", {"icl": 0.5})
    there = write_experiment(tmp_path, "order", [({"method": "icl", "order": "0"}, None, "evaluations/e", "icl")])
    text = (there / "experiment.json").read_text()
    (there / "experiment.json").write_text(text.replace("evaluations/e", "evaluations/f"))
    with says("evaluations/f", "remove"):
        report(str(tmp_path))
    (there / "experiment.json").write_text(
        text.replace('"evaluations/e", "method": "icl"', '"evaluations/e", "method": "mend"')
    )
    with says("'mend'", "icl"):
        report(str(tmp_path))
    long = text.replace('"evaluations/e"', f'"{"x" * 300}"')
    for damaged in (text[:40], "[]", text.replace('"rows"', '"lines"'), text.replace('"labels"', '"label"'), long):
        (there / "experiment.json").write_text(damaged)
        with says("experiment.json", "run the experiment again"):
            report(str(tmp_path))


def _csv(workdir, name):
    with open(workdir / "report" / "data" / f"{name}.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))
