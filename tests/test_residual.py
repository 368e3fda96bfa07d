"""Vectors that are added to the embeddings of the last demonstration tokens (`prefix.residual`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import says
from family_rows import save_random
from test_start import FAMILIES, rms
from tiny_training import RandomBatches, config, model_folder

import mend_jax
from mend_jax import evaluate
from mend_jax.data.sampling import EMPTY
from mend_jax.interchange.export import export
from mend_jax.prefixes import Chunked
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.start import RESIDUAL_SHARE, embeddings_rms
from mend_jax.run import checks
from mend_jax.run.layout import make_layout

RESIDUAL = {"prefix.residual": True, "prefix.train_embeddings": False, "prefix.length": 4}
CONTEXTS = [[5, 3, 9, 2, 8, 1], [7, 1]]  # longer and shorter than the vectors


@pytest.fixture(scope="module", params=["gpt2", "gemma3", "opt-350m", "t5"])
def made(request, tmp_path_factory):
    """(config, LLM, distiller); gemma3 scales its embeddings, opt-350m projects them."""
    folder = save_random(tmp_path_factory.mktemp(request.param) / "llm", FAMILIES[request.param], 0)
    c, llm = config(folder, **RESIDUAL), mend_jax.load_llm(folder)
    return c, llm, Distiller.init(c, llm, 3).read_by(llm)


def embedded(llm, tokens):
    return llm.embed(llm.params, jnp.asarray([tokens]))[0]


def test_what_is_added_to_the_last_tokens_is_what_the_distiller_makes_without(made):
    _, llm, distiller = made
    alone = dataclasses.replace(distiller, residual=False)
    added = distiller.distill(CONTEXTS).embeds - alone.distill(CONTEXTS).embeds
    np.testing.assert_allclose(added[0], embedded(llm, CONTEXTS[0][-4:]), atol=1e-5)
    np.testing.assert_allclose(added[1, 2:], embedded(llm, CONTEXTS[1]), atol=1e-5)
    assert not np.any(added[1, :2])  # places without a token
    found = rms(alone.distill(np.arange(24).tolist()).embeds)
    assert found == pytest.approx(RESIDUAL_SHARE * embeddings_rms(llm), rel=0.1)


def test_without_what_is_added_it_is_in_context_learning_cut_to_these_tokens(made):
    _, llm, distiller = made
    params = jax.tree.map(jnp.zeros_like, distiller.params)
    params["backbone"]["embed"] = distiller.params["backbone"]["embed"]
    cut = mend_jax.demonstrations_prefix(llm, CONTEXTS[0][-4:])
    found = dataclasses.replace(distiller, params=params).distill(CONTEXTS[0])
    np.testing.assert_allclose(found.embeds, cut.embeds, atol=1e-6)


def test_with_a_projection_it_begins_as_in_context_learning_cut_to_these_tokens(made):
    """The projection begins at zero and learns at once; what it reads is as large as embeddings."""
    c, llm, _ = made
    linear = c.copy_and_resolve_references()
    linear.prefix.projection = "linear"
    distiller = Distiller.init(linear, llm, 3).read_by(llm)
    found = distiller.distill(CONTEXTS).embeds
    np.testing.assert_array_equal(found[0], embedded(llm, CONTEXTS[0][-4:]))
    np.testing.assert_array_equal(found[1, 2:], embedded(llm, CONTEXTS[1]))
    assert not np.any(found[1, :2])
    states = {
        **distiller.params,
        "projection": {"kernel": jnp.eye(llm.config.width), "bias": jnp.zeros(llm.config.width)},
    }
    read = dataclasses.replace(distiller, params=states, residual=False).distill(np.arange(24).tolist()).embeds
    assert rms(read) == pytest.approx(embeddings_rms(llm), rel=0.1)

    def loss(params):
        tokens, length = distiller.read(CONTEXTS)
        return jnp.sum(distiller.apply(params, tokens, length).embeds ** 2)

    assert jnp.abs(jax.grad(loss)(distiller.params)["projection"]["kernel"]).max() > 0


def test_a_shorter_prefix_has_the_last_tokens_too(made):
    _, _, distiller = made
    nested = dataclasses.replace(distiller, nested=(2,))
    tokens, length = nested.read(CONTEXTS)
    drawn = nested.apply(nested.params, tokens, length, vectors=jnp.full((2,), 2, jnp.int32))
    np.testing.assert_allclose(drawn.embeds[:, :2], nested.first(2).distill(CONTEXTS).embeds, atol=1e-5)
    assert nested.shorter == ()  # the first two of four vectors are added to other tokens


def test_each_chunk_is_added_to_its_own_last_tokens(made):
    _, llm, distiller = made
    demos = [[5, 3, 9, 2, 8], [7, 1], [4, 4, 6, 2]]
    model, alone = (
        Chunked.around(dataclasses.replace(distiller, residual=residual), chunk_demos=1, chunk_tokens=8)
        for residual in (True, False)
    )
    added = (model.distill(demos).embeds - alone.distill(demos).embeds).reshape(3, 4, -1)
    wanted = jnp.stack([embedded(llm, demo[-4:]) for demo in ([5, 3, 9, 2, 8], [4, 4, 6, 2])])
    np.testing.assert_allclose(added[jnp.asarray([0, 2])], wanted, atol=1e-5)
    np.testing.assert_allclose(added[1, 2:], embedded(llm, [7, 1]), atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix.train_embeddings": True},
        {"prefix.projection": "tanh"},
        {"prefix.backbone": "other"},
        {"prefix.kind": "chunked", "prefix.train_embeddings": True},
    ],
)
def test_it_needs_the_llms_own_embeddings(fields, tmp_path):
    folder = model_folder(tmp_path / "llm", with_weights=False)
    if "prefix.backbone" in fields:
        fields = {"prefix.backbone": str(model_folder(tmp_path / "other", with_weights=False))}
    with says("prefix.residual", "prefix.backbone", "prefix.train_embeddings=False"):
        checks.check_config(config(folder, **RESIDUAL | fields))


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["auto", "linear"])
def test_it_is_trained_exported_and_read_again(projection, tmp_path, monkeypatch):
    from mend_jax.run import build
    from mend_jax.train import train

    monkeypatch.setattr(build, "make_batches", RandomBatches)
    folder = model_folder(tmp_path / "llm")
    llm = mend_jax.load_llm(folder)
    c = config(folder, **RESIDUAL, **{"train.steps": 2, "prefix.projection": projection})
    assert train(c, tmp_path / "run") == 0
    export(tmp_path / "run", tmp_path / "out")
    first = Distiller.init(c, llm, c.seed)
    found = [mend_jax.load_distiller(tmp_path / name, llm) for name in ("run", "out")]
    vectors = [one.distill(CONTEXTS).embeds for one in (first, *found)]
    np.testing.assert_array_equal(vectors[1], vectors[2])
    assert 1e-6 < jnp.abs(vectors[0] - vectors[1]).max() < 0.1  # trained, and still near the tokens' embeddings
    assert not (tmp_path / "out" / "release").exists()


@pytest.mark.parametrize(("tokens", "sizes"), [(8, [8] * 3), (0, [24])])
def test_a_chunk_may_hold_less_than_a_context(tokens, sizes):
    """prefix.chunk_tokens is a chunk's, data.max_demo_tokens a training context's."""
    c = config("x", **{"prefix.kind": "chunked", "prefix.chunk_tokens": tokens, "data.max_demo_tokens": 24})
    packing = Chunked.packing(c, 64)
    assert packing.columns == (tokens or 24)
    pieces = [np.full(8, i, np.int32) for i in range(3)]
    rows = packing.lay_out(pieces).reshape(-1, packing.columns)
    assert [int((row != EMPTY).sum()) for row in rows] == sizes


def test_in_context_learning_can_be_cut_to_as_many_tokens(tmp_path):
    """What such vectors have to be better than: evaluate.methods "NAME=last6:icl"."""
    folder = model_folder(tmp_path / "llm")
    c, llm = config(folder), mend_jax.load_llm(folder)
    c.evaluate.methods = ("icl", "a=last5:icl", "b=last3each:icl")
    whole, last, each = (method.model for method in evaluate.load_methods(c, llm, make_layout("pmap", c.mesh)))
    pairs = [
        (np.asarray([1, 2, 3]), np.asarray([4])),
        (np.asarray([5]), np.asarray([6])),
        (np.asarray([7]), np.asarray([8])),
    ]
    assert [model.lay_out(pairs, 40).tolist() for model in (whole, last, each)] == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [4, 5, 6, 7, 8],
        [2, 3, 4, 5, 6, 7, 8],
    ]
    facts = [evaluate.prediction_facts(c, evaluate.Method("m", model), "x") for model in (whole, last, each)]
    assert len({str(one) for one in facts}) == 3 and "last" not in facts[0]
    assert last.fit([4, 2, 2], [4, 2, 2], 5, 40) == 1 and each.fit([4, 2, 2], [4, 2, 2], 5, 40) == 3
    assert each.fit([4, 2, 2], [4, 2, 2], 5, 6) == 2  # of the LLM's window
    c.data.release_truncation, loaded = True, evaluate.Method("short", last)
    with says("short", "data.release_truncation"):
        checks.check_evaluation(c, llm, [loaded], [], None)
    c.evaluate.methods = ("a=last0:icl",)
    with says("0 tokens", "1 or more"):
        evaluate.load_methods(c, llm, make_layout("pmap", c.mesh))


@pytest.mark.parametrize("value", ['"false"', "[0]", "1"])
def test_an_export_that_does_not_say_which_is_refused(value, tmp_path):
    folder = model_folder(tmp_path / "llm")
    llm = mend_jax.load_llm(folder)
    out = tmp_path / "out"
    Distiller.init(config(folder, **RESIDUAL), llm, 0).write(out)
    settings = out / "distiller_config.json"
    text = settings.read_text()
    settings.write_text(text.replace('"residual": true', f'"residual": {value}'))
    assert settings.read_text() != text
    with says("distiller_config.json", "residual"):
        Distiller.from_folder(out)


@pytest.mark.parametrize(("there", "here"), [(False, True), (True, False)])
def test_an_export_begins_only_what_uses_it_the_same_way(there, here, tmp_path):
    from mend_jax.run import build

    folder = model_folder(tmp_path / "llm")
    llm, frozen = mend_jax.load_llm(folder), RESIDUAL | {"prefix.residual": there}
    Distiller.init(config(folder, **frozen), llm, 0).write(tmp_path / "out")
    fields = RESIDUAL | {"prefix.residual": here, "prefix.start_from": str(tmp_path / "out")}
    with says("prefix.start_from", f"residual={there}", f"this run's has {here}"):
        build.build(config(folder, **fields), llm)


def test_a_chunk_holds_every_cut_demonstration(tmp_path):
    fields = {"stage": "finetune", "prefix.kind": "chunked", "prefix.chunk_tokens": 16, "data.max_input_tokens": 16}
    c = config(model_folder(tmp_path / "llm", with_weights=False), **fields)
    with says("prefix.chunk_tokens", "data.max_input_tokens"):
        checks.check_config(c)
