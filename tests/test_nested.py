"""Several lengths in one distiller (`prefix.nested`): how they are drawn, trained, chosen and kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import says
from family_rows import save_random
from test_export import make_workdir
from test_start import FAMILIES
from tiny_training import RandomBatches, config, model_folder

import mend_jax
from mend_jax.evaluate import load_method_model
from mend_jax.interchange.export import export
from mend_jax.models.families import EncoderDecoderConfig
from mend_jax.prefixes.distiller import Distiller
from mend_jax.run import checks
from mend_jax.run.layout import make_layout
from mend_jax.step import make_loss_fn

NESTED = {"prefix.nested": (1, 2), "prefix.length": 4, "prefix.rms": 0.0}
CONTEXT = [[5, 3, 9, 2], [7, 1]]


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def trained(request, tmp_path_factory):
    """(config, LLM, distiller) of a family whose distiller has three lengths."""
    folder = save_random(tmp_path_factory.mktemp(request.param) / "llm", FAMILIES[request.param], 0)
    c = config(folder, **NESTED)
    llm = mend_jax.load_llm(folder)
    return c, llm, Distiller.init(c, llm, 3)


def test_each_length_is_what_a_network_of_that_length_makes(trained):
    _, _, distiller = trained
    for count in (1, 2, 4):
        alone = distiller.first(count)
        vectors = jnp.full((2,), count, jnp.int32)
        tokens, length = distiller.read(CONTEXT)
        nested = distiller.apply(distiller.params, tokens, length, vectors=vectors)
        assert alone.num_vectors == count and nested.length.tolist() == [count] * 2
        np.testing.assert_allclose(nested.embeds[:, :count], alone.distill(CONTEXT).embeds, atol=2e-6)
    assert distiller.first(2).nested == (1,) and distiller.first(4) is distiller
    with says("1, 2, 4", "not of 3"):
        distiller.first(3)


def test_a_decoders_shorter_vectors_are_its_first_ones(trained):
    _, _, distiller = trained
    whole, short = distiller.distill(CONTEXT).embeds[:, :2], distiller.first(2).distill(CONTEXT).embeds
    assert distiller.shorter == (() if isinstance(distiller.config, EncoderDecoderConfig) else (1, 2))
    assert np.allclose(whole, short, atol=2e-6) == bool(distiller.shorter)


def test_a_row_trains_the_vectors_that_it_drew(trained):
    """Its loss and gradients are those of the shorter network, and the placeholders that are not read have none."""
    c, llm, distiller = trained
    batch = RandomBatches(c, None)[0].replace(ids=None)
    drawn = batch.replace(vectors=np.full(len(batch.demos), 2, np.int32))
    of = {
        model: jax.value_and_grad(make_loss_fn(c, llm, model), has_aux=True)
        for model in (distiller, distiller.first(2))
    }
    found = {}
    for model, rows in zip(of, (drawn, batch), strict=True):
        (found[model], _), grads = of[model](model.params, llm.params, rows)
        found[model] = [found[model], grads["placeholders"]]
    (loss, grads), (wanted, wanted_grads) = found.values()
    assert loss == pytest.approx(float(wanted), abs=1e-6)
    np.testing.assert_allclose(grads[:2], wanted_grads, atol=1e-6)
    assert np.abs(grads[:2]).max() > 1e-5 and not np.any(grads[2:])


def test_the_lengths_stay_with_an_export_and_can_be_evaluated(tmp_path):
    folder = model_folder(tmp_path / "llm")
    llm = mend_jax.load_llm(folder)
    workdir = make_workdir(tmp_path / "run", llm, folder, folder, **NESTED)
    export(workdir, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "distiller_config.json").read_text())["nested"] == [1, 2]
    c = config(folder, **NESTED)
    for path in (workdir, tmp_path / "out"):
        found = load_method_model(f"first2:{path}", c, llm, make_layout("pmap", c.mesh))
        whole = mend_jax.load_distiller(path, llm)
        assert whole.nested == (1, 2) and found.num_vectors == 2
        np.testing.assert_allclose(found.distill([3, 4]).embeds, whole.distill([3, 4]).embeds[:, :2], atol=2e-6)
    with says("1, 2, 4", "not of 3"):
        load_method_model(f"first3:{workdir}", c, llm, make_layout("pmap", c.mesh))


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"prefix.nested": (4,)}, ["prefix.nested", 4, "below prefix.length=4"]),
        ({"prefix.nested": (2, 2)}, ["prefix.nested", 2, "once"]),
        ({"prefix.nested": (0,)}, ["prefix.nested", 0]),
        ({"prefix.nested": (2,), "prefix.kind": "soft_prompt"}, ["prefix.nested", "soft_prompt", "distiller"]),
    ],
)
def test_lengths_that_cannot_be_trained(fields, facts, tmp_path):
    from mend_jax.cli.settings import check

    c = config(model_folder(tmp_path / "llm", with_weights=False), **fields)
    with says(*facts):
        check(c)
        checks.check_config(c)
