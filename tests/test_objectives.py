"""Each objective against its definition with all logits at once: values, gradients, and that nothing large is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mend_jax.data.query import Query
from mend_jax.losses import FORWARD_KL, Weights, head_loss, state_loss
from mend_jax.models import int8
from mend_jax.objectives import OBJECTIVES, STATE_OBJECTIVES, Numbers, Objective
from mend_jax.step import query_losses

B, Q, D, V = 3, 11, 16, 57
NUMBERS = Numbers(temperature=1.7, mix=0.3, top_k=9)


def kl(p, q):
    return (p * (jnp.log(p) - jnp.log(q))).sum(-1)


def dense(name, student, teacher, n):
    """The definitions, by probabilities (B,Q,V)."""
    p, q = (jax.nn.softmax(logits / n.temperature, -1) for logits in (student, teacher))
    if name == "forward_kl":
        return kl(q, p)
    if name == "reverse_kl":
        return kl(p, q)
    if name == "mixed_kl":
        return (1 - n.mix) * kl(q, p) + n.mix * kl(p, q)
    m = n.mix * q + (1 - n.mix) * p
    if name == "jensen_shannon":
        return n.mix * kl(q, m) + (1 - n.mix) * kl(p, m)
    if name == "skewed_kl":
        return kl(q, m)
    kept = jnp.argsort(-q, -1)[..., : n.top_k]
    p, q = (jnp.take_along_axis(a, kept, -1) for a in (p, q))
    return kl(q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True))


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    states, teacher, head = (
        jnp.asarray(random.standard_normal(s), jnp.float32) for s in ((B, Q, D), (B, Q, D), (V, D))
    )
    kd, ce = random.random((2, B, Q))
    kd[0, :4], ce[0, 2:7], kd[1], ce[2, 3:], kd[2, 5:] = 0, 0, 0, 0, 0  # both losses, one alone, neither
    targets = jnp.asarray(random.integers(0, V, (B, Q)))
    return states, teacher, head, targets, jnp.asarray(kd, jnp.float32), jnp.asarray(ce, jnp.float32)


@pytest.mark.parametrize("chunk", [4, 8, 1000])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_are_those_of_the_definition(arrays, name, chunk):
    states, teacher, head, targets, kd_weight, ce_weight = arrays

    def plain(states):
        student = jnp.einsum("bqd,vd->bqv", states, head)
        ce = -jnp.take_along_axis(jax.nn.log_softmax(student), targets[..., None], -1)[..., 0]
        kd = dense(name, student, jnp.einsum("bqd,vd->bqv", teacher, head), NUMBERS)
        return (kd_weight * kd + ce_weight * ce).sum(), kd

    def ours(states):
        objective = Objective(name, NUMBERS)
        loss, (kd, _) = head_loss(states, teacher, head, targets, kd_weight, ce_weight, chunk, objective=objective)
        return loss, kd

    (wanted, wanted_kd), wanted_grad = jax.value_and_grad(plain, has_aux=True)(states)
    (found, found_kd), found_grad = jax.value_and_grad(ours, has_aux=True)(states)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    counted = np.asarray(kd_weight + ce_weight) > 0
    np.testing.assert_allclose(found_kd, np.where(counted, wanted_kd, 0), atol=1e-5)
    np.testing.assert_allclose(found_grad, wanted_grad, atol=1e-5)


def test_the_gradient_by_hand_is_that_of_jax(arrays):
    def loss(states, objective):
        return head_loss(states, *arrays[1:], 8, objective=objective)[0]

    by_jax = FORWARD_KL._replace(by_jax=True)
    for ours, theirs in zip(*(jax.value_and_grad(loss)(arrays[0], o) for o in (FORWARD_KL, by_jax)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_forward_kl_has_its_gradient_by_hand_whatever_numbers_it_does_not_read(arrays):
    def program(objective):
        return str(jax.make_jaxpr(jax.grad(lambda s: head_loss(s, *arrays[1:], 8, objective=objective)[0]))(arrays[0]))

    by_hand = program(FORWARD_KL)
    assert program(FORWARD_KL._replace(numbers=Numbers(mix=0.3, top_k=9))) == by_hand
    for other in (FORWARD_KL._replace(by_jax=True), FORWARD_KL._replace(numbers=Numbers(temperature=1.7))):
        assert program(other) != by_hand


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.slow
def test_a_head_in_8_bits_and_no_teachers_gradient(arrays, name):
    states, teacher, head, *rest = arrays
    values, scale = int8.quantize(np.asarray(head), -1)
    objective, table = Objective(name, NUMBERS), int8.Table(jnp.asarray(values), jnp.asarray(scale))

    def loss(states, teacher, head):
        return head_loss(states, teacher, head, *rest, 8, objective=objective)[0]

    full = jnp.asarray(values, jnp.float32) * scale[:, None]
    (ours, ours_grad), (theirs, theirs_grad) = (jax.value_and_grad(loss)(states, teacher, h) for h in (table, full))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(ours_grad, theirs_grad, atol=1e-5)
    assert not np.any(jax.grad(loss, 1)(states, teacher, head)) and not np.any(jax.grad(loss, 2)(states, teacher, head))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_0_where_both_agree_and_grows_where_they_do_not(arrays, name):
    states, teacher, head, targets, *_ = arrays
    ones = jnp.ones((B, Q))

    def kd(student):
        return head_loss(student, teacher, head, targets, ones, 0 * ones, 8, objective=Objective(name, NUMBERS))[1][0]

    np.testing.assert_allclose(kd(teacher), 0, atol=1e-5)
    assert (np.asarray(kd(states)) > 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_array_of_all_logits_exists(arrays, name):
    states, teacher, head, *rest = arrays

    def loss(states):
        return head_loss(states, teacher, head, *rest, 4, objective=Objective(name, NUMBERS))[0]

    text = str(jax.make_jaxpr(jax.grad(loss))(states))
    assert f"f32[4,{V}]" in text and f"[{B * Q},{V}]" not in text and f"[{B},{Q},{V}]" not in text


def on_states(name, student, teacher, counted, temperature):
    """The definitions, of every token (B,Q)."""
    if name == "hidden_mse":
        return ((student - teacher) ** 2).mean(-1)
    if name == "hidden_cosine":
        return 1 - cosine(student, teacher)
    assert name == "info_nce"
    student, teacher = ((a * counted[..., None]).sum(1) for a in (student, teacher))
    scores = cosine(student[:, None], teacher[None]) / temperature
    return jnp.broadcast_to((jnp.log(jnp.exp(scores).sum(1)) - jnp.diagonal(scores))[:, None], counted.shape)


def cosine(a, b):
    return (a * b).sum(-1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)


def test_objectives_on_states_are_their_definitions(arrays):
    states, teacher, _, _, weight, _ = arrays
    weight = weight.at[1, 0].set(1.0)  # info_nce: a query with tokens
    counted = weight > 0
    for name in STATE_OBJECTIVES:
        values = on_states(name, states, teacher, counted, NUMBERS.temperature)
        loss, kd = state_loss(Objective(name, NUMBERS), states, teacher, weight)
        np.testing.assert_allclose(kd, np.where(counted, values, 0), atol=1e-5)
        np.testing.assert_allclose(loss, (weight * values).sum(), rtol=1e-5)


@pytest.mark.parametrize("name", STATE_OBJECTIVES)
@pytest.mark.slow
def test_gradients_on_states_are_right_and_padding_has_none(arrays, name):
    states, teacher, head, targets, *_ = arrays
    query = Query(targets, jnp.asarray([11, 6, 4]), jnp.asarray([3, 5, 1]))

    def loss(states, teacher):
        weights = Weights(1.0, 0.5, 0.0)
        return query_losses(states, teacher, head, query, weights, 8, objective=Objective(name, NUMBERS))[0]

    def plain(states):
        at, length, start = jnp.arange(Q)[None], query.length[:, None], query.target_start[:, None]
        kd = on_states(name, states, teacher, at < length, NUMBERS.temperature)
        log_probs = jax.nn.log_softmax(jnp.einsum("bqd,vd->bqv", states, head))[:, :-1]
        ce = -jnp.take_along_axis(log_probs, targets[:, 1:, None], -1)[..., 0]
        in_y = (at[:, 1:] >= start) & (at[:, 1:] < length)
        return mean_of_rows(kd, at < length) + 0.5 * mean_of_rows(ce, in_y)

    gradient, to_teacher = jax.grad(loss, (0, 1))(states, teacher)
    assert not np.any(to_teacher)
    assert not np.any(gradient[1, 6:]) and not np.any(gradient[2, 4:]) and np.any(gradient[0, 10])
    np.testing.assert_allclose(gradient, jax.grad(plain)(states), atol=1e-6)
    zero = jax.grad(lambda s: state_loss(Objective(name, NUMBERS), s, teacher, jnp.ones((B, Q)))[0])(0 * states)
    assert np.isfinite(zero).all()


def mean_of_rows(values, counted):
    """The mean over a row's counted tokens, then over the rows."""
    return (jnp.where(counted, values, 0).sum(1) / counted.sum(1)).mean()


def test_a_loss_made_of_the_reported_values_is_refused(arrays):
    states, teacher, head, targets, *weights = arrays
    for which in (0, 1):
        with pytest.raises(TypeError, match="for reports"):
            jax.grad(lambda s: head_loss(s, teacher, head, targets, *weights, 8)[1][which].sum())(states)  # noqa: B023
