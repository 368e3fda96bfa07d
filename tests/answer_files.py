"""Evaluations as files, without an LLM: what the tests of comparisons and of the report read."""

import json

import numpy as np

from mend_jax.scoring import results
from mend_jax.scoring.metrics import aggregate, task_scores

TASKS = {"colour": ("red", "green", "blue"), "choice": None}  # "choice" has options of its own in each item
SEEDS = (13, 21)


def write_evaluation(
    folder,
    methods,
    items=24,
    seed=0,
    seeds=SEEDS,
    partition="tiny",
    asked=7,
    facts=None,
    tasks=None,
    trained="runs/{name}/{seed}",
):
    """An evaluation's files; `methods` are {name: share of right answers, or {seed: share}}, `asked` the seed of the items,
    `facts` what decided the answers, `trained` where the methods were trained. Returns the folder."""
    random, scores, found = np.random.default_rng(seed), {}, {}
    asked = {task: _items(np.random.default_rng(asked), options, items) for task, options in TASKS.items()}
    asked = {task: asked[task] for task in tasks or asked}
    for name, share in methods.items():
        store, scores = results.Store(folder, name, {"method": name, "seed": seed} | (facts or {})), {}
        for task, rows in asked.items():
            for of_seed in seeds:
                right = share[of_seed] if isinstance(share, dict) else share
                lines = [_line(random, i, *row, right) for i, row in enumerate(rows)]
                store.write(task, of_seed, lines, {"content": "x"})
                pairs = [line["prediction"] for line in lines], [line["gold"] for line in lines]
                scores.setdefault(task, {})[of_seed] = task_scores(*pairs, task == "colour")
        path = "" if name in ("zero_shot", "icl") else trained.format(name=name, seed=seed, key=name[-8:])
        found[name] = {"path": path, **aggregate(scores), "cost": COST, "scored": 4}
    summary = {"llm": "runs/gpt2-large", "partition": partition, "split": "test", "k": 16, "seeds": list(seeds)}
    results.write_results(folder, summary | {"missing_tasks": [], "methods": found})
    return folder


COST = {"prefix_length": 8.0, "cache_bytes": 1000, "item_flops": 1e9, "item_flops_uncached": 2e9, "item_seconds": 0.1}


def _items(random, options, count):
    rows = []
    for i in range(count):
        own = options or tuple(f"word {i} {j}" for j in range(4))
        rows.append((own, own[random.integers(len(own))]))
    return rows


def _line(random, index, options, gold, share):
    wrong = [option for option in options if option != gold]
    answer = gold if random.random() < share else wrong[random.integers(len(wrong))]
    return {"item": index, "scores": [0.0] * len(options), "options": list(options), "prediction": answer, "gold": gold}


def write_experiment(workdir, name, rows, x=None, config=None, **more):
    """<workdir>/<name>/experiment.json; rows are (labels, training seed, evaluation, method)."""
    there = workdir / name
    there.mkdir(parents=True)
    content = {"experiment": name, "title": f"The experiment {name}", "paper": "Table 9", "commit": "abc1234"}
    content |= {"command": f"python -m mend_jax.experiments.{name} --config=c.py --workdir=w", "date": "2026-11-29"}
    content |= {
        "machine": "2 cores",
        "config": config or {"llm": {"path": "runs/gpt2-large"}, "data": {"partition": "tiny"}},
    }
    content["rows"] = [
        {"labels": labels, "training_seed": seed, "evaluation": evaluation, "method": method}
        for labels, seed, evaluation, method in rows
    ]
    content |= {"varied": list(rows[0][0]) if rows else [], "x": x, **more}
    (there / "experiment.json").write_text(json.dumps(content))
    return there
