"""Causal self-attention in blocks: no (T,T) array, and no work on the masked half.

Axes: B batch, H heads, T tokens (t reads, s is read), F width of a head.
The scores of one block of queries fit in a CPU's cache. Only the output and each row's normaliser are kept for the
backward pass, which computes the shares again (as Dao et al., 2022, without a kernel of its own).
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 128
MASKED = -1e30


@jax.custom_vjp
def causal_attention(q, k, v):
    """Softmax attention of every token to itself and those before it; scores and softmax in float32.

    q, k, v: (B,T,H,F) of one dtype. Returns (B,T,H,F).
    """
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    q, k, v = (a.swapaxes(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    outputs, normalisers = [], []
    for rows in _blocks(q.shape[2]):
        scores = _scores(q[:, :, rows], k[:, :, : rows.stop], rows.start)
        top = scores.max(-1, keepdims=True, initial=MASKED)
        shares = jnp.exp(scores - top)
        total = shares.sum(-1, keepdims=True)
        outputs.append(
            (_product("bhts,bhsf->bhtf", shares.astype(v.dtype), v[:, :, : rows.stop]) / total).astype(v.dtype)
        )
        normalisers.append(top + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outputs, 2).swapaxes(1, 2), "attended")
    return out, (q, k, v, out, checkpoint_name(jnp.concatenate(normalisers, 2), "normaliser"))


def _backward(kept, out_grad):
    q, k, v, out, normaliser = kept
    # What the softmax takes off the gradient of every score in a row.
    common = (out_grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)[..., None]
    out_grad = out_grad.swapaxes(1, 2)
    q_grads, k_grad, v_grad = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows in _blocks(q.shape[2]):
        seen = slice(0, rows.stop)
        shares = jnp.exp(_scores(q[:, :, rows], k[:, :, seen], rows.start) - normaliser[:, :, rows])
        share_grad = _product("bhtf,bhsf->bhts", out_grad[:, :, rows], v[:, :, seen])
        score_grad = (shares * (share_grad - common[:, :, rows])).astype(q.dtype)
        q_grads.append(_product("bhts,bhsf->bhtf", score_grad, k[:, :, seen]))
        k_grad = k_grad.at[:, :, seen].add(_product("bhts,bhtf->bhsf", score_grad, q[:, :, rows]))
        v_grad = v_grad.at[:, :, seen].add(_product("bhts,bhtf->bhsf", shares.astype(v.dtype), out_grad[:, :, rows]))
    q_grad = jnp.concatenate(q_grads, 2) * q.shape[-1] ** -0.5
    return tuple(a.swapaxes(1, 2).astype(q.dtype) for a in (q_grad, k_grad, v_grad))


causal_attention.defvjp(_forward, _backward)


def _scores(q, k, first: int):
    """(B,H,t,s) float32 of the queries `first`, first + 1, ...; what comes later is masked."""
    scores = _product("bhtf,bhsf->bhts", q, k)
    later = jnp.arange(k.shape[2])[None] > first + jnp.arange(q.shape[2])[:, None]
    return jnp.where(later, MASKED, scores)


def _product(form: str, a, b):
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _blocks(length: int) -> list[slice]:
    # No token at all (an empty prefix is read into a cache) is one block of none.
    return [slice(start, min(start + BLOCK, length)) for start in range(0, max(length, 1), BLOCK)]
