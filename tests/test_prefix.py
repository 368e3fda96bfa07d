"""Prefixes: nothing is compiled twice, padding changes nothing, texts stand behind the separator, first values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import says

from configs import base
from mend_jax import step
from mend_jax.data.query import Query
from mend_jax.data.templates import SEPARATORS, SPACE
from mend_jax.llm.decoder_only import LLM
from mend_jax.models.decoder import init_params
from mend_jax.models.families import DecoderConfig
from mend_jax.models.folders import save_model
from mend_jax.prefixes import distiller as prefixes
from mend_jax.prefixes.demonstrations import demonstrations_prefix
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.soft_prompt import SoftPrompt

BACKBONE = DecoderConfig("gpt2", vocab_size=61, width=16, layers=2, heads=2, mlp_width=32, max_positions=72)
WIDER = DecoderConfig("gpt2", vocab_size=61, width=24, layers=1, heads=2, mlp_width=48, max_positions=96)


class Letters:
    """A tokenizer of single letters: a space is 0, a line break 11."""

    def __call__(self, texts, add_special_tokens=False):
        rows = [[" abcdefghij\n".index(letter) for letter in text] for text in texts]
        return {"input_ids": rows}


LETTERS = Letters()  # one for both models, as where one tokenizer serves both


@pytest.fixture(scope="module")
def llm():
    return LLM(WIDER, jax.tree.map(lambda a: a * 4, init_params(WIDER, 0)), LETTERS, "a tiny LLM", "float32")


@pytest.fixture(scope="module")
def backbone():
    return jax.tree.map(lambda a: a * 4, init_params(BACKBONE, 1))


def make_distiller(backbone, seed=0, template=SPACE):
    keys = jax.random.split(jax.random.key(seed))
    params = {
        "backbone": backbone,
        "placeholders": jax.random.normal(keys[0], (5, BACKBONE.width)),
        "projection": {
            "kernel": jax.random.normal(keys[1], (BACKBONE.width, WIDER.width)),
            "bias": jnp.zeros(WIDER.width),
        },
    }
    return Distiller(BACKBONE, params, "tanh", WIDER.width, LETTERS, template=template)


def context(length, seed=0):
    return np.random.default_rng(seed).integers(0, 61, length).tolist()


@pytest.mark.slow
def test_distilling_again_compiles_nothing(backbone):
    one, other = make_distiller(backbone), make_distiller(backbone, seed=1)
    one.distill(context(17))
    compiled = prefixes._distill._cache_size()
    first = one.distill(context(18))
    second = other.distill(context(24))  # another distiller of the same settings
    assert prefixes._distill._cache_size() == compiled
    assert np.abs(first.embeds - second.embeds).max() > 0.1
    for length in range(1, one.window + 1):
        one.read(context(length))
    assert {one.read(context(length))[0].shape[1] for length in range(1, 68)} == {16, 24, 32, 48, 64, 67}


@pytest.mark.parametrize("length", [3, 17, 67])
@pytest.mark.slow
def test_padding_changes_no_vector(backbone, length):
    distiller, demos = make_distiller(backbone), context(length)
    plain = distiller.apply(distiller.params, jnp.asarray([demos]), jnp.asarray([length]))
    np.testing.assert_allclose(distiller.distill(demos).embeds, plain.embeds, atol=1e-5)


@pytest.mark.slow
def test_training_losses_again_compile_nothing_and_padding_changes_nothing(backbone, llm):
    distiller = make_distiller(backbone)
    demos, x, y = context(18), [4, 5, 6], [7, 8]
    losses = step.training_losses(llm, distiller, demos, x, y)
    compiled = step._example_losses._cache_size()
    step.training_losses(llm, make_distiller(backbone, seed=1), context(20), [4], [5, 6, 7])
    assert step._example_losses._cache_size() == compiled

    tokens, length = jnp.asarray([demos]), jnp.asarray([len(demos)])
    query = Query(jnp.asarray([x + y]), jnp.asarray([5]), jnp.asarray([3]))
    shown = demonstrations_prefix(llm, demos)
    student = llm.states(llm.params, distiller.apply(distiller.params, tokens, length), query)
    teacher, weights = llm.states(llm.params, shown, query), step.Weights(1.0, 1.0, 1.0)
    plain = step.query_losses(student, teacher, llm.head(llm.params), query, weights, chunk=512)[1]
    assert losses == pytest.approx({name: float(value) for name, value in plain.items()}, abs=1e-5)


@pytest.mark.parametrize("separator, before", [(" ", 0), ("\n", 11)])
def test_texts_stand_behind_the_separator(backbone, llm, separator, before):
    pairs, ids = [("ab", "c"), ("d ", "e")], [before, 1, 2, before, 3, before, 4, 0, before, 5]
    shown = demonstrations_prefix(llm, pairs, separator)
    np.testing.assert_array_equal(shown.embeds, demonstrations_prefix(llm, ids).embeds)
    distiller = make_distiller(backbone, template=SEPARATORS[separator])
    np.testing.assert_array_equal(distiller.distill(pairs).embeds, distiller.distill(ids).embeds)
    of_texts, of_ids = (step.training_losses(llm, distiller, demos, [6, 7], [8]) for demos in (pairs, ids))
    assert of_texts == of_ids


# First values


@pytest.fixture(scope="module")
def folder(tmp_path_factory, backbone):
    path = tmp_path_factory.mktemp("backbone")
    save_model(path, BACKBONE, backbone, path)
    return path


@pytest.fixture
def config(folder):
    c = base.get_config()
    c.prefix.backbone, c.prefix.length = str(folder), 40
    return c


def in_table(rows, table):
    return [bool((np.asarray(table) == row).all(1).any()) for row in np.asarray(rows)]


def test_placeholders_are_rows_of_the_vocabulary_or_normal(config, llm, backbone):
    tables = {"distiller": backbone["embed"]["tokens"], "soft_prompt": llm.params["embed"]["tokens"]}

    def rows(seed=0):
        return {
            "distiller": Distiller.init(config, llm, seed).params["placeholders"],
            "soft_prompt": SoftPrompt.init(config, llm, seed).params["vectors"],
        }

    for name, values in rows().items():
        assert all(in_table(values, tables[name]))
    config.prefix.placeholder_init = "normal"
    again, other = rows(), rows(seed=1)
    for name, values in rows().items():
        assert values.shape == (40, tables[name].shape[1])
        assert 0.018 < np.std(values) < 0.022 and abs(np.mean(values)) < 0.003
        assert not any(in_table(values, tables[name]))
        assert np.array_equal(values, again[name]) and not np.array_equal(values, other[name])


def test_a_random_projection_has_the_releases_size(config, llm):
    config.prefix.rms = 0.0
    projection = Distiller.init(config, llm, 0).params["projection"]
    assert projection["kernel"].shape == (16, 24) and not projection["bias"].any()
    assert 0.017 < np.std(projection["kernel"]) < 0.023 and abs(np.mean(projection["kernel"])) < 0.004


def test_an_identity_needs_a_backbone_as_wide_as_the_llm(config, llm):
    config.prefix.projection = "identity"
    with says('prefix.projection="identity"', "backbone", 16, "LLM", 24, '"tanh"', '"linear"'):
        Distiller.init(config, llm, 0)
