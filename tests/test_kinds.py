"""A kind of prefix is one file: what the program asks it, the ones there are, and one of ten lines that trains and evaluates."""

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import says
from tiny_training import RandomBatches, config, model_folder

from mend_jax.data.evaluation import EvalTask, Item
from mend_jax.data.readers import Readers
from mend_jax.evaluate import evaluate
from mend_jax.interchange import export, trained
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes import KINDS, Distiller, Kind
from mend_jax.prefixes.kind import initial_rows
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run import build, checkpoint, resume
from mend_jax.scoring import costs, tasks
from mend_jax.step import training_losses
from mend_jax.train import train

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Mean(Kind):
    """L vectors, all moved by the mean of the demonstrations' embeddings in a table of its own."""

    name, title, reads_demos, begins_with = "mean", "a mean", True, ("mean",)

    params: Any

    num_vectors = property(lambda self: len(self.params["vectors"]))
    llm_width = property(lambda self: self.params["vectors"].shape[1])
    init = classmethod(
        lambda cls, c, llm, seed, place=None: cls(
            {"vectors": initial_rows(c.prefix, llm, seed), "table": llm.params["embed"]["tokens"]}
        )
    )
    from_run = classmethod(lambda cls, c, params, backbone: cls(jax.tree.map(jnp.asarray, params)))
    flops = lambda self, llm, context: 12_345 * len(context)  # noqa: E731

    def apply(self, params, demos, length):
        inside = (jnp.arange(demos.shape[1]) < length[:, None])[..., None]
        mean = (params["table"][demos] * inside).sum(1) / jnp.maximum(length, 1)[:, None]
        return Prefix(params["vectors"] + mean[:, None], jnp.full(len(length), len(params["vectors"])))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "mean", Mean)
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    return model_folder(tmp_path / "model")


def test_a_new_kind_of_ten_lines_trains_is_evaluated_and_costed(folder, tmp_path, monkeypatch):
    c = config(folder, **{"prefix.kind": "mean", "train.steps": 1, "train.eval_every": 1})
    assert train(c, tmp_path / "run") == 0
    rng = np.random.default_rng(0)
    demos = [(rng.integers(0, 40, 3), rng.integers(0, 40, 1)) for _ in range(3)]
    items = [Item(np.asarray([5, 6]), [np.asarray([1]), np.asarray([2, 3])], ("a", "b"), i % 2) for i in range(4)]
    task = EvalTask("tiny", 13, demos, items, True)
    monkeypatch.setattr("mend_jax.evaluate.load_tasks", lambda *_: ([task], []))
    with c.unlocked():
        c.evaluate.methods, c.evaluate.seeds = ("icl", f"mean={tmp_path / 'run'}"), (13,)
    found = evaluate(c, tmp_path / "table")["methods"]
    cost = found["mean"]["cost"]
    assert cost["prefix_length"] == 4 and cost["demo_tokens"] == 12
    read = costs.read_prefix(load_llm(str(folder)).config, 4)
    assert cost["prefix_flops"] == read + 12 * 12_345  # what making it takes is not free
    moved = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert moved["grad_norm"] > 0


def test_what_a_new_kind_cannot_read_is_one_sentence(folder):
    llm = load_llm(str(folder))
    made = Mean.init(config(folder), llm, 0)
    with says("a mean", "Mean.distill"):
        training_losses(llm, made, [3, 4], [5], [6])


@pytest.mark.slow
def test_a_new_kind_trains_on_a_mesh(folder, tmp_path):
    """Its own parameters have no rule (run/sharding.py): they are whole on each of the 8 devices."""
    assert jax.device_count() == 8
    fields = {"prefix.kind": "mean", "train.steps": 1, "train.eval_every": 1}
    runs = {"pmap": {}, "mesh": {"train.parallel": "mesh", "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}}
    for name, mesh in runs.items():
        assert train(config(folder, **fields, **mesh), tmp_path / name) == 0
    pmap, mesh = (checkpoint.load_best(tmp_path / name)[0] for name in runs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), pmap, mesh)


def test_a_new_kind_is_exported_with_all_that_it_writes(folder, tmp_path, monkeypatch):
    def write_release(self, new):
        new.mkdir()
        (new / "mean.txt").write_text("means")
        return "For others in release/."

    monkeypatch.setattr(Mean, "write", lambda self, new, dtype, llm: "Written.")
    monkeypatch.setattr(Mean, "write_release", write_release)
    monkeypatch.setattr(Mean, "card", lambda self, llm, logits: ("A mean", "of demonstrations"))
    c = config(folder, **{"prefix.kind": "mean", "train.steps": 1, "train.eval_every": 1})
    assert train(c, tmp_path / "run") == 0
    said = export.export(tmp_path / "run", tmp_path / "out")
    assert said.startswith("Written. For others in release/.")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["README.md", "checksums.json", "mean.txt"]


def test_a_new_kind_says_what_its_fields_mean_and_where_its_backbone_is(folder, tmp_path, monkeypatch):
    """To it, "auto" is "linear"; it reads a backbone's folder, but has no parameters of that model."""
    monkeypatch.setattr(Mean, "same_fields", ("prefix.projection",))
    monkeypatch.setattr(Mean, "resolved", classmethod(lambda cls, name, value, *_: value.replace("auto", "linear")))
    monkeypatch.setattr(Mean, "backbone", classmethod(lambda cls, c: c.prefix.backbone))
    fields = {"prefix.kind": "mean", "train.steps": 1, "train.eval_every": 1}
    assert train(config(folder, **fields), tmp_path / "run") == 0
    assert isinstance(trained.read_trained(tmp_path / "run"), Mean)
    fields["prefix.start_from"] = str(tmp_path / "run")
    resume.check_start(config(folder, **fields, **{"prefix.projection": "linear"}))
    with says("prefix.projection", "tanh"):
        resume.check_start(config(folder, **fields, **{"prefix.projection": "tanh"}))


def test_the_methods_without_training():
    assert [kind.method for kind in KINDS.values() if kind.method] == ["zero_shot", "icl"]


def test_nobody_asks_which_kind_it_is():
    """The kinds answer: outside prefixes/ no code tells them apart by class or by name, but `load_distiller` and the
    experiment of the paper's methods."""
    allowed = {"interchange/trained.py", "experiments/methods.py"}
    found = set()
    for path in sorted((ROOT / "mend_jax").rglob("*.py")):
        name = str(path.relative_to(ROOT / "mend_jax"))
        if name.startswith("prefixes/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Compare) else ""
            kinds = any(kind in text for kind in ("Distiller", "SoftPrompt", "Chunked"))
            if (text.startswith("isinstance(") and kinds) or (isinstance(node, ast.Compare) and ".prefix.kind" in text):
                found.add(name)
    assert found <= allowed


def test_the_distillers_parameters_are_those_of_its_module(tmp_path):
    folder = model_folder(tmp_path / "model")
    for projection in ("identity", "linear"):
        c = config(folder, **{"prefix.projection": projection})
        model = Distiller.init(c, load_llm(str(folder)), seed=0)
        shapes = jax.tree.map(lambda a: (a.shape, a.dtype), model.module.shapes())
        assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), model.params)


def test_zero_shot_has_readers_without_a_distiller(tmp_path):
    c = config(model_folder(tmp_path / "model"), **{"prefix.kind": "soft_prompt"})
    found = build.readers_by_folders(c)
    assert (
        isinstance(found, Readers) and not found.reads_demos and found.distiller_window is None and found.vectors == 4
    )
    assert tasks.Method("zero_shot", KINDS["nothing"](16)).model.num_vectors == 0
