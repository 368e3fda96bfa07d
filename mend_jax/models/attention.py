"""Causal self-attention in blocks: no (T,T) array, and no work on the masked half.

Axes: B batch, H heads, G heads of keys and values, R = H/G, T tokens (t reads, s is read), F width of a head.
The scores of one block of queries fit in a CPU's cache. Only the output and each row's normaliser are kept for the
backward pass, which computes the shares again (as Dao et al., 2022, without a kernel of its own).
Heads that share keys and values are folded into the tokens that read, (B,H,t,F) -> (B,G,R*t,F): nothing is repeated.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 128
MASKED = -1e30


@jax.custom_vjp
def causal_attention(q, k, v):
    """Softmax attention of every token to itself and those before it; scores and softmax in float32.

    q (B,T,H,F), k, v (B,T,G,F) of one dtype; head h reads those of g = h // R. Returns (B,T,H,F).
    """
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    q, k, v = (a.swapaxes(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    G, outputs, normalisers = k.shape[1], [], []
    for rows in _blocks(q.shape[2]):
        scores = _scores(_fold(q[:, :, rows], G), k[:, :, : rows.stop], rows)
        top = scores.max(-1, keepdims=True, initial=MASKED)
        shares = jnp.exp(scores - top)
        total = shares.sum(-1, keepdims=True)
        out = (_product("bhts,bhsf->bhtf", shares.astype(v.dtype), v[:, :, : rows.stop]) / total).astype(v.dtype)
        outputs.append(_unfold(out, q.shape[1]))
        normalisers.append(_unfold(top + jnp.log(total), q.shape[1]))
    out = checkpoint_name(jnp.concatenate(outputs, 2).swapaxes(1, 2), "attended")
    return out, (q, k, v, out, checkpoint_name(jnp.concatenate(normalisers, 2), "normaliser"))


def _backward(kept, out_grad):
    q, k, v, out, normaliser = kept
    # What the softmax takes off the gradient of every score in a row.
    common = (out_grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)[..., None]
    out_grad, (H, G) = out_grad.swapaxes(1, 2), (q.shape[1], k.shape[1])
    q_grads, k_grad, v_grad = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows in _blocks(q.shape[2]):
        seen = slice(0, rows.stop)
        q_rows, out_rows, norm_rows, common_rows = (_fold(a[:, :, rows], G) for a in (q, out_grad, normaliser, common))
        shares = jnp.exp(_scores(q_rows, k[:, :, seen], rows) - norm_rows)
        share_grad = _product("bhtf,bhsf->bhts", out_rows, v[:, :, seen])
        score_grad = (shares * (share_grad - common_rows)).astype(q.dtype)
        q_grads.append(_unfold(_product("bhts,bhsf->bhtf", score_grad, k[:, :, seen]), H))
        k_grad = k_grad.at[:, :, seen].add(_product("bhts,bhtf->bhsf", score_grad, q_rows))
        v_grad = v_grad.at[:, :, seen].add(_product("bhts,bhtf->bhsf", shares.astype(v.dtype), out_rows))
    q_grad = jnp.concatenate(q_grads, 2) * q.shape[-1] ** -0.5
    return tuple(a.swapaxes(1, 2).astype(q.dtype) for a in (q_grad, k_grad, v_grad))


causal_attention.defvjp(_forward, _backward)


def attention_after(q, cache, k, v, mask):
    """Softmax attention to a prefix and to the rows themselves. (keys, values) of the prefix are each (P,G,F), shared by
    all rows, or (B,P,G,F).

    q (B,T,H,F), k, v (B,T,G,F), mask (B,T,P+T) -> (B,T,H,F); scores and softmax in float32.
    A shared prefix is not copied per row: it is multiplied with all rows' queries at once.
    """
    keys, values = cache
    P, (B, T, H, F), G = keys.shape[-3], q.shape, k.shape[2]
    of_prefix = "phf" if keys.ndim == 3 else "bphf"
    R = H // G
    q = q * F**-0.5
    if R > 1:  # as above, in the tokens' order: (B,T*R,G,F)
        q = q.reshape(B, T, G, R, F).swapaxes(2, 3).reshape(B, T * R, G, F)
        mask = jnp.repeat(mask, R, axis=1)
    before = jnp.einsum(f"bthf,{of_prefix}->bhtp", q, keys, preferred_element_type=jnp.float32)
    within = jnp.einsum("bthf,bshf->bhts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None], jnp.concatenate([before, within], -1), jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores).astype(v.dtype)
    out = jnp.einsum(f"bhtp,{of_prefix}->bthf", shares[..., :P], values)
    out += jnp.einsum("bhts,bshf->bthf", shares[..., P:], v)
    return out if R == 1 else out.reshape(B, T, R, G, F).swapaxes(2, 3).reshape(B, T, H, F)


def _scores(q, k, rows: slice):
    """(B,G,R*t,s) float32 of the queries at `rows`, folded; what comes later is masked."""
    scores = _product("bhtf,bhsf->bhts", q, k)
    length = rows.stop - rows.start
    later = jnp.arange(k.shape[2])[None] > rows.start + jnp.arange(length)[:, None]
    if q.shape[2] > length:
        later = jnp.tile(later, (q.shape[2] // length, 1))
    return jnp.where(later, MASKED, scores)


def _fold(a, groups: int):
    """(B,H,t,x) -> (B,G,R*t,x)."""
    B, H, t, x = a.shape
    return a if groups == H else a.reshape(B, groups, H // groups * t, x)


def _unfold(a, heads: int):
    """(B,G,R*t,x) -> (B,H,t,x)."""
    B, G, rows, x = a.shape
    return a if heads == G else a.reshape(B, heads, rows * G // heads, x)


def _product(form: str, a, b):
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _blocks(length: int) -> list[slice]:
    # No token at all (an empty prefix is read into a cache) is one block of none.
    return [slice(start, min(start + BLOCK, length)) for start in range(0, max(length, 1), BLOCK)]
