"""Causal self-attention in blocks: no (T,T) array, and no work on the masked half.

Axes: B batch, H heads, G heads of keys and values, R = H/G, T tokens (t reads, s is read), F width of a head.
The scores of one block of queries fit in a CPU's cache. Only the output and each row's normaliser are kept for the
backward pass, which computes the shares again (as Dao et al., 2022, without a kernel of its own).
Heads that share keys and values are folded into the tokens that read, (B,H,t,F) -> (B,G,R*t,F): nothing is repeated.
"""

import functools

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
        q_rows, parts = _fold(q[:, :, rows], G), _parts(rows)
        scores = [_scores(q_rows, k[:, :, seen], masked) for seen, masked in parts]
        top = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True, initial=MASKED) for part in scores])
        shares = [jnp.exp(part - top) for part in scores]
        total = sum(part.sum(-1, keepdims=True) for part in shares)
        values = (v[:, :, seen] for seen, _ in parts)
        out = sum(_product("bhts,bhsf->bhtf", a.astype(v.dtype), b) for a, b in zip(shares, values, strict=True))
        outputs.append(_unfold((out / total).astype(v.dtype), q.shape[1]))
        normalisers.append(_unfold(top + jnp.log(total), q.shape[1]))
    out = checkpoint_name(jnp.concatenate(outputs, 2).swapaxes(1, 2), "attended")
    return out, (q, k, v, out, checkpoint_name(jnp.concatenate(normalisers, 2), "normaliser"))


def _backward(kept, out_grad):
    q, k, v, out, normaliser = kept
    # What the softmax takes off the gradient of every score in a row.
    # One axis for rows and tokens: of a single row XLA sums products ten times slower on a CPU.
    H, F = out.shape[2:]
    common = (out_grad.astype(jnp.float32).reshape(-1, H, F) * out.astype(jnp.float32).reshape(-1, H, F)).sum(-1)
    common = common.reshape(out.shape[:-1]).swapaxes(1, 2)[..., None]
    out_grad, (B, G, S, _) = out_grad.swapaxes(1, 2), k.shape
    # Transposed, because the product that makes them is twice as quick so on a CPU.
    q_grads, k_grad, v_grad = [], jnp.zeros((B, G, F, S), jnp.float32), jnp.zeros((B, G, F, S), jnp.float32)
    for rows in _blocks(q.shape[2]):
        q_rows, out_rows, norm_rows, common_rows = (_fold(a[:, :, rows], G) for a in (q, out_grad, normaliser, common))
        q_grad = 0.0
        for seen, masked in _parts(rows):
            keys, values = k[:, :, seen], v[:, :, seen]
            shares = jnp.exp(_scores(q_rows, keys, masked) - norm_rows)
            share_grad = _product("bhtf,bhsf->bhts", out_rows, values)
            score_grad = (shares * (share_grad - common_rows)).astype(q.dtype)
            q_grad += _product("bhts,bhsf->bhtf", score_grad, keys)
            k_grad = k_grad.at[..., seen].add(_product("bhtf,bhts->bhfs", q_rows, score_grad))
            v_grad = v_grad.at[..., seen].add(_product("bhtf,bhts->bhfs", out_rows, shares.astype(v.dtype)))
        q_grads.append(_unfold(q_grad, H))
    q_grad = jnp.concatenate(q_grads, 2).swapaxes(1, 2) * F**-0.5
    k_grad, v_grad = (a.transpose(0, 3, 1, 2) for a in (k_grad, v_grad))
    return tuple(a.astype(q.dtype) for a in (q_grad, k_grad, v_grad))


causal_attention.defvjp(_forward, _backward)


def attention_after(q, cache, k, v, within, length):
    """Softmax attention to a prefix and to the rows themselves: each part in blocks, joined by their normalisers, so that
    no (B,H,T,P+T) array goes through memory. (keys, values) of the prefix are each (P,G,F), shared by all rows, or (B,P,G,F).

    q (B,T,H,F), k, v (B,T,G,F), within (B,T,T) bool: what tokens see of their own row, themselves at least and none that
    comes later; length () or (B,): the columns of the prefix that count. Returns (B,T,H,F); scores and softmax in float32.
    """
    (B, T, H, F), G, P = q.shape, k.shape[2], cache[0].shape[-3]
    q = (q * F**-0.5).reshape(B, T, G, H // G, F)
    out, normaliser = _to_itself(q, k, v, within)
    if P:
        before, of_prefix = (_to_shared if cache[0].ndim == 3 else _to_own)(q, *cache, length)
        weight = jax.nn.sigmoid(of_prefix - normaliser)  # of the prefix among all that is seen
        out = weight * before + (1 - weight) * out
    return out.reshape(B, T, H, F).astype(v.dtype)


def fused_attention_after(q, cache, k, v, within, length, implementation="cudnn"):
    """`attention_after` by a kernel of the GPU's, which reads one array of keys: the prefix is copied to each row."""
    B, T, P = *q.shape[:2], cache[0].shape[-3]
    odd = (P + T) % 2  # cuDNN wants an even number of keys where a gradient is taken
    before = jnp.broadcast_to(jnp.arange(P) < jnp.reshape(length, (-1, 1, 1)), (B, T, P))
    mask = jnp.pad(jnp.concatenate([before, within], -1), ((0, 0), (0, 0), (0, odd)))
    keys, values = (
        jnp.pad(
            jnp.concatenate([jnp.broadcast_to(a, (B, *a.shape[-3:])).astype(b.dtype), b], 1),
            ((0, 0), (0, odd), (0, 0), (0, 0)),
        )
        for a, b in zip(cache, (k, v), strict=True)
    )
    return jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None], implementation=implementation)


def _to_itself(q, k, v, within):
    """(out (B,T,G,R,F), normaliser (B,T,G,R,1)), float32, of the rows' own tokens; q (B,T,G,R,F) is scaled."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    B, G, F, R, parts = *k.shape[:2], k.shape[3], q.shape[3], []
    for rows in _blocks(q.shape[1]):
        queries = q[:, rows].transpose(0, 2, 1, 3, 4)  # (B,G,t,R,F)
        shape, seen = queries.shape[:4], slice(0, rows.stop)
        scores = _product("bhtf,bhsf->bhts", queries.reshape(B, G, -1, F), k[:, :, seen])
        mask = jnp.repeat(within[:, None, rows, seen], R, axis=2)
        out, normaliser = _softmax(jnp.where(mask, scores, MASKED), "bhts,bhsf->bhtf", v[:, :, seen])
        parts.append([a.reshape(*shape, a.shape[-1]).swapaxes(1, 2) for a in (out, normaliser)])
    return [jnp.concatenate(a, 1) for a in zip(*parts, strict=True)]


def _to_shared(q, keys, values, length):
    """As `_to_itself`, of a prefix (P,G,F) that all rows share: it is multiplied with the queries of all rows at once."""
    keys, values, parts = keys.swapaxes(0, 1), values.swapaxes(0, 1), []
    (B, T, G, _, F), hidden = q.shape, jnp.where(jnp.arange(keys.shape[1]) < length, 0.0, MASKED)
    for rows in _blocks(T, max(8, BLOCK // B)):
        queries = q[:, rows].transpose(2, 0, 1, 3, 4)  # (G,B,t,R,F)
        scores = _product("htf,hpf->htp", queries.reshape(G, -1, F), keys) + hidden
        pair = _softmax(scores, "htp,hpf->htf", values)
        parts.append([a.reshape(*queries.shape[:4], a.shape[-1]).transpose(1, 2, 0, 3, 4) for a in pair])
    return [jnp.concatenate(a, 1) for a in zip(*parts, strict=True)]


def _to_own(q, keys, values, length):
    """As `_to_itself`, of a prefix for each row (B,P,G,F)."""
    keys, values, parts = keys.swapaxes(1, 2), values.swapaxes(1, 2), []
    B, _, G, _, F = q.shape
    hidden = jnp.where(jnp.arange(keys.shape[2]) < length[:, None], 0.0, MASKED)[:, None, None]
    for rows in _blocks(q.shape[1]):
        queries = q[:, rows].transpose(0, 2, 1, 3, 4)  # (B,G,t,R,F)
        scores = _product("bhtf,bhpf->bhtp", queries.reshape(B, G, -1, F), keys) + hidden
        pair = _softmax(scores, "bhtp,bhpf->bhtf", values)
        parts.append([a.reshape(*queries.shape[:4], a.shape[-1]).swapaxes(1, 2) for a in pair])
    return [jnp.concatenate(a, 1) for a in zip(*parts, strict=True)]


def _softmax(scores, form: str, values):
    """(the shares' sum of the values, the scores' log-sum-exp with an axis of 1), float32."""
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    shares = jnp.exp(scores - top)
    total = shares.sum(-1, keepdims=True)
    return _product(form, shares.astype(values.dtype), values) / total, top + jnp.log(total)


def _scores(q, k, masked: bool):
    """(B,G,R*t,s) float32 of a block's queries, folded; of its own keys (`masked`) those that come later are hidden."""
    scores = _product("bhtf,bhsf->bhts", q, k)
    if not masked:
        return scores
    length = k.shape[2]
    later = jnp.arange(length)[None] > jnp.arange(length)[:, None]
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


def _parts(rows: slice) -> list[tuple[slice, bool]]:
    """(keys, masked): what the queries at `rows` read: all that came before, and themselves, which alone needs a mask."""
    before = [(slice(0, rows.start), False)] if rows.start else []
    return [*before, (rows, True)]


def _blocks(length: int, size: int = BLOCK) -> list[slice]:
    # No token at all (an empty prefix is read into a cache) is one block of none.
    return [slice(start, min(start + size, length)) for start in range(0, max(length, 1), size)]
