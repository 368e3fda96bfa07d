"""Every decoder-only family against PyTorch: what it computes, and what that costs.

Axes: B batch, P prefix, Q query tokens, D width, V vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_rows import COMMON, ROWS, make_row, tokens

from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes.demonstrations import demonstrations_prefix
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.prefix import Prefix
from mend_jax.scoring import costs
from mend_jax.scoring.options import score_options

pytestmark = pytest.mark.slow


# One for each way to know positions (learnt, with an offset, RoPE with scaled frequencies, windows in all or some layers)
# and each kind of norm and projection: the others go through the same code with other numbers.
DISTINCT = ("gpt2", "opt-350m", "llama-3", "qwen2-sliding", "gemma3")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return functools.cache(lambda name: make_row(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=ROWS)
def row(request, rows):
    return rows(request.param)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradient(llm, embeds, length, query, direction):
    """Logits (B,Q,V) after the prefixes, and the gradient (B,P,D) of their products with `direction`."""

    def value(embeds):
        logits = llm.logits(llm.params, llm.states(llm.params, Prefix(embeds, length), query))
        return (logits * direction).sum(), logits

    gradient, logits = jax.grad(value, has_aux=True)(embeds)
    return logits, gradient


def test_a_padded_batch_of_prefixes_gives_what_pytorch_gives_one_by_one(row):
    """Logits, and the gradient with respect to the prefix; the first row's prefix is embedded demonstrations."""
    torch = pytest.importorskip("torch")
    llm, B, P, Q, D = row.llm, 3, 24, 16, row.llm.config.width
    prefix_lengths, lengths = np.array([24, 9, 0]), np.array([10, 16, 5])
    ids, demos = tokens(B, Q), tokens(1, P)
    embeds = np.random.randn(B, P, D).astype(np.float32)
    embeds[0] = llm.embed(llm.params, demos[0])
    direction = np.random.randn(B, Q, COMMON["vocab_size"]).astype(np.float32)
    direction *= (np.arange(Q) < lengths[:, None])[..., None]
    query = Query(ids, lengths, np.zeros(B, np.int32))
    logits, gradient = logits_and_gradient(llm, embeds, prefix_lengths, query, direction)
    for i, (before, length) in enumerate(zip(prefix_lengths, lengths, strict=True)):
        theirs = torch.from_numpy(embeds[i : i + 1, :before]).requires_grad_()
        read = row.torch.get_input_embeddings()(torch.from_numpy(ids[i : i + 1, :length]).long())
        expected = row.torch(inputs_embeds=torch.cat([theirs, read], 1)).logits[:, before:]
        assert np.abs(logits[i, :length] - expected[0].detach().numpy()).max() < 1e-4
        if before:
            (expected * torch.from_numpy(direction[i : i + 1, :length])).sum().backward()
            wanted = theirs.grad[0].numpy()
            assert np.abs(gradient[i, :before] - wanted).max() < 1e-3 * np.abs(wanted).max()
        assert not np.any(gradient[i, before:])
    with torch.no_grad():  # the embedded demonstrations are the demonstrations
        whole = row.torch(torch.from_numpy(np.concatenate([demos, ids[:1, : lengths[0]]], 1)).long()).logits
    assert np.abs(logits[0, : lengths[0]] - whole[0, P:].numpy()).max() < 1e-4


@pytest.mark.parametrize("row", DISTINCT, indirect=True)
def test_scores_after_a_shared_cache_are_those_of_rereading_everything(row):
    torch = pytest.importorskip("torch")
    demos, x, options = tokens(20).tolist(), [5, 6, 7], [[8, 9, 10], [11], [12, 13]]
    prefixes = {"nothing": (no_prefix(1, row.llm.config.width), []), "demonstrations": (None, demos)}
    for prefix, before in prefixes.values():
        prefix = demonstrations_prefix(row.llm, before) if prefix is None else prefix
        expected = []
        for option in options:
            ids = torch.tensor([before + x + option])
            with torch.no_grad():
                log_probs = torch.log_softmax(row.torch(ids).logits[0, :-1].double(), -1)
            picked = log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            expected.append(picked[-len(option) :].mean().item())
        np.testing.assert_allclose(score_options(row.llm, prefix, x, options), expected, atol=1e-4)


def test_costs_are_what_is_computed_and_kept(row):
    """What a sliding window leaves out is left out of whole blocks alone (tests/test_attention.py), and these are one."""
    llm, tokens_read, positions = row.llm, 20, 12
    computed = dataclasses.replace(llm.config, sliding=())
    embeds, params = jax.ShapeDtypeStruct((1, tokens_read, llm.config.width), jnp.float32), llm.params
    read = costs.count_products(lambda e: llm.model.apply({"params": params}, e), embeds)
    assert read == costs.reading(computed, tokens_read).forward
    assert (read > costs.reading(llm.config, tokens_read).forward) == bool(llm.config.sliding)
    states = jax.ShapeDtypeStruct((1, tokens_read, llm.config.width), jnp.float32)
    assert costs.count_products(functools.partial(llm.logits, params), states) == costs.head(llm.config, tokens_read)
    prefix = Prefix(jnp.zeros((1, positions, llm.config.width)), jnp.array([positions]))
    cache = jax.eval_shape(llm.prefix_cache, params, prefix)
    kept = sum(math.prod(a.shape) * a.dtype.itemsize for a in (cache.keys, cache.values))
    assert kept == costs.cache_bytes(llm.config, positions, 4)
    assert costs.vector_bytes(llm.config, positions, 4) == prefix.embeds.nbytes
    ids, at = jnp.zeros((1, 8), jnp.int32), jnp.arange(8)[None]
    after = costs.count_products(lambda c: llm.cached_states(params, c, ids, at, ids), cache)
    assert after == costs.reading(computed, 8, positions + 8).forward


@pytest.mark.parametrize("row", DISTINCT, indirect=True)
def test_bfloat16_is_close(row):
    half = load_llm(row.folder, dtype="bfloat16")
    ids = tokens(1, 16)
    query = Query(ids, np.array([16]), np.zeros(1, np.int32))
    run = lambda llm: llm.logits(llm.params, llm.states(llm.params, no_prefix(1, llm.config.width), query))  # noqa: E731
    exact, near = run(row.llm), run(half)
    assert near.dtype == jnp.float32 and jnp.linalg.norm(near - exact) < 0.1 * jnp.linalg.norm(exact)
