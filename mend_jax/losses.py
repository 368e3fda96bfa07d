"""The losses on a query's states; the LM head is applied in chunks.

Axes: B batch, Q query tokens, M = B*Q tokens, C tokens of a chunk, D width, V vocabulary.

    L_distill ("kd")   KL(teacher || student) of the prediction at each query token, temperature 1 (paper, Eq. 3, of x; the
                       release has x and y), or another objective of objectives.py; of y alone with loss.kd_tokens="outputs"
    L_pred    ("pred") cross-entropy of the tokens of y (Eq. 4)
    L_CLM     ("clm")  cross-entropy of all query tokens (section 5, ablation of the pretraining loss)

A loss is the mean over an example's tokens, then over the examples of the batch, so the losses that each device computes
for its own rows can be averaged over devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mend_jax.data.query import Query
from mend_jax.models import int8
from mend_jax.objectives import OBJECTIVES, STATE_OBJECTIVES, Objective

LEAST = 1e-9  # mass of the words that a `TopK` does not name, at least: of 0 there is no logarithm
FORWARD_KL = Objective()


class Weights(NamedTuple):
    """The weight of each token in each loss, (B,Q) float32; the weights of one loss sum to 1 over the batch (a row without a counted token
    adds nothing)."""

    kd: jax.Array
    pred: jax.Array
    clm: jax.Array


class TopK(NamedTuple):
    """A teacher's predictions by their k likeliest words; the rest of the mass counts as spread evenly over all other words."""

    words: jax.Array  # (..., k) int32
    log_probs: jax.Array  # (..., k) float16 or float32, of the whole distribution
    lost: jax.Array  # (...) float32: the mass of all other words

    @classmethod
    def of(cls, states, head, k: int, chunk: int) -> "TopK":
        """Those of the LLM's states (M,D); the logits of `chunk` tokens exist at one time."""
        M, D = states.shape
        chunk = min(chunk, M)
        parts = jnp.pad(states, ((0, -M % chunk), (0, 0))).reshape(-1, chunk, D)
        found = jax.lax.map(lambda part: cls._of_chunk(int8.logits(head, part), k), parts)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:M], found)

    @classmethod
    def _of_chunk(cls, logits, k: int) -> "TopK":
        top, words = jax.lax.top_k(logits, k)
        log_probs = top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        # As they are stored: a run that computes them and one that reads them see the same numbers.
        log_probs = log_probs.astype(jnp.float16)
        return cls(words, log_probs, jnp.maximum(1 - jnp.exp(log_probs.astype(jnp.float32)).sum(-1), 0))

    def logits(self, vocab_size: int):
        """(C,V) float32 logits whose softmax they are."""
        others = jnp.log(jnp.maximum(self.lost, LEAST) / (vocab_size - self.words.shape[-1]))
        dense = jnp.broadcast_to(others[:, None], (len(others), vocab_size))
        rows = jnp.arange(len(others))[:, None]
        return dense.at[rows, self.words].set(self.log_probs.astype(jnp.float32))


def token_weights(query: Query, shift: int = 1, kd_tokens: str = "all") -> tuple[jax.Array, Weights]:
    """The token that each state predicts, (B,Q) int32, and its weights in the three losses.

    The state at token t predicts token t + `shift`. Decoder-only (1): the query's first token, which the prefix predicts,
    has no cross-entropy; L_distill covers the prediction at every token, including the last (as the release does), or, with
    `kd_tokens` "outputs", what L_pred covers.
    Encoder–decoder (0): `query` is y, which the decoder predicts from its first token on; all losses cover y alone.
    """
    B, Q = query.tokens.shape
    targets = jnp.roll(query.tokens, -shift, axis=1)
    at = jnp.arange(Q)[None]
    length, start = query.length[:, None], query.target_start[:, None]
    counted = True if query.counted is None else jnp.roll(query.counted, -shift, axis=1)
    of_outputs = _mean_weights((at + shift >= start) & (at + shift < length))
    return targets, Weights(
        kd=of_outputs if kd_tokens == "outputs" else _mean_weights(at < length),
        pred=of_outputs,
        clm=_mean_weights((at + shift < length) & counted),
    )


def state_loss(objective: Objective, states, teacher_states, kd_weight):
    """Sum over tokens of kd_weight * an objective on states (B,Q,D), and its unweighted value per token (B,Q), float32."""
    student, teacher = (a.astype(jnp.float32) for a in (states, jax.lax.stop_gradient(teacher_states)))
    counted = kd_weight > 0
    kd = jnp.where(counted, STATE_OBJECTIVES[objective.name](student, teacher, counted, objective.numbers), 0)
    return (kd_weight * kd).sum(), kd


def head_loss(
    states,
    teacher_states,
    head,
    targets,
    kd_weight,
    ce_weight,
    chunk: int,
    head_grad: bool = False,
    objective=FORWARD_KL,
):
    """Sum over tokens of kd_weight * L_distill + ce_weight * cross-entropy.

    No (B,Q,V) array exists at any time: the logits of `chunk` tokens are computed, used for the values and (when
    differentiated) for the gradient with respect to the states, and dropped. Tokens with zero weight are skipped.

    Args:
        states: (B,Q,D), the student's. Differentiated.
        teacher_states: (B,Q,D), or a `TopK` of (B,Q,k), or None if every kd_weight is 0. Not differentiated.
        head: (V,D), or an int8 `Table`. Differentiated only with `head_grad` (stage "lm", an array): no gradient is computed
            for a frozen head.
        targets: (B,Q) int32, the token each state predicts.
        kd_weight, ce_weight: (B,Q) float32, at least 0.
        chunk: tokens per chunk.
        objective: the objective of L_distill, one on logits.
    Returns:
        loss () float32, and the unweighted (kd, ce) of every token, each (B,Q) float32, 0 where skipped. The per-token values
        are for reports: differentiating them raises a TypeError.
    """
    B, Q, D = states.shape
    M = B * Q
    weights = jnp.stack([kd_weight.reshape(M), ce_weight.reshape(M)])
    teacher = jax.tree.map(lambda a: jax.lax.stop_gradient(a).reshape(M, *a.shape[2:]), teacher_states)
    head = head if head_grad else jax.lax.stop_gradient(head)
    how = _How(min(chunk, M), head_grad, objective)
    loss, kd, ce = _flat_loss(how, states.reshape(M, D), head, teacher, targets.reshape(M), weights)
    return loss, (_report_only(kd).reshape(B, Q), _report_only(ce).reshape(B, Q))


@jax.custom_vjp
def _report_only(values):
    return values


def _report_only_bwd(kept, cotangent):
    raise TypeError(
        "the per-token kd and ce of head_loss are for reports and have no gradient: weight the loss with kd_weight and ce_weight."
    )


_report_only.defvjp(lambda values: (values, None), _report_only_bwd)


class _How(NamedTuple):
    chunk: int
    head_grad: bool
    objective: Objective


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flat_loss(how, states, head, teacher, targets, weights):
    return _forward(how._replace(head_grad=False), False, states, head, teacher, targets, weights)[:3]


def _flat_loss_fwd(how, states, head, teacher, targets, weights):
    loss, kd, ce, *gradients = _forward(how, True, states, head, teacher, targets, weights)
    return (loss, kd, ce), gradients


def _flat_loss_bwd(how, gradients, cotangents):
    # Only the loss is differentiated: `_report_only` guards the per-token values.
    states, head = ((cotangents[0] * g).astype(g.dtype) if g is not None else None for g in gradients)
    return states, head, None, None, None


_flat_loss.defvjp(_flat_loss_fwd, _flat_loss_bwd)


def _forward(how, with_grad, states, head, teacher, targets, weights):
    """Values and, with `with_grad`, gradients, by a loop over the chunks that hold tokens with non-zero weight."""
    (M, D), (chunk, head_grad, objective) = states.shape, how
    by_hand = teacher is None or (objective.is_kl_of_teacher and not objective.by_jax)
    one_chunk = _chunk if by_hand else functools.partial(_any_chunk, objective)
    padded = -(-M // chunk) * chunk
    # Tokens with non-zero weight come first; the loop ends with the last of them.
    order = jnp.argsort(weights.max(0) <= 0, stable=True)
    used = (weights.max(0) > 0).sum()
    order = jnp.concatenate([order, jnp.zeros(padded - M, order.dtype)])
    weights = jnp.where(jnp.arange(padded) < used, weights[:, order], 0)
    targets = targets[order]

    def body(i, carry):
        rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * chunk, slice_size=chunk)
        teacher_rows = jax.tree.map(lambda a: a[rows], teacher)
        weight = take(weights, axis=1)
        value, kd, ce, row_grad, logit_grad = one_chunk(
            states[rows], head, teacher_rows, take(targets), weight, with_grad
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
        loss, kds, ces, state_grad, head_sum = carry
        if with_grad:
            state_grad = put(state_grad, row_grad.astype(state_grad.dtype))
        if head_grad:
            head_sum += jnp.einsum("cv,cd->vd", logit_grad, states[rows], preferred_element_type=jnp.float32)
            onehot_rows = -weight[1][:, None] * states[rows].astype(jnp.float32)
            head_sum = head_sum.at[take(targets)].add(onehot_rows)
        return loss + value, put(kds, kd), put(ces, ce), state_grad, head_sum

    zeros = jnp.zeros(padded)
    carry = (
        jnp.zeros(()),
        zeros,
        zeros,
        jnp.zeros((padded, D), states.dtype) if with_grad else None,
        jnp.zeros(head.shape) if head_grad else None,
    )
    loss, kd, ce, state_grad, head_sum = jax.lax.fori_loop(0, -(-used // chunk), body, carry)
    back = jnp.argsort(order[:M])  # the place of each token in `order`
    return (
        loss,
        kd[back],
        ce[back],
        state_grad[back] if with_grad else None,
        head_sum.astype(head.dtype) if head_grad else None,
    )


def _chunk(states, head, teacher, targets, weights, with_grad):
    """One chunk of C tokens: (weighted loss, kd (C,), ce (C,), gradient of the states (C,D), gradient of the logits (C,V)).

    L_distill is KL(teacher || student), whose gradient is written by hand.

    The gradient of the logits leaves out cross-entropy's -1 at the target, which is applied as rows of the head: that costs
    a gather of C rows, not a (C,V) array.
    """
    kd_weight, ce_weight = weights
    logits = int8.logits(head, states)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    ce = log_z - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
    if teacher is None:
        kd = jnp.zeros_like(ce)
    else:
        teacher_logits = _teacher_logits(head, teacher)
        teacher_log_z = jax.nn.logsumexp(teacher_logits, axis=-1)
        p_teacher = jnp.exp(teacher_logits - teacher_log_z[:, None])
        kd = (p_teacher * (teacher_logits - logits)).sum(-1) - teacher_log_z + log_z
    counted = kd_weight + ce_weight > 0
    kd, ce = jnp.where(counted, kd, 0), jnp.where(counted, ce, 0)
    value = (kd_weight * kd + ce_weight * ce).sum()
    if not with_grad:
        return value, kd, ce, None, None
    logit_grad = (kd_weight + ce_weight)[:, None] * jnp.exp(logits - log_z[:, None])
    if teacher is not None:
        logit_grad -= kd_weight[:, None] * p_teacher
    state_grad = int8.states_gradient(head, logit_grad, states.dtype)
    state_grad -= ce_weight[:, None] * int8.rows(head, targets, jnp.float32).astype(jnp.float32)
    return value, kd, ce, state_grad, logit_grad


def _any_chunk(objective: Objective, states, head, teacher, targets, weights, with_grad):
    """As `_chunk`, for any objective on logits, differentiated by JAX inside the chunk; the head gets no gradient."""
    kd_weight, ce_weight = weights
    counted = kd_weight + ce_weight > 0
    teacher_logits = _teacher_logits(head, teacher)

    def value(states):
        logits = int8.logits(head, states)
        ce = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
        kd = OBJECTIVES[objective.name](logits, teacher_logits, targets, objective.numbers)
        kd, ce = jnp.where(counted, kd, 0), jnp.where(counted, ce, 0)
        return (kd_weight * kd + ce_weight * ce).sum(), (kd, ce)

    if not with_grad:
        total, (kd, ce) = value(states)
        return total, kd, ce, None, None
    (total, (kd, ce)), state_grad = jax.value_and_grad(value, has_aux=True)(states)
    return total, kd, ce, state_grad, None


def _teacher_logits(head, teacher):
    """(C,V) float32, of states (C,D) or a `TopK` of (C,k)."""
    if isinstance(teacher, TopK):
        return teacher.logits((head.values if isinstance(head, int8.Table) else head).shape[0])
    return int8.logits(head, teacher)


def _mean_weights(mask):
    """(B,Q) bool -> float32 weights: the mean over a row's tokens, then over the rows."""
    mask = mask.astype(jnp.float32)
    return mask / jnp.maximum(mask.sum(1, keepdims=True), 1) / mask.shape[0]
