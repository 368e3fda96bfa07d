"""The teacher's predictions on disk: nearly the same loss and gradient, the same run again without a teacher's pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_t5
from facts import says
from family_rows import save_random
from tiny_training import RandomBatches, config, model_folder, programs_made_once

from mend_jax import train
from mend_jax.losses import TopK, head_loss
from mend_jax.objectives import Objective
from mend_jax.run import build, checkpoint, reporting
from mend_jax.run.teacher_cache import TeacherCache

B, Q, D, V = 3, 8, 12, 50
FIELDS = {"train.steps": 4, "train.log_every": 1, "train.eval_every": 4, "train.save_every": 2}


@pytest.fixture(autouse=True, scope="module")
def _programs_made_once():
    with programs_made_once():
        yield


@pytest.fixture
def world():
    keys = jax.random.split(jax.random.key(0), 4)
    student, teacher = (jax.random.normal(key, (B, Q, D)) for key in keys[:2])
    return student, teacher, jax.random.normal(keys[2], (V, D)), jax.random.randint(keys[3], (B, Q), 0, V)


def value_and_gradient(world, teacher, objective="forward_kl"):
    student, _, head, targets = world
    weight = jnp.full((B, Q), 1 / (B * Q))

    def loss(student):
        return head_loss(student, teacher, head, targets, weight, 0 * weight, 5, objective=Objective(objective))[0]

    return jax.jit(jax.value_and_grad(loss))(student)


def kept(world, k):
    _, teacher, head, _ = world
    found = TopK.of(teacher.reshape(-1, D), head, k, 5)
    return jax.tree.map(lambda a: a.reshape(B, Q, *a.shape[1:]), found)


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jensen_shannon", "top_k_kl"])
@pytest.mark.slow
def test_all_words_are_the_teacher_itself(world, objective):
    wanted = value_and_gradient(world, world[1], objective)
    found = value_and_gradient(world, kept(world, V), objective)
    for ours, theirs in zip(found, wanted, strict=True):  # float16 has 11 bits
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("k", [2, 10, 30])
@pytest.mark.slow
def test_what_is_lost_bounds_the_change_of_the_gradient(world, k):
    """The gradient of a token's logits is student - teacher, so the states' changes by no more than that of the teacher's
    probabilities, times the head's largest row."""
    _, teacher, head, _ = world
    top = kept(world, k)
    true = jax.nn.softmax(teacher @ head.T)
    dense = jax.vmap(lambda row: row.logits(V))(top)
    changed = jnp.abs(jax.nn.softmax(dense) - true).sum(-1)
    assert jnp.all(changed <= 2 * top.lost + 2e-3) and float(top.lost.max()) > 0.001
    np.testing.assert_allclose(top.lost, 1 - jnp.sort(true)[..., -k:].sum(-1), atol=2e-3)
    gradients = [value_and_gradient(world, made)[1] for made in (top, teacher)]
    distance = jnp.linalg.norm(gradients[0] - gradients[1], axis=-1)
    assert jnp.all(distance <= (2 * top.lost + 2e-3) / (B * Q) * jnp.linalg.norm(head, axis=1).max())


def _computes_nothing(self, frozen, batch):
    raise AssertionError("the teacher is computed")


@pytest.mark.parametrize(("family", "parallel"), [("gpt2", "mesh"), ("t5", "pmap")])
@pytest.mark.slow
def test_a_rerun_is_the_same_without_a_teachers_pass(family, parallel, tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "llm")
    if family == "t5":
        folder = save_random(tmp_path / "t5", test_t5.COMMON | {"model_type": "t5"} | test_t5.V1, 0)
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    cache = {"loss.teacher_cache": str(tmp_path / "cache"), "loss.teacher_top_k": 8, "train.parallel": parallel}
    if parallel == "mesh":
        cache["train.batch_size"] = 8
    assert train.train(config(folder, **FIELDS, **cache), tmp_path / "first") == 0
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 4
    lost = [
        line["teacher_lost"] for line in reporting.read_lines(tmp_path / "first" / "metrics.jsonl") if "loss" in line
    ]
    assert len(lost) == 4 and 0 < min(lost) < max(lost) < 1
    init = TeacherCache.__init__

    def without(self, *args):
        init(self, *args)
        self.compiled = lambda frozen, batch: _computes_nothing(self, frozen, batch)

    monkeypatch.setattr(TeacherCache, "__init__", without)
    assert train.train(config(folder, **FIELDS, **cache), tmp_path / "again") == 0
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (tmp_path / "first" / "metrics.jsonl").read_bytes()
    with pytest.raises(AssertionError, match="is computed"):  # other draws
        train.train(config(folder, **FIELDS, **cache, seed=1), tmp_path / "seed")


@pytest.mark.slow
def test_a_damaged_file_is_made_again_and_another_llm_has_its_own(tmp_path, monkeypatch, caplog):
    folder, other = model_folder(tmp_path / "llm"), model_folder(tmp_path / "other", heads=1)
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    cache = {"loss.teacher_cache": str(tmp_path / "cache"), "loss.teacher_top_k": 8}
    assert train.train(config(folder, **FIELDS, **cache), tmp_path / "whole") == 0
    damaged, *_ = files = sorted((tmp_path / "cache").rglob("*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert train.train(config(folder, **FIELDS, **cache), tmp_path / "again") == 0
    assert str(damaged) in caplog.text and "damaged" in caplog.text
    ours, theirs = (checkpoint.read_step(tmp_path / name, 4) for name in ("whole", "again"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert sorted((tmp_path / "cache").rglob("*.npz")) == files
    assert train.train(config(other, **FIELDS, **cache), tmp_path / "of_other") == 0
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 2 * len(files)


def test_more_words_than_there_are(tmp_path):
    folder = model_folder(tmp_path / "llm")
    with says("loss.teacher_top_k=100000", "lower it"):
        train.train(
            config(folder, **FIELDS, **{"loss.teacher_cache": str(tmp_path / "cache"), "loss.teacher_top_k": 100_000}),
            tmp_path / "run",
        )


def test_states_are_not_predictions(tmp_path):
    folder = model_folder(tmp_path / "llm")
    cache = {"loss.teacher_cache": str(tmp_path / "cache"), "loss.objective": "hidden_mse"}
    with says("loss.objective", "hidden_mse", "loss.teacher_cache"):
        train.train(config(folder, **cache), tmp_path / "run")
