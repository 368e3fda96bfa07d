"""Two tasks in MetaICL's layout and the models that answer them, for the tests of evaluation."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from mend_jax.interchange import trained
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.soft_prompt import SoftPrompt

TASKS = ("colour", "choice")
METHODS = ("zero_shot", "icl", "prompt=a/prompt", "mend=a/distiller")


def write_tasks(root):
    """Two seeds of each: `colour` is classification, `choice` has its own options per item. Returns the folder."""
    rng = np.random.default_rng(0)
    words = lambda n: " ".join(f"w{i}" for i in rng.integers(0, 60, n))  # noqa: E731

    def row(task):
        options = (
            ["w1", "w2 w3", "w4"] if task == "colour" else [words(rng.integers(1, 4)) + f" w{i}" for i in range(4)]
        )
        output = options[rng.integers(len(options))]
        return json.dumps({"task": task, "input": words(rng.integers(2, 7)), "output": output, "options": options})

    for task in TASKS:
        test = "\n".join(row(task) for _ in range(9)) + "\n"
        (root / "data" / task).mkdir(parents=True)
        for seed in (13, 21):
            for split in ("train", "dev"):
                (root / "data" / task / f"{task}_4_{seed}_{split}.jsonl").write_text(
                    "".join(row(task) + "\n" for _ in range(4))
                )
            (root / "data" / task / f"{task}_4_{seed}_test.jsonl").write_text(test)
    (root / "partitions.json").write_text(json.dumps({"tiny": {"train": ["other"], "test": list(TASKS)}}))
    return root


def make_distiller(llm, backbone):
    """One of 5 vectors for `llm`, of the backbone in a folder; untrained."""
    backbone = load_llm(backbone)
    kernel = jax.random.normal(jax.random.key(3), (backbone.config.width, llm.config.width))
    params = {
        "backbone": backbone.params,
        "placeholders": jax.random.normal(jax.random.key(4), (5, backbone.config.width)),
        "projection": {"kernel": kernel, "bias": jnp.zeros(llm.config.width)},
    }
    return Distiller(backbone.config, params, "tanh", llm.config.width)


def make_config(folder, llm):
    """Of an evaluation of the LLM in the folder `llm` on the tasks that `write_tasks` wrote to `folder`."""
    c = base.get_config()
    c.llm.path, c.data.tasks, c.data.partition, c.data.k = str(llm), str(folder), "tiny", 4
    c.data.demo_buckets, c.evaluate.seeds, c.evaluate.batch_size = (32, 48), (13, 21), 4
    c.data.max_demo_tokens = 48
    return c


def known_models(monkeypatch, distiller, llm):
    """Trained models without training: {path that the loader knows: model}, which a test may change."""
    vectors = jax.random.normal(jax.random.key(5), (3, llm.config.width))
    known = {"a/distiller": distiller, "a/prompt": SoftPrompt({"vectors": vectors})}
    monkeypatch.setattr(trained, "read_trained", lambda path, *where: known[path])
    return known


def files(workdir, ending=".jsonl"):
    """{path in the workdir: text} of the files that end so."""
    return {p.relative_to(workdir): p.read_text() for p in sorted(workdir.rglob("*" + ending))}
