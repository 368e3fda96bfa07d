"""What heads attend to: the weights of the fast attention, and induction heads where there are some."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mend_jax.experiments.attention import best_heads, pool, seen_by
from mend_jax.llm import heads
from mend_jax.llm.decoder_only import LLM
from mend_jax.models.attention import causal_attention
from mend_jax.models.attention_weights import attention_weights, queries_and_keys, spans
from mend_jax.models.config import DecoderConfig
from mend_jax.models.decoder import init_params
from mend_jax.models.rope import Rope
from mend_jax.prefixes.prefix import Prefix

VOCABULARY, POSITIONS = 12, 24
WIDTH = 2 * VOCABULARY + POSITIONS  # a part for the token, one for the token before, one for the position


@pytest.fixture(scope="module")
def untrained():
    sizes = {
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "layers": 2,
        "heads": 1,
        "mlp_width": 8,
        "max_positions": POSITIONS,
    }
    config = DecoderConfig("gpt2", **sizes)
    return LLM(config, init_params(config, 5), None, "", "float32")


@pytest.fixture(scope="module")
def induction(untrained):
    """An LLM whose weights are set by hand: it has a head that finds the token before, and one that finds the same token."""
    params = jax.tree.map(lambda leaf: np.zeros_like(leaf), untrained.params)
    token, before, place = np.split(np.eye(WIDTH), [VOCABULARY, 2 * VOCABULARY])
    params["embed"] = {"tokens": token, "positions": place}
    for norm in (params["final_norm"], params["layers"]["norm1"], params["layers"]["norm2"]):
        norm["scale"] += 1
    query, key, value = np.split(params["layers"]["qkv"]["kernel"], 3, axis=-1)  # views: (layers, WIDTH, WIDTH) each
    query[0], key[0] = 20 * place[1:].T @ place[:-1], 20 * place.T @ place  # position t asks for t - 1
    value[0] = token.T @ token
    params["layers"]["out"]["kernel"][0] = token.T @ before  # what is found there is kept as the token before
    query[1], key[1] = 20 * token.T @ token, 20 * before.T @ token
    params["layers"]["qkv"]["kernel"] = np.concatenate([query, key, value], -1)
    return dataclasses.replace(untrained, params=jax.tree.map(jnp.float32, params))


def test_weights_are_those_of_the_fast_attention():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, 9, count, 4)), jnp.float32) for count in (6, 2, 2))
    for span in (0, 3):
        shares = attention_weights(q, k, jnp.arange(9), span or 99)
        assert np.allclose(shares.sum(-1), 1, atol=1e-6) and shares.shape == (2, 6, 9, 9)
        assert np.all(np.triu(shares, 1) == 0)
        out = jnp.einsum("bhts,bshf->bthf", shares, jnp.repeat(v, 3, axis=2))
        assert np.allclose(out, causal_attention(q, k, v, span), atol=1e-5)


@pytest.mark.slow
def test_the_states_are_those_of_the_usual_path():
    """Of a decoder with rotary positions, shared keys and sliding layers."""
    sizes = {
        "vocab_size": 30,
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "mlp_width": 24,
        "max_positions": 40,
    }
    config = DecoderConfig("llama", **sizes, rope=Rope(1e4), fused_qkv=False, sliding=(True, False), attention_span=3)
    llm = LLM(config, init_params(config, 0), None, "", "float32")
    embeds = jax.random.normal(jax.random.key(1), (2, 12, 16))
    usual = llm.model.apply({"params": llm.params}, embeds)
    queries, keys, states = queries_and_keys(llm.model, llm.params, embeds)
    assert np.array_equal(states, usual)
    assert queries.shape == (2, 2, 12, 4, 4) and keys.shape == (2, 2, 12, 2, 4)
    shares = attention_weights(queries[0], keys[0], jnp.arange(12), spans(config)[0])
    assert np.all(np.asarray(shares)[:, :, 11, :9] == 0)  # it slides: the last three alone


def test_heads_of_an_untrained_llm_attend_by_chance(untrained):
    sequences = heads.random_sequences(untrained, 3, 500, seed=0)
    n = sequences.shape[1]
    assert 2 * n == untrained.window
    found = np.mean(
        [heads.prefix_matching(untrained, untrained.params, jnp.asarray(tokens)) for tokens in sequences], 0
    )
    assert found.shape == (2, 1)
    assert np.all((found > 0.5 * heads.by_chance(n)) & (found < 2 * heads.by_chance(n)))


def test_an_induction_head_made_by_hand_is_found(induction):
    """The first layer's head attends to the token before, the second's to what followed this token before."""
    sequences = heads.random_sequences(induction, 1, 500, seed=1)
    tokens = jnp.asarray(np.random.default_rng(0).permutation(VOCABULARY)[: sequences.shape[1]])  # no token twice
    scores = np.asarray(heads.prefix_matching(induction, induction.params, tokens))
    assert scores[1, 0] > 0.95 and scores[0, 0] < 0.01
    assert best_heads(scores, 1) == [(1, 0)]


def test_attention_before_an_answer(untrained):
    x, length = np.array([5, 6, 7]), 4
    embeds = untrained.embed(untrained.params, jnp.asarray([[8, 9, 10, 11, 0, 0]]))
    prefix = Prefix(embeds, jnp.asarray([length], jnp.int32))  # two columns are padding
    best = [(0, 0), (1, 0)]
    found = seen_by(untrained, prefix, x, 8, best)
    for one in found:
        assert len(one["prefix"]) == length and len(one["input"]) == len(x)
        assert sum(one["prefix"]) + sum(one["input"]) == pytest.approx(1, abs=1e-3)
        assert one["share"] == pytest.approx(sum(one["prefix"]), abs=1e-3)
    tight = Prefix(embeds[:, :length], prefix.length)
    assert seen_by(untrained, tight, x, 3, best) == found  # padding changes nothing


def test_pooling_keeps_the_largest():
    assert pool(np.arange(100.0)).tolist() == [4.0 + 5 * i for i in range(20)]
    assert pool(np.array([0.2, 0.1])).tolist() == [0.2, 0.1]
