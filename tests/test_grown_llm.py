"""An LLM that is given more layers (llm.with_layers), as stage "lm" grows one."""

import dataclasses

import jax
import numpy as np
import pytest
from facts import says
from tiny_training import model_folder

from mend_jax.llm.decoder_only import load_llm, with_layers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("grown") / "model")


def test_grown_llm_begins_where_the_small_one_ended(model):
    llm = load_llm(model)
    grown = with_layers(llm, 4, seed=0)
    assert grown.config.layers == 4 and llm.config.layers == 2
    embeds = llm.embed(llm.params, np.arange(24).reshape(2, 12))
    states = [one.model.apply({"params": one.params}, embeds) for one in (llm, grown)]
    np.testing.assert_array_equal(*states)
    new = grown.params["layers"]["up"]["kernel"][2:]
    assert np.std(new) == pytest.approx(0.02, rel=0.1)  # it can learn
    cut = with_layers(grown, 2, seed=0)
    jax.tree.map(np.testing.assert_array_equal, cut.params, llm.params)


def test_norms_that_come_last_cannot_grow(model):
    llm = load_llm(model)
    llm = dataclasses.replace(llm, config=dataclasses.replace(llm.config, norm_first=False))
    with says("llm.layers is 3", model, "2 layers", "norms"):
        with_layers(llm, 3, seed=0)
