"""The chunked losses equal their plain formulas, and no (B,Q,V) array lives through a train step.

Axes: B batch, Q query tokens, D width, V vocabulary.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from mend_jax.data.batches import Batch
from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import LLM
from mend_jax.losses import Weights, head_loss, token_weights
from mend_jax.models.decoder import init_params
from mend_jax.models.families import DecoderConfig
from mend_jax.prefixes.distiller import Distiller
from mend_jax.step import init_state, make_loss_fn, make_optimizer, make_train_step, query_losses

pytestmark = pytest.mark.usefixtures("optimised")

B, Q, D, V = 3, 11, 16, 57
LENGTHS, STARTS = [11, 6, 4], [3, 5, 1]


def plain(states, teacher, head, targets, kd_weight, ce_weight):
    """The definition, with all logits at once, in float32."""
    log_p = jax.nn.log_softmax(jnp.einsum("bqd,vd->bqv", states, head).astype(jnp.float32))
    ce = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    kd = jnp.zeros_like(ce)
    if teacher is not None:
        log_t = jax.lax.stop_gradient(jax.nn.log_softmax(jnp.einsum("bqd,vd->bqv", teacher, head).astype(jnp.float32)))
        kd = (jnp.exp(log_t) * (log_t - log_p)).sum(-1)
    return (kd_weight * kd + ce_weight * ce).sum(), (kd, ce)


@pytest.fixture
def arrays():
    def normal(*shape):
        return jnp.asarray(np.random.randn(*shape), jnp.float32)

    return normal(B, Q, D), normal(B, Q, D), normal(V, D), jnp.asarray(np.random.randint(0, V, (B, Q)))


@pytest.fixture
def query():
    tokens = np.random.randint(0, V, (B, Q)).astype(np.int32)
    return Query(jnp.asarray(tokens), jnp.asarray(LENGTHS), jnp.asarray(STARTS))


def uneven_weights():
    """Of every kind: both losses, one alone, neither."""
    kd, ce = np.random.rand(2, B, Q).astype(np.float32)
    kd[0, :4], ce[0, 2:7], kd[1], ce[2, 3:] = 0, 0, 0, 0
    kd[2, 5:] = 0
    return jnp.asarray(kd), jnp.asarray(ce)


def close(ours, theirs, tolerance=1e-5):
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= tolerance * max(1e-3, np.abs(theirs).max())


@pytest.mark.parametrize("chunk", [1, 4, 16, 33, 512])
@pytest.mark.parametrize("losses", ["kd and ce", "kd", "ce"])
def test_value_and_gradient_are_those_of_the_formula(arrays, losses, chunk):
    states, teacher, head, targets = arrays
    kd_weight, ce_weight = uneven_weights()
    kd_weight = kd_weight * ("kd" in losses)
    ce_weight = ce_weight * ("ce" in losses)
    teacher = teacher if "kd" in losses else None

    @jax.jit
    def ours(states):
        loss, tokens = head_loss(states, teacher, head, targets, kd_weight, ce_weight, chunk)
        return 3 * loss, tokens

    (value, (kd, ce)), gradient = jax.value_and_grad(ours, has_aux=True)(states)
    (wanted, (kd_wanted, ce_wanted)), gradient_wanted = jax.value_and_grad(
        lambda s: plain(s, teacher, head, targets, kd_weight, ce_weight), has_aux=True
    )(states)
    assert close(value, 3 * wanted) and close(gradient, 3 * gradient_wanted)
    counted = np.asarray(kd_weight + ce_weight) > 0
    assert close(kd, np.where(counted, kd_wanted, 0)) and close(ce, np.where(counted, ce_wanted, 0))
    assert close(ours(states)[0], 3 * wanted)  # the path without gradients


@pytest.mark.parametrize("chunk", [5, 512])
def test_the_gradient_of_a_head_that_is_trained(arrays, chunk):
    states, _, head, targets = arrays
    _, ce_weight = uneven_weights()
    nothing = jnp.zeros_like(ce_weight)

    def ours(states, head):
        return 2 * head_loss(states, None, head, targets, nothing, ce_weight, chunk, head_grad=True)[0]

    def theirs(states, head):
        return 2 * plain(states, None, head, targets, nothing, ce_weight)[0]

    for found, wanted in zip(*(jax.jit(jax.grad(f, (0, 1)))(states, head) for f in (ours, theirs)), strict=True):
        assert close(found, wanted)


def test_a_frozen_head_and_the_teacher_get_no_gradient(arrays):
    states, teacher, head, targets = arrays
    weights = uneven_weights()
    gradients = jax.grad(lambda *a: head_loss(*a, targets, *weights, 8)[0], (0, 1, 2))(states, teacher, head)
    assert np.any(gradients[0]) and not np.any(gradients[1]) and not np.any(gradients[2])


def test_kl_is_never_negative_and_zero_for_equals(arrays):
    states, teacher, head, targets = arrays
    ones, zeros = jnp.ones((B, Q)), jnp.zeros((B, Q))
    same = functools.partial(
        head_loss, teacher_states=states, head=head, targets=targets, kd_weight=ones, ce_weight=zeros
    )
    (loss, (kd, _)), gradient = jax.value_and_grad(lambda s: same(s, chunk=8), has_aux=True)(states)
    assert abs(loss) < 1e-4 and np.abs(gradient).max() < 1e-5 and np.abs(kd).max() < 1e-5
    assert np.all(head_loss(states, teacher, head, targets, ones, zeros, 8)[1][0] > 0)


def test_extreme_logits_stay_finite(arrays):
    states, teacher, head, targets = arrays
    weights = jnp.ones((B, Q)), jnp.ones((B, Q))
    for scale in (1e3, 0.0):
        value = jax.value_and_grad(lambda s: head_loss(s, scale * teacher, head, targets, *weights, 8)[0])  # noqa: B023
        loss, gradient = value(scale * states)
        assert np.isfinite(loss) and np.all(np.isfinite(gradient))


def test_garbage_at_padding_is_not_read(arrays):
    states, teacher, head, targets = arrays
    kd_weight, ce_weight = uneven_weights()
    counted = (kd_weight + ce_weight > 0)[..., None]
    garbage = jnp.where(counted, 0, 1e6)

    def value(states, teacher):
        return head_loss(states, teacher, head, targets, kd_weight, ce_weight, 8)[0]

    loss, gradient = jax.value_and_grad(value)(states + garbage, teacher + garbage)
    assert loss == value(states, teacher)
    assert np.array_equal(gradient, jnp.where(counted, jax.grad(value)(states, teacher), 0))


def test_bfloat16_is_close_to_float32(arrays):
    states, teacher, head, targets = arrays
    weights = uneven_weights()
    half = [array.astype(jnp.bfloat16) for array in (states, teacher, head)]

    def value(states, teacher, head):
        return head_loss(states, teacher, head, targets, *weights, 8)[0]

    loss, gradient = jax.value_and_grad(value)(*half)
    wanted, gradient_wanted = jax.value_and_grad(value)(*(array.astype(jnp.float32) for array in half))
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert close(loss, wanted, 1e-2) and close(gradient, gradient_wanted, 3e-2)


def test_what_each_loss_counts(query):
    """kd: every token; pred: the tokens of y; clm: every token but the first; means over a row, then over rows."""
    targets, weights = token_weights(query)
    for name, first in (("kd", 0), ("pred", None), ("clm", 1)):
        weight = np.asarray(getattr(weights, name))
        for row, (length, start) in enumerate(zip(LENGTHS, STARTS, strict=True)):
            begin, end = (start if first is None else first), length
            at = np.arange(begin, end) - (name != "kd")  # the state before a token predicts it; kd is *at* tokens
            wanted = np.zeros(Q)
            wanted[at] = 1 / len(at) / B
            assert np.allclose(weight[row], wanted)
            if name == "pred":
                assert np.asarray(targets)[row, at].tolist() == np.asarray(query.tokens)[row, start:length].tolist()


def test_of_outputs_alone_l_distill_counts_what_l_pred_does(arrays, query):
    """In the other losses nothing changes."""
    states, teacher, head, _ = arrays
    (_, everywhere), (_, outputs) = token_weights(query), token_weights(query, kd_tokens="outputs")
    assert np.array_equal(outputs.kd, outputs.pred) and not np.array_equal(outputs.kd, everywhere.kd)
    assert np.array_equal(outputs.pred, everywhere.pred) and np.array_equal(outputs.clm, everywhere.clm)

    def value(states):
        return query_losses(states, teacher, head, query, Weights(1.0, 0.0, 0.0), 8, kd_tokens="outputs")[0]

    gradient = np.abs(np.asarray(jax.grad(value)(states))).max(-1)
    assert np.array_equal(gradient > 0, np.asarray(outputs.pred) > 0)


@pytest.mark.parametrize(
    ("stage", "kd_tokens", "wanted"),
    [("finetune", "all", "all"), ("finetune", "outputs", "outputs"), ("pretrain", "outputs", "all")],
)
def test_finetuning_alone_may_take_l_distill_of_the_outputs(stage, kd_tokens, wanted, arrays, query):
    """A text has no outputs."""
    states, teacher, head, _ = arrays
    llm = SimpleNamespace(start_token=None, states=lambda *_: states, head=lambda _: head, targets=lambda query: query)
    model = SimpleNamespace(whole=lambda *_: None, apply=lambda *_: None)
    config = base.get_config()
    config.stage, config.loss.kd_tokens = stage, kd_tokens
    found = make_loss_fn(config, llm, model)(None, None, Batch(None, None, query, None, teacher=teacher))[1]["kd"]
    weights = Weights(1.0, 0.0, 0.0)
    values = {
        which: query_losses(states, teacher, head, query, weights, 8, kd_tokens=which)[1]["kd"]
        for which in ("all", "outputs")
    }
    assert values["all"] != values["outputs"] and found == pytest.approx(float(values[wanted]), rel=1e-5)


def test_weighted_losses_and_the_mean_over_devices(arrays, query):
    """The whole batch equals the mean of its rows: so may devices share it."""
    states, teacher, head, _ = arrays
    weights = Weights(kd=2.0, pred=0.5, clm=0.25)
    loss, metrics = query_losses(states, teacher, head, query, weights, 8)
    assert loss == pytest.approx(float(2 * metrics["kd"] + 0.5 * metrics["pred"] + 0.25 * metrics["clm"]), rel=1e-5)
    rows = []
    for i in range(B):
        row = jax.tree.map(lambda a: a[i : i + 1], (states, teacher, query))  # noqa: B023
        rows.append(query_losses(row[0], row[1], head, row[2], weights, 8)[1])
    for name, value in metrics.items():
        assert np.mean([row[name] for row in rows]) == pytest.approx(float(value), rel=1e-5)
    none = query_losses(states, None, head, query, Weights(0.0, 1.0, 0.0), 8)
    assert none[1]["kd"] == 0 and none[0] == pytest.approx(float(metrics["pred"]), rel=1e-5)


# Memory

ROWS, TOKENS, VOCABULARY = 8, 256, 50257  # of gpt2; the decoders are small, so that the head is what there is
FORBIDDEN = ROWS * TOKENS * VOCABULARY


def shapes_of_a_run(stage):
    """(config, llm, distiller, batch) of shapes alone."""
    decoder = DecoderConfig("gpt2", VOCABULARY, 32, 1, 2, 64, 1024)
    params = jax.eval_shape(lambda: init_params(decoder, 0))
    llm = LLM(decoder, params, None, "", "float32")
    placeholders = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    distiller = Distiller(decoder, {"backbone": params, "placeholders": placeholders}, "identity", 32)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    query = Query(ints((ROWS, TOKENS)), ints((ROWS,)), ints((ROWS,)))
    batch = Batch(ints((ROWS, 0 if stage == "lm" else 64)), ints((ROWS,)), query, ints((ROWS,)))
    config = base.get_config()
    config.stage, config.loss.clm, config.loss.chunk = stage, 1.0, 256
    return config, llm, distiller, batch


def step_of(stage):
    """The train step with its abstract arguments, ready to be traced or lowered."""
    config, llm, distiller, batch = shapes_of_a_run(stage)
    optimizer = make_optimizer(config)
    step = make_train_step(config, make_loss_fn(config, llm, None if stage == "lm" else distiller), optimizer)
    trained = llm.params if stage == "lm" else distiller.params
    state = jax.eval_shape(lambda params: init_state(params, optimizer), trained)
    return jax.jit(step, donate_argnums=0).trace(state, {} if stage == "lm" else llm.params, batch)


def largest_array(jaxpr):
    """Elements of the largest float array that any equation makes, inner programs included."""
    largest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if jnp.issubdtype(getattr(variable.aval, "dtype", np.int32), jnp.floating):
                largest = max(largest, variable.aval.size)
        for inner in jax.core.jaxprs_in_params(equation.params):
            largest = max(largest, largest_array(inner))
    return largest


@pytest.mark.parametrize("stage", ["finetune", "lm"])
@pytest.mark.slow
def test_no_float32_array_of_all_logits_lives_through_the_step(stage):
    traced = step_of(stage)
    assert largest_array(traced.jaxpr.jaxpr) < FORBIDDEN / 2
    compiled = traced.lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * FORBIDDEN
    assert f"[{ROWS},{TOKENS},{VOCABULARY}]" not in compiled.as_text()
    assert f"[{ROWS * TOKENS},{VOCABULARY}]" not in compiled.as_text()


def test_the_memory_test_can_fail():
    """A step that makes all logits at once is seen by all of the measures above."""
    _, llm, _, batch = shapes_of_a_run("finetune")
    states = jax.ShapeDtypeStruct((ROWS, TOKENS, 32), jnp.float32)

    def loss(states, head, query):
        targets, weights = token_weights(query)
        return plain(states, states, head, targets, weights.kd, weights.pred)[0]

    traced = jax.jit(jax.grad(loss)).trace(states, llm.params["embed"]["tokens"], batch.query)
    assert largest_array(traced.jaxpr.jaxpr) >= FORBIDDEN
    assert traced.lower().compile().memory_analysis().temp_size_in_bytes > 4 * FORBIDDEN


def test_the_chunk_bounds_the_memory():
    """Half the chunk, about half the temporary memory."""
    _, llm, _, batch = shapes_of_a_run("finetune")
    states = jax.ShapeDtypeStruct((ROWS, TOKENS, 32), jnp.float32)

    def temporary(chunk):
        def loss(states, teacher, head, query):
            return query_losses(states, teacher, head, query, Weights(1.0, 1.0, 0.0), chunk)[0]

        lowered = jax.jit(jax.grad(loss)).lower(states, states, llm.params["embed"]["tokens"], batch.query)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(128) < 0.6 * temporary(256) < 0.6**2 * temporary(512)
