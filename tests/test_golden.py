"""Every number of the public release (tests/golden/README.md)."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import mend_jax
from configs import base
from mend_jax.data.batches import Batch
from mend_jax.models.weights import key_table
from mend_jax.prefixes.release import PLACEHOLDERS, PROJECTION
from mend_jax.step import make_loss_fn


@pytest.fixture(scope="module", params=["gpt2", "gpt2_same_width"])
def release(request, golden):
    """(llm, distiller, cases, arrays) of one of the two golden folders."""
    folder = golden / request.param
    llm = mend_jax.load_llm(folder / "llm")
    distiller = mend_jax.load_distiller(
        folder / "distiller_official.safetensors", llm, backbone=folder / "distiller_backbone"
    )
    cases = json.loads((folder / "cases.json").read_text())
    assert distiller.num_vectors == cases["num_vectors"]
    return llm, distiller, cases["cases"], load_file(folder / "arrays.safetensors")


def relative(ours, theirs):
    """Largest distance, against the largest size."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("i", range(4))
def test_vectors(release, i):
    _, distiller, cases, arrays = release
    prefix = distiller.distill(cases[i]["demo"])
    assert relative(prefix.embeds[0], arrays[f"case{i}.vectors"]) < 1e-4
    assert prefix.length.tolist() == [distiller.num_vectors]


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("i", range(4))
def test_losses(release, i):
    llm, distiller, cases, _ = release
    case = cases[i]
    losses = mend_jax.training_losses(llm, distiller, case["demo"], case["input"], case["output"])
    wanted = case["loss"]
    assert losses["kd"] == pytest.approx(wanted["pretrain"], rel=1e-4)
    assert losses["pred"] == pytest.approx(wanted["pred_only"], rel=1e-4)
    finetune = losses["pred"] + case["loss_lambda"] * losses["kd"]
    assert finetune == pytest.approx(wanted["finetune"], rel=1e-4)


@pytest.mark.parametrize("i", range(4))
@pytest.mark.slow
def test_option_scores(release, i):
    llm, distiller, cases, _ = release
    case = cases[i]
    prefixes = {
        "mend": distiller.distill(case["demo"]),
        "vanilla_icl": mend_jax.demonstrations_prefix(llm, case["demo"]),
    }
    for name, prefix in prefixes.items():
        scores = mend_jax.score_options(llm, prefix, case["input"], case["options"])
        assert scores == pytest.approx(case[f"option_scores.{name}"], rel=1e-4), name


@pytest.mark.parametrize("loss", ["pretrain", "finetune"])
@pytest.mark.parametrize("i", range(4))
@pytest.mark.slow
def test_gradients(release, i, loss):
    """Through the very loss function that training differentiates; padding and a second row change nothing."""
    llm, distiller, cases, arrays = release
    case = cases[i]
    config = base.get_config()
    config.stage = loss
    if loss == "finetune":
        config.loss.kd = case["loss_lambda"]
    loss_fn = make_loss_fn(config, llm, distiller)
    (value, _), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        distiller.params, llm.params, padded_batch(case)
    )
    assert float(value) == pytest.approx(case["loss"][loss], rel=1e-4)
    ours = under_their_names(distiller, gradients)
    start = f"case{i}.{loss}.grad."
    names = [name for name in arrays if name.startswith(start)]
    assert len(names) >= 5
    for name in names:
        a, b = ours[name.removeprefix(start)].ravel().astype(np.float64), arrays[name].ravel().astype(np.float64)
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b), name
        assert a @ b >= 0.99999 * np.linalg.norm(a) * np.linalg.norm(b), name


def padded_batch(case) -> Batch:
    """The case twice, as one batch of two rows with padding that is no token of it."""

    def row(ids, size):
        return np.tile(np.pad(np.asarray(ids, np.int32), (0, size - len(ids)), constant_values=7), (2, 1))

    query = [*case["input"], *case["output"]]
    length = np.full(2, len(query), np.int32)
    start = np.full(2, len(case["input"]), np.int32)
    demos_length = np.full(2, len(case["demo"]), np.int32)
    return Batch(
        row(case["demo"], 128),
        demos_length,
        mend_jax.Query(row(query, 48), length, start),
        np.arange(2, dtype=np.int64),
    )


def under_their_names(distiller, tree):
    """The release's names (without hypernet.) of a tree like `distiller.params`."""
    tensors = {PLACEHOLDERS: np.asarray(tree["placeholders"])}
    for name, entry in key_table(distiller.config).items():
        leaf = tree["backbone"]
        for part in entry.path:
            leaf = leaf[part]
        tensors[name] = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
    if "projection" in tree:
        tensors[PROJECTION["kernel"]] = np.asarray(tree["projection"]["kernel"]).T
        tensors[PROJECTION["bias"]] = np.asarray(tree["projection"]["bias"])
    return tensors
