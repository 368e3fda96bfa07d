"""A distiller's last layer computes what its placeholders need and no more: the same vectors and gradients, fewer products."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mend_jax.models.config import DecoderConfig
from mend_jax.models.decoder import Decoder, init_params
from mend_jax.models.rope import Rope
from mend_jax.prefixes.prefix import Prefix, continue_after, vectors_after
from mend_jax.scoring import costs

SIZES = {"vocab_size": 30, "width": 16, "layers": 2, "heads": 4, "mlp_width": 24, "max_positions": 40}
LLAMA = {"kv_heads": 2, "rope": Rope(1e4), "fused_qkv": False, "gated": True, "attention_span": 5}
FAMILIES = {
    "gpt2": SIZES,
    "one layer": SIZES | {"layers": 1},
    "opt-350m": SIZES | {"hidden_width": 8, "head_width": 2, "norm_first": False, "final_norm": False},
    "a last layer that slides": SIZES | LLAMA | {"sliding": (False, True)},
    "one that does not": SIZES | LLAMA | {"sliding": (True, False)},
}
L = 4


@pytest.fixture(params=FAMILIES)
def read(request):
    """(model, its parameters, contexts of which padding goes beyond the window, placeholders)."""
    config, random = DecoderConfig("tiny", **FAMILIES[request.param]), np.random.default_rng(0)
    embeds, own = (jnp.asarray(random.normal(size=(3, n, 16)), jnp.float32) for n in (38, L))
    return Decoder(config), init_params(config, 0), Prefix(embeds, jnp.asarray([7, 36, 1], jnp.int32)), own


def test_vectors_are_those_of_whole_layers(read):
    model, *arguments = read
    found, whole = (jax.jit(partial(f, model))(*arguments) for f in (vectors_after, continue_after))
    np.testing.assert_allclose(found, whole, atol=1e-6 * max(1, np.abs(whole).max()))


def test_gradients_are_those_of_whole_layers(read):
    model, params, prefix, own = read

    def loss(read, params, embeds, own):
        return (read(model, params, Prefix(embeds, prefix.length), own) ** 2).sum()

    found, whole = (
        jax.jit(jax.grad(partial(loss, f), (0, 1, 2)))(params, prefix.embeds, own)
        for f in (vectors_after, continue_after)
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), found, whole)


def test_the_formula_counts_what_is_computed(read):
    """Of so few tokens attention leaves out nothing that a sliding window hides."""
    model, params, prefix, own = read
    config = dataclasses.replace(model.config, sliding=())
    demos = min(prefix.embeds.shape[1], config.window - L)
    left_out = costs.not_wanted(config, demos, demos * (demos + L))
    wanted = costs.reading(config, demos + L).forward - left_out
    assert left_out > 0
    row = Prefix(prefix.embeds[:1, :demos], prefix.length[:1])
    assert costs.count_products(partial(vectors_after, model), params, row, own[:1]) == wanted
