"""What heads attend to: the weights of the fast attention, and induction heads where there are some."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import says

import mend_jax
from mend_jax.experiments.attention import best_heads, pool, seen_by
from mend_jax.llm import heads
from mend_jax.llm.decoder_only import LLM, load_llm
from mend_jax.models.attention import causal_attention
from mend_jax.models.attention_weights import attention_weights, queries_and_keys, spans
from mend_jax.models.config import DecoderConfig
from mend_jax.models.decoder import init_params
from mend_jax.models.rope import Rope
from mend_jax.prefixes.prefix import Prefix

SMALL_WORLD = Path(mend_jax.__file__).parent / "small_world" / "llm"


@pytest.fixture(scope="module")
def small_world():
    return load_llm(SMALL_WORLD)


@pytest.fixture(scope="module")
def untrained(small_world):
    return dataclasses.replace(small_world, params=init_params(small_world.config, 5))


def test_weights_are_those_of_the_fast_attention():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, 9, count, 4)), jnp.float32) for count in (6, 2, 2))
    for span in (0, 3):
        shares = attention_weights(q, k, jnp.arange(9), span or 99)
        assert np.allclose(shares.sum(-1), 1, atol=1e-6) and shares.shape == (2, 6, 9, 9)
        assert np.all(np.triu(shares, 1) == 0)
        out = jnp.einsum("bhts,bshf->bthf", shares, jnp.repeat(v, 3, axis=2))
        assert np.allclose(out, causal_attention(q, k, v, span), atol=1e-5)


def test_the_states_are_those_of_the_usual_path():
    """Of a decoder with rotary positions, shared keys and sliding layers."""
    sizes = {"vocab_size": 30, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24, "max_positions": 40}
    config = DecoderConfig("llama", **sizes, rope=Rope(1e4), fused_qkv=False, sliding=(True, False), attention_span=3)
    llm = LLM(config, init_params(config, 0), None, "", "float32")
    embeds = jax.random.normal(jax.random.key(1), (2, 12, 16))
    usual = llm.model.apply({"params": llm.params}, embeds)
    queries, keys, states = queries_and_keys(llm.model, llm.params, embeds)
    assert np.array_equal(states, usual)
    assert queries.shape == (2, 2, 12, 4, 4) and keys.shape == (2, 2, 12, 2, 4)
    shares = attention_weights(queries[0], keys[0], jnp.arange(12), spans(config)[0])
    assert np.all(np.asarray(shares)[:, :, 11, :9] == 0)  # it slides: the last three alone


def test_a_trained_llm_has_induction_heads_and_an_untrained_one_has_none(small_world, untrained):
    found = {}
    for name, llm in {"trained": small_world, "untrained": untrained}.items():
        sequences = heads.random_sequences(llm, 3, 500, seed=0)
        scores = np.mean([heads.prefix_matching(llm, llm.params, jnp.asarray(tokens)) for tokens in sequences], 0)
        assert scores.shape == (llm.config.layers, llm.config.heads)
        found[name] = scores
    n, chance = sequences.shape[1], heads.by_chance(sequences.shape[1])
    assert 2 * n <= small_world.window < 2 * (n + 1)
    assert 0.5 * chance < found["untrained"].min() and found["untrained"].max() < 2.5 * chance
    assert found["trained"].max() > 10 * chance
    assert found["trained"][best_heads(found["trained"])[0]] == found["trained"].max()


def test_an_induction_head_made_by_hand():
    """Its keys say which token stood before, its queries which token this is: it attends where the two are the same."""
    n, width = 6, 8
    tokens = np.random.default_rng(0).permutation(width)[:n]
    now = np.eye(width)[np.concatenate([tokens, tokens])]
    before = np.roll(now, 1, axis=0) * (np.arange(2 * n) > 0)[:, None]
    q, k = (jnp.asarray(50 * a[None, :, None], jnp.float32) for a in (now, before))
    at = n + jnp.arange(n)
    shares = attention_weights(q[:, at], k, at, 99)[0, 0]
    there = np.asarray(shares[jnp.arange(n), at - n + 1])
    assert np.all(there[:-1] > 0.99)
    assert there[-1] > 0.99  # the last token's follower is the first of the second reading


def test_attention_before_an_answer(small_world):
    x, length = np.array([5, 6, 7]), 4
    embeds = small_world.embed(small_world.params, jnp.asarray([[8, 9, 10, 11, 0, 0]]))
    prefix = Prefix(embeds, jnp.asarray([length], jnp.int32))  # two columns are padding
    best = [(0, 0), (1, 2)]
    found = seen_by(small_world, prefix, x, 8, best)
    for one in found:
        assert len(one["prefix"]) == length and len(one["input"]) == len(x)
        assert sum(one["prefix"]) + sum(one["input"]) == pytest.approx(1, abs=1e-3)
        assert one["share"] == pytest.approx(sum(one["prefix"]), abs=1e-3)
    tight = Prefix(embeds[:, :length], prefix.length)
    assert seen_by(small_world, tight, x, 3, best) == found  # padding changes nothing


def test_pooling_keeps_the_largest():
    assert pool(np.arange(100.0)).tolist() == [4.0 + 5 * i for i in range(20)]
    assert pool(np.array([0.2, 0.1])).tolist() == [0.2, 0.1]


def test_an_encoder_decoder_is_refused():
    class Other:
        path = "t5"

    with says("decoder-only", "t5", "llm.path"):
        heads.require_decoder(Other())
