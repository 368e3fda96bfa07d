"""Attention in blocks against plain softmax attention, and what a layer keeps for its backward pass."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mend_jax.models.attention import (
    BLOCK,
    Reach,
    attention_after,
    causal_attention,
    fused_attention_after,
    fused_causal_attention,
)
from mend_jax.models.decoder import Decoder
from mend_jax.models.families import DecoderConfig


def plain(q, k, v, span=0):
    length = q.shape[1]
    scores = jnp.einsum("bthf,bshf->bhts", q, k) / math.sqrt(q.shape[-1])
    seen = jnp.tril(jnp.ones((length, length), bool))
    if span:
        seen &= ~jnp.tril(seen, -span)
    scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("bhts,bshf->bthf", jax.nn.softmax(scores), v)


def inputs(length, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 4)
    return [2 * jax.random.normal(key, (2, length, 3, 8)).astype(dtype) for key in keys]


@partial(jax.jit, static_argnums=0)  # operation by operation it takes ten times as long
def with_gradients(attention, q, k, v, out_grad):
    out, pull = jax.vjp(attention, q, k, v)
    return out, *pull(out_grad)


@pytest.mark.parametrize("length", [0, 1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 40])
@pytest.mark.slow
def test_values_and_gradients(length):
    arguments = inputs(length)
    for ours, theirs in zip(
        with_gradients(causal_attention, *arguments), with_gradients(plain, *arguments), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # of values up to 25


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [0, 5, 2 * BLOCK + 40])
@pytest.mark.slow
def test_heads_that_share_keys_and_values(length, groups):
    """As with every shared head repeated: the gradient of a shared one is the sum over those that read it."""
    keys = jax.random.split(jax.random.key(length), 4)
    q, k, v, out_grad = (
        jax.random.normal(key, (2, length, heads, 8)) for key, heads in zip(keys, (4, groups, groups, 4), strict=True)
    )

    def repeated(q, k, v):
        return plain(q, jnp.repeat(k, 4 // groups, axis=2), jnp.repeat(v, 4 // groups, axis=2))

    ours, theirs = (with_gradients(attention, q, k, v, out_grad) for attention in (causal_attention, repeated))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.slow
def test_reading_after_a_shared_prefix_is_reading_on(groups):
    P, T, cut = 7, 5, 3
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, T, heads, 8)) for key, heads in zip(keys, (4, groups, groups), strict=False))
    before = [jax.random.normal(key, (P, groups, 8)) for key in keys[3:]]
    within = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (2, T, T))
    got = attention_after(q, before, k, v, within, P - cut)
    whole = [
        jnp.concatenate([jnp.broadcast_to(a[: P - cut], (2, P - cut, groups, 8)), b], 1)
        for a, b in zip(before, (k, v), strict=True)
    ]
    whole = [jnp.repeat(a, 4 // groups, axis=2) for a in whole]
    padded = jnp.concatenate([jnp.zeros((2, P - cut, 4, 8)), q], 1)
    np.testing.assert_allclose(got, plain(padded, *whole)[:, P - cut :], atol=1e-5)


@pytest.mark.parametrize("span", [3, BLOCK + 5, 2 * BLOCK + 40])
@pytest.mark.slow
def test_a_sliding_window(span):
    """Where all layers slide, and where a flag says whether this one does."""
    keys, length = jax.random.split(jax.random.key(span), 4), 2 * BLOCK + 40
    q, k, v, out_grad = (
        jax.random.normal(key, (2, length, heads, 8)) for key, heads in zip(keys, (2, 1, 1, 2), strict=True)
    )

    def repeated(q, k, v, span):
        return plain(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), span)

    wanted = {
        slides: with_gradients(partial(repeated, span=span * slides), q, k, v, out_grad) for slides in (True, False)
    }
    for attention in (causal_attention, partial(fused_causal_attention, implementation="xla")):
        run = jax.jit(lambda flag, *a, f=attention: with_gradients(lambda q, k, v: f(q, k, v, span, flag), *a))
        for slides in (None, True, False):
            ours = run(slides, q, k, v, out_grad)
            for a, b in zip(ours, wanted[slides is not False], strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)


def test_what_a_window_leaves_out_is_not_computed():
    from mend_jax.scoring.costs import count_products

    length, span = 16 * BLOCK, BLOCK
    q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    all_pairs = 4 * length**2 * 8
    sliding = count_products(lambda *a: causal_attention(*a, span), q, q, q)
    assert sliding <= all_pairs * 2 * BLOCK / length  # a block reads itself and its window
    step = jax.make_jaxpr(lambda *a: with_gradients(lambda q, k, v: causal_attention(q, k, v, span), *a))(q, q, q, q)
    assert max(_sizes(step.jaxpr)) <= BLOCK * length


def after_prefix(shared, T, P, B=3, groups=2):
    """((q, keys, values, k, v), within, length) of rows that hold two items each, behind a prefix with padding."""
    keys = iter(jax.random.split(jax.random.key(T + P), 5))
    own, before = (B, T, groups, 8), (P, groups, 8) if shared else (B, P, groups, 8)
    arrays = [2 * jax.random.normal(next(keys), shape) for shape in ((B, T, 4, 8), before, before, own, own)]
    item = jnp.arange(T) >= T // 3
    within = jnp.tril(jnp.ones((T, T), bool)) & (item[:, None] == item)
    length = jnp.asarray(P - 3) if shared else jnp.asarray([P, P - 3, 0])
    return arrays, jnp.broadcast_to(within, (B, T, T)), length


def dense_after(q, keys, values, k, v, within, length, reach=None):
    """One softmax over the prefix and the row, of one array of scores."""
    (B, T, _, F), P, R = q.shape, keys.shape[-3], q.shape[2] // k.shape[2]
    whole = lambda a, b: jnp.repeat(jnp.concatenate([jnp.broadcast_to(a, (B, *a.shape[-3:])), b], 1), R, 2)  # noqa: E731
    before = jnp.broadcast_to(jnp.arange(P) < jnp.reshape(length, (-1, 1, 1)), (B, T, P))
    scores = jnp.einsum("bthf,bshf->bhts", q, whole(keys, k)) / math.sqrt(F)
    seen = jnp.concatenate([before, within], -1)
    if reach is not None:
        places = jnp.concatenate([jnp.broadcast_to(jnp.arange(P), (B, P)), reach.at], 1)
        seen &= reach.at[:, :, None] - places[:, None] < reach.span
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshf->bthf", jax.nn.softmax(scores), whole(values, v))


@pytest.mark.parametrize("span", [None, 6])
@pytest.mark.parametrize("shared", [True, False], ids=["one prefix", "a prefix for each row"])
@pytest.mark.parametrize("T, P", [(9, 7), (BLOCK + 20, 40), (5, 2 * BLOCK + 30)])
@pytest.mark.slow
def test_values_and_gradients_after_a_prefix(shared, T, P, span):
    """With a window too, which the first tokens of an item look back through into the prefix, and the later ones do not."""
    arrays, within, length = after_prefix(shared, T, P)
    out_grad = jax.random.normal(jax.random.key(9), arrays[0].shape)
    place = jnp.where(jnp.arange(T) >= T // 3, jnp.arange(T) - T // 3, jnp.arange(T))  # in their item
    reach = (
        None
        if span is None
        else Reach(jnp.broadcast_to(jnp.reshape(length, (-1, 1)) + place, (3, T)), jnp.asarray(span))
    )

    def of(attention):
        @jax.jit
        def both(arrays, out_grad):
            out, pull = jax.vjp(lambda *a: attention(*a, within, length, reach), *arrays)
            return out, *pull(out_grad)

        return both(arrays, out_grad)

    wanted = of(dense_after)
    for after in (attention_after, lambda *a: fused_attention_after(*a, implementation="xla")):
        ours = of(lambda q, keys, values, k, v, *seen, after=after: after(q, (keys, values), k, v, *seen))
        for a, b in zip(ours, wanted, strict=True):
            assert np.all(np.isfinite(a))
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_no_array_of_all_scores_after_a_shared_prefix():
    (q, keys, values, k, v), within, length = after_prefix(True, 2 * BLOCK, 4 * BLOCK, B=4)
    program = jax.make_jaxpr(lambda *a: attention_after(a[0], a[1:3], *a[3:], within, length))(q, keys, values, k, v)
    assert max(_sizes(program.jaxpr)) < q[..., 0].size * 6 * BLOCK / 3


def test_large_scores_stay_finite():
    q, k, v, out_grad = inputs(BLOCK + 3)
    arguments = (100 * q, 100 * k, v, out_grad)
    for ours, theirs in zip(
        with_gradients(causal_attention, *arguments), with_gradients(plain, *arguments), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-2, rtol=1e-3)


def test_bfloat16_is_as_near_as_its_digits():
    arguments = inputs(BLOCK + 7, jnp.bfloat16)
    exact = with_gradients(plain, *(a.astype(jnp.float32) for a in arguments))
    for ours, theirs in zip(with_gradients(causal_attention, *arguments), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs)
        assert error < 0.01


def test_no_square_array_and_half_the_products():
    length = 6 * BLOCK
    q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    step = jax.make_jaxpr(lambda *a: with_gradients(causal_attention, *a))(q, q, q, q)
    assert max(_sizes(step.jaxpr)) <= BLOCK * length
    from mend_jax.scoring.costs import count_products

    masked, full = (count_products(f, q, q, q) for f in (causal_attention, plain))
    assert masked / full == pytest.approx((1 + 1 / 6) / 2)


def test_a_layer_keeps_its_products_alone():
    width, length = 16, 40
    config = DecoderConfig("gpt2", 50, width, 3, 2, 4 * width, 64)
    x = jnp.ones((1, length, width))
    params = jax.jit(Decoder(config).init)(jax.random.key(0), x)["params"]

    def kept(remat):
        def loss(params):
            return (Decoder(config, remat=remat).apply({"params": params}, x) ** 2).sum()

        forward = next(e for e in jax.make_jaxpr(jax.grad(loss))(params).eqns if e.primitive.name == "scan")
        return sum(math.prod(v.aval.shape) for v in forward.outvars[forward.params["num_carry"] :])

    inputs_alone = config.layers * length * width
    # x, queries with keys and values, attention's output and normalisers, the middle, and the MLP before its GELU
    assert kept(remat=False) == inputs_alone * (1 + 3 + 1 + 1 + 4) + config.layers * length * config.heads
    assert kept(remat=True) == inputs_alone


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in equation.outvars)
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from _sizes(value.jaxpr)
