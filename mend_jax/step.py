"""The pure train step: one for all stages and methods, without I/O or randomness.

There are two trees: the trainable params are differentiated, optimised, donated and saved; the frozen LLM's are an argument.
Gradients flow through the LLM into the prefix; only the teacher's pass is cut off.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mend_jax.cli.errors import UserError
from mend_jax.data.query import Query, query_tokens
from mend_jax.data.tokenize import other_tokenizer
from mend_jax.losses import FORWARD_KL, Weights, head_loss, state_loss, token_weights
from mend_jax.models.programs import program
from mend_jax.objectives import Objective
from mend_jax.prefixes.context import bucket, demo_tokens, pad_columns
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.sharding import ROWS


@struct.dataclass
class TrainState:
    """All that must survive a restart."""

    step: jax.Array  # () int32, updates made
    params: Any
    opt_state: Any


def make_optimizer(config) -> optax.GradientTransformation:
    """AdamW with clipping by the global norm, linear warm-up and linear decay to 0 over train.steps (paper, Table 5)."""
    o = config.optimizer
    adamw = optax.adamw(learning_rate(config), b1=o.b1, b2=o.b2, weight_decay=o.weight_decay)
    return optax.chain(clip_by_global_norm(o.clip), adamw)


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """As optax's, but multiplies every gradient by one factor where optax divides by the norm: XLA fuses the product into
    AdamW's passes, but computes the quotient in a pass of its own that writes all gradients again."""

    def update(gradients, state, params=None):
        del params
        factor = largest / jnp.maximum(optax.global_norm(gradients), largest)
        return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def learning_rate(config) -> Callable[[jax.Array], jax.Array]:
    """The learning rate as a function of the update's number, from 0."""
    o, steps = config.optimizer, config.train.steps
    decay = optax.linear_schedule(o.learning_rate, 0.0, max(1, steps - o.warmup_steps))
    if not o.warmup_steps:
        return decay
    rise = optax.linear_schedule(o.learning_rate / o.warmup_steps, o.learning_rate, o.warmup_steps)
    return optax.join_schedules([rise, decay], [o.warmup_steps])


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def loss_weights(config) -> Weights:
    """The weight of each loss in the stage's sum; a stage has one cross-entropy: L_pred on tasks, L_CLM on text."""
    lm = config.stage == "lm"
    return Weights(
        kd=0.0 if lm else config.loss.kd,
        pred=config.loss.pred if config.stage == "finetune" else 0.0,
        clm=1.0 if lm else config.loss.clm if config.stage == "pretrain" else 0.0,
    )


def make_loss_fn(config, llm, model=None, mesh: Mesh | None = None):
    """loss_fn(params, llm_params, batch) -> (loss, {"kd", "pred", "clm"}), set up by config.stage and config.loss.

    Args:
        config: a whole run's config (configs/base.py).
        llm: the `LLM`; in stage "lm" its own params are the trainable ones.
        model: the kind of prefix that is trained (prefixes/kind.py); None in stage "lm".
        mesh: the mesh of parallel="mesh", else None; each device computes the losses of the rows that it holds.
    """
    lm, shift, objective = config.stage == "lm", _shift(llm), Objective.of(config.loss)
    kd_tokens = config.loss.kd_tokens if config.stage == "finetune" else "all"  # a text has no outputs
    weights = loss_weights(config)

    def loss_fn(params, llm_params, batch):
        query = _one_after_another(batch.query)
        if lm:
            prefix, llm_params = no_prefix(len(query.tokens), llm.config.width), params
        else:
            prefix = _prefix(model, params, llm_params, batch)
        student = llm.states(llm_params, prefix, query)
        teacher = _taught(llm, llm_params, batch) if weights.kd else None
        rest = llm.head(llm_params), llm.targets(query), weights, config.loss.chunk
        return query_losses(student, teacher, *rest, lm, mesh, shift, objective, kd_tokens)

    return loss_fn


def make_kd_fn(llm, model=None, chunk: int = 512, mesh: Mesh | None = None, kd_tokens: Sequence[str] = ("all",)):
    """kd(params, llm_params, batch) -> (T,) float32: L_distill, KL(teacher || student) in nats per token of the queries, with
    each of T values of loss.kd_tokens.

    The student reads the prefix that `model` makes from `params`, or, where `model` is None, no prefix at all. `mesh` as in
    `make_loss_fn`.
    """

    def kd(params, llm_params, batch):
        query = _one_after_another(batch.query)
        if model is None:
            prefix = _nothing(llm, llm_params, query)
        else:
            prefix = _prefix(model, params, llm_params, batch)
        states = llm.states(llm_params, prefix, query), teacher_states(llm, llm_params, batch)
        rest = llm.head(llm_params), llm.targets(query), Weights(1.0, 0.0, 0.0), chunk
        losses = (query_losses(*states, *rest, mesh=mesh, shift=_shift(llm), kd_tokens=which)[1] for which in kd_tokens)
        return jnp.stack([loss["kd"] for loss in losses])

    return kd


def _prefix(model, params, frozen, batch) -> Prefix:
    some = {} if batch.vectors is None else {"vectors": batch.vectors}
    return model.apply(model.whole(params, frozen), batch.demos, batch.demos_length, **some)


def _nothing(llm, llm_params, query: Query) -> Prefix:
    """No prefix; an encoder that would then have no token at all to read, as in pretraining, gets the start token (T5's padding)."""
    rows = len(query.tokens)
    if llm.start_token is None or query.input_columns != 0:
        return no_prefix(rows, llm.config.width)
    first = llm.embed(llm_params, jnp.full((rows, 1), llm.start_token))
    return Prefix(first, jnp.ones(rows, jnp.int32))


def query_losses(
    student,
    teacher,
    head,
    targets,
    weights: Weights,
    chunk: int,
    head_grad: bool = False,
    mesh=None,
    shift=1,
    objective=FORWARD_KL,
    kd_tokens="all",
):
    """(loss, {"kd", "pred", "clm"}): the weighted sum, and each loss unweighted (0 if it was not computed).

    `targets` is `llm.targets(query)`; a state predicts the token `shift` places after its own (`token_weights`, which says
    `kd_tokens` too).
    """

    def local(student, teacher, head, targets):
        following, tokens = token_weights(targets, shift, kd_tokens)
        kd_weight = weights.kd * tokens.kd
        ce_weight = weights.pred * tokens.pred + weights.clm * tokens.clm
        if teacher is not None and objective.on_states:
            loss, kd = state_loss(objective, student, teacher, kd_weight)
            ce = jnp.zeros_like(kd)
            if weights.pred or weights.clm:  # else no token needs the head
                told, (_, ce) = head_loss(student, None, head, following, 0 * kd_weight, ce_weight, chunk, head_grad)
                loss += told
        else:
            loss, (kd, ce) = head_loss(
                student, teacher, head, following, kd_weight, ce_weight, chunk, head_grad, objective
            )
        counted = {"kd": weights.kd, "pred": weights.pred, "clm": weights.clm}
        values = {"kd": kd, "pred": ce, "clm": ce}
        metrics = {name: (getattr(tokens, name) * values[name]).sum() * bool(counted[name]) for name in counted}
        return loss[None], jax.tree.map(lambda a: a[None], metrics)

    if mesh is not None:  # tokens are sorted and counted per device: nothing crosses devices but the sums
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(P(ROWS), P(ROWS), P(), P(ROWS)), out_specs=P(ROWS), check_vma=False
        )
    loss, metrics = local(student, teacher, head, targets)
    return loss.mean(), jax.tree.map(jnp.mean, metrics)


def make_train_step(config, loss_fn, optimizer: optax.GradientTransformation, average=lambda tree: tree):
    """train_step(state, llm_params, batch) -> (state, metrics).

    Args:
        loss_fn: from `make_loss_fn`.
        average: tree -> its mean over the devices, each of which sees a part of the batch (`Layout.average`).
    """
    rate, accumulate = learning_rate(config), config.train.accumulate

    def train_step(state: TrainState, llm_params, batch):
        (loss, metrics), grads = _accumulated(loss_fn, accumulate, state.params, llm_params, batch)
        metrics = {"loss": loss, **metrics}
        grads, metrics = average((grads, metrics))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics["grad_norm"] = optax.global_norm(grads)
        metrics["learning_rate"] = rate(state.step)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def training_losses(llm, distiller, demos, x, y) -> dict[str, float]:
    """The three losses of one example, unweighted (paper, sections 3.2 and 3.3).

    Args:
        llm: from `load_llm`.
        distiller: from `load_distiller`, or another kind of prefix (prefixes/kind.py).
        demos: (x, y) string pairs, read by both models' tokenizers; or token ids of one context (list of int), if one
            tokenizer serves both.
        x, y: the input and the output: each a text, which gets the distiller's template around it, or token ids (list of
            int).
    Returns:
        {"kd": KL(teacher || student), "pred": cross-entropy of y, "clm": cross-entropy of x (except its first token) and y},
        each in nats, the mean over its tokens; float32 arithmetic. For an encoder–decoder "kd" and "clm" cover y alone,
        which is all that its decoder predicts.
    Raises:
        UserError: several contexts, texts but an LLM without a tokenizer, token ids but tokenizers that differ, an empty x or
            y, a token that the LLM does not have, or more tokens than one of the windows.
    """
    prefix = distiller.distill(demos)
    _check_one(prefix.length)
    texts = np.ndim(demos[0]) == 1 and isinstance(demos[0][0], str)
    if not texts and other_tokenizer(llm.tokenizer, distiller.tokenizer) is not None:
        raise UserError(
            "The distiller and the LLM have different tokenizers, so token ids cannot be demonstrations for both: give "
            "the demonstrations as texts, [(input, output), ...]."
        )
    template = distiller.template
    reader = (llm.tokenizer, llm.config, llm.window, "LLM", template)
    shown, shown_length = demo_tokens(demos, *reader)
    _check_one(shown_length)
    x, y = query_tokens(llm, x, "query", template.query), query_tokens(llm, y, "output", template.output)
    _check_query(llm, x, y, max(shown.shape[1], prefix.embeds.shape[1]))
    ids = [*x, *y]
    tokens = jnp.asarray([ids + [0] * (bucket(len(ids)) - len(ids))], jnp.int32)
    query = Query(tokens, jnp.asarray([len(ids)], jnp.int32), jnp.asarray([len(x)], jnp.int32))
    teacher = (pad_columns(shown, llm.window), shown_length)
    values = _example_losses(llm, llm.params, prefix, teacher, query)
    return {name: float(value) for name, value in values.items()}


@program
def _example_losses(llm, llm_params, prefix, teacher, query):
    student = llm.states(llm_params, prefix, query)
    tokens, length = teacher
    taught = llm.states(llm_params, Prefix(llm.embed(llm_params, tokens), length), query)
    ones, targets, head = Weights(1.0, 1.0, 1.0), llm.targets(query), llm.head(llm_params)
    return query_losses(student, taught, head, targets, ones, chunk=512, shift=_shift(llm))[1]


def _shift(llm) -> int:
    """How far ahead of its own token a state predicts (`token_weights`)."""
    return 1 if llm.start_token is None else 0


def _check_one(lengths) -> None:
    if len(lengths) != 1:
        raise UserError(
            f"The losses are those of one example with one context, not {len(lengths)}: call this once per context."
        )


def _check_query(llm, x, y, prefix_length: int) -> None:
    if len(x) == 0 or len(y) == 0:
        raise UserError("The input or the output is empty: each needs at least one token.")
    wrong = next((token for token in (*x, *y) if not 0 <= token < llm.config.vocab_size), None)
    if wrong is not None:
        raise UserError(
            f"The query holds token {wrong}, but the LLM knows {llm.config.vocab_size} tokens: use the LLM's own tokenizer."
        )
    needed = prefix_length + len(x) + len(y)
    if needed > llm.window:
        raise UserError(
            f"The query behind its prefix needs {needed} positions, {prefix_length} of them the prefix, the LLM reads at most"
            f" {llm.window}: give fewer demonstrations or a shorter query."
        )


def _one_after_another(query: Query) -> Query:
    """The queries of all rows as (B*R,Q); a (B,Q) batch of one query a row is returned as it is."""
    if query.tokens.ndim == 2:
        return query
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), query)


def _taught(llm, llm_params, batch):
    """The teacher's states, or its predictions where the batch has them (run/teacher_cache.py)."""
    if batch.teacher is None:
        return teacher_states(llm, llm_params, batch)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]) if batch.query.tokens.ndim == 3 else a, batch.teacher)


def teacher_states(llm, llm_params, batch):
    """(B*R,Q,D): the LLM's states at the queries after the demonstrations themselves; no gradient flows through them."""
    query = _one_after_another(batch.query)
    demos, length = batch.demos, batch.demos_length
    if batch.teacher_demos is not None:  # the LLM's own tokens; with release_truncation a longer context
        demos, length = batch.teacher_demos, batch.teacher_demos_length
    prefix = Prefix(llm.embed(llm_params, demos), length)
    return jax.lax.stop_gradient(llm.states(llm_params, prefix, query))


def _accumulated(loss_fn, parts: int, params, llm_params, batch):
    """((loss, metrics), gradients) of the batch, computed in `parts` equal parts one after another."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        return value_and_grad(params, llm_params, batch)
    # Part i takes the rows i, i + parts, ..., so that rows stay on the device that holds them.
    batches = jax.tree.map(lambda a: a.reshape(len(a) // parts, parts, *a.shape[1:]).swapaxes(0, 1), batch)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, llm_params, part)), None

    shapes = jax.eval_shape(value_and_grad, params, llm_params, jax.tree.map(lambda a: a[0], batches))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, batches)
    return jax.tree.map(lambda a: a / parts, total)
