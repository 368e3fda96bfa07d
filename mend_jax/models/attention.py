"""Causal self-attention in blocks: no (T,T) array, and no work on the masked half, or on what a sliding window leaves out.

Axes: B batch, H heads, G heads of keys and values, R = H/G, T tokens (t reads, s is read), F width of a head.
The scores of one block of queries fit in a CPU's cache. Only the output and each row's normaliser are kept for the
backward pass, which computes the shares again (as Dao et al., 2022, without a kernel of its own).
Heads that share keys and values are folded into the tokens that read, (B,H,t,F) -> (B,G,R*t,F): nothing is repeated.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mend_jax.models.stacks import keep

BLOCK = 128
MASKED = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal_attention(q, k, v, span=0, slides=None):
    """Softmax attention of every token to itself and those before it; scores and softmax in float32.

    q (B,T,H,F), k, v (B,T,G,F) of one dtype; head h reads those of g = h // R. Returns (B,T,H,F).
    With a `span` (int) a token sees the last `span` tokens alone, itself included; 0: all. `slides` () bool: whether the
    span counts; None: it does.
    """
    return _forward(q, k, v, span, slides)[0]


def _forward(q, k, v, span, slides):
    q, k, v = (a.swapaxes(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    out, normaliser = _as_it_slides(_read, span, slides, q.shape[2], q, k, v)
    out = keep(out, "attended")
    return out, (q, k, v, slides, out, checkpoint_name(normaliser, "normaliser"))


def _as_it_slides(function, span, slides, length, *arrays):
    """function(span, *arrays), or with no span where `slides` says so; a span that hides nothing of `length` tokens is none."""
    if span >= length:
        span = 0
    if span and slides is not None:
        return jax.lax.cond(slides, functools.partial(function, span), functools.partial(function, 0), *arrays)
    return function(span, *arrays)


def _read(span, q, k, v):
    """(out (B,T,H,F), normaliser (B,H,T,1)) of q (B,H,T,F), scaled, and k, v (B,G,T,F)."""
    G, outputs, normalisers = k.shape[1], [], []
    for rows in _blocks(q.shape[2]):
        q_rows, parts = _fold(q[:, :, rows], G), _parts(rows, span)
        scores = [_scores(q_rows, k[:, :, seen], rows, seen, span, masked) for seen, masked in parts]
        top = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True, initial=MASKED) for part in scores])
        shares = [jnp.exp(part - top) for part in scores]
        total = sum(part.sum(-1, keepdims=True) for part in shares)
        values = (v[:, :, seen] for seen, _ in parts)
        out = sum(_product("bhts,bhsf->bhtf", a.astype(v.dtype), b) for a, b in zip(shares, values, strict=True))
        outputs.append(_unfold((out / total).astype(v.dtype), q.shape[1]))
        normalisers.append(_unfold(top + jnp.log(total), q.shape[1]))
    return jnp.concatenate(outputs, 2).swapaxes(1, 2), jnp.concatenate(normalisers, 2)


def _backward(span, kept, out_grad):
    q, k, v, slides, *of_out = kept
    return *_as_it_slides(_gradients, span, slides, q.shape[2], q, k, v, *of_out, out_grad), None


def _gradients(span, q, k, v, out, normaliser, out_grad):
    """Those of q, k, v as `causal_attention` takes them."""
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
        for seen, masked in _parts(rows, span):
            keys, values = k[:, :, seen], v[:, :, seen]
            shares = jnp.exp(_scores(q_rows, keys, rows, seen, span, masked) - norm_rows)
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


def fused_causal_attention(q, k, v, span=0, slides=None, implementation="cudnn"):
    """`causal_attention` by a kernel of the GPU's."""

    def attend(span, q, k, v):
        window = (span - 1, 0) if span else None
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=window, implementation=implementation
        )

    return _as_it_slides(attend, span, slides, q.shape[1], q, k, v)


class Reach(NamedTuple):
    """How far the tokens of rows behind a prefix see, where they slide."""

    at: jax.Array  # (B,T) int32: their positions, counted from the prefix's first
    span: jax.Array | int  # they see the last so many tokens alone, themselves included


def attention_after(q, cache, k, v, within, length, reach: Reach | None = None):
    """Softmax attention to a prefix and to the rows themselves: each part in blocks, joined by their normalisers, so that
    no (B,H,T,P+T) array goes through memory. (keys, values) of the prefix are each (P,G,F), shared by all rows, or (B,P,G,F).

    q (B,T,H,F), k, v (B,T,G,F), within (B,T,T) bool: what tokens see of their own row, themselves at least and none that
    comes later; length () or (B,): the columns of the prefix that count. Returns (B,T,H,F); scores and softmax in float32.
    """
    (B, T, H, F), G, P = q.shape, k.shape[2], cache[0].shape[-3]
    q = (q * F**-0.5).reshape(B, T, G, H // G, F)
    out, normaliser = _to_itself(q, k, v, _within_reach(within, reach))
    if P:
        before, of_prefix = (_to_shared if cache[0].ndim == 3 else _to_own)(q, *cache, length, reach)
        weight = jax.nn.sigmoid(of_prefix - normaliser)  # of the prefix among all that is seen
        out = weight * before + (1 - weight) * out
    return out.reshape(B, T, H, F).astype(v.dtype)


def fused_attention_after(q, cache, k, v, within, length, reach: Reach | None = None, implementation="cudnn"):
    """`attention_after` by a kernel of the GPU's, which reads one array of keys: the prefix is copied to each row."""
    B, T, P = *q.shape[:2], cache[0].shape[-3]
    odd = (P + T) % 2  # cuDNN wants an even number of keys where a gradient is taken
    before = jnp.broadcast_to(jnp.arange(P) < jnp.reshape(length, (-1, 1, 1)), (B, T, P))
    if reach is not None:
        before &= ~_beyond(reach, P)
    mask = jnp.pad(jnp.concatenate([before, _within_reach(within, reach)], -1), ((0, 0), (0, 0), (0, odd)))
    keys, values = (
        jnp.pad(
            jnp.concatenate([jnp.broadcast_to(a, (B, *a.shape[-3:])).astype(b.dtype), b], 1),
            ((0, 0), (0, odd), (0, 0), (0, 0)),
        )
        for a, b in zip(cache, (k, v), strict=True)
    )
    return jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None], implementation=implementation)


def _beyond(reach: Reach, columns: int):
    """(B,T,P) bool: the columns of a prefix that are too far back."""
    return reach.at[..., None] - jnp.arange(columns) >= reach.span


def _within_reach(within, reach: Reach | None):
    """`within` (B,T,T) without the tokens that are too far back."""
    return within if reach is None else within & (reach.at[:, :, None] - reach.at[:, None, :] < reach.span)


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


def _to_shared(q, keys, values, length, reach):
    """As `_to_itself`, of a prefix (P,G,F) that all rows share: it is multiplied with the queries of all rows at once."""
    (B, T, G, R, F), P = q.shape, len(keys)
    real, beyond = jnp.arange(P) < length, None if reach is None else _beyond(reach, P)
    keys, values, parts = _without_padding(keys, real[:, None, None]).swapaxes(0, 1), values.swapaxes(0, 1), []
    for rows in _blocks(T, max(8, BLOCK // B)):
        queries = q[:, rows].transpose(2, 0, 1, 3, 4)  # (G,B,t,R,F)
        scores = _product("htf,hpf->htp", queries.reshape(G, -1, F), keys)
        seen = real
        if beyond is not None:
            seen = real & ~jnp.repeat(beyond[:, rows], R, axis=1).reshape(1, -1, P)
            scores = jnp.where(seen, scores, MASKED)
        pair = _softmax(scores, "htp,hpf->htf", values, seen)
        parts.append([a.reshape(*queries.shape[:4], a.shape[-1]).transpose(1, 2, 0, 3, 4) for a in pair])
    return [jnp.concatenate(a, 1) for a in zip(*parts, strict=True)]


def _to_own(q, keys, values, length, reach):
    """As `_to_itself`, of a prefix for each row (B,P,G,F)."""
    (B, _, G, R, F), P = q.shape, keys.shape[1]
    real, beyond = jnp.arange(P) < length[:, None], None if reach is None else _beyond(reach, P)
    keys, values, parts = _without_padding(keys, real[..., None, None]).swapaxes(1, 2), values.swapaxes(1, 2), []
    real = real[:, None, None]
    for rows in _blocks(q.shape[1]):
        queries = q[:, rows].transpose(0, 2, 1, 3, 4)  # (B,G,t,R,F)
        scores = _product("bhtf,bhpf->bhtp", queries.reshape(B, G, -1, F), keys)
        seen = real
        if beyond is not None:
            seen = real & ~jnp.repeat(beyond[:, None, rows], R, axis=2)
            scores = jnp.where(seen, scores, MASKED)
        pair = _softmax(scores, "bhtp,bhpf->bhtf", values, seen)
        parts.append([a.reshape(*queries.shape[:4], a.shape[-1]).swapaxes(1, 2) for a in pair])
    return [jnp.concatenate(a, 1) for a in zip(*parts, strict=True)]


def _without_padding(keys, real):
    """Keys of padding replaced by the first key: a score that is there anyway cannot be the largest, so that none is to be masked
    before the exponential, which would cost a pass through memory."""
    return jnp.where(real, keys, keys[..., :1, :, :])


def _softmax(scores, form: str, values, real=None):
    """(the shares' sum of the values, the scores' log-sum-exp with an axis of 1), float32; 0 and MASKED where nothing is `real`."""
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    shares = jnp.exp(scores - top)
    if real is None:
        total = shares.sum(-1, keepdims=True)
        return _product(form, shares.astype(values.dtype), values) / total, top + jnp.log(total)
    shares *= real
    some = real.any(-1, keepdims=True)
    total = jnp.where(some, shares.sum(-1, keepdims=True), 1)
    normaliser = jnp.where(some, top + jnp.log(total), MASKED)
    return _product(form, shares.astype(values.dtype), values) / total, normaliser


def _scores(q, k, rows: slice, seen: slice, span: int, masked: bool):
    """(B,G,R*t,s) float32 of the queries at `rows`, folded; of `masked` keys those that come later, or are too far back, are
    hidden."""
    scores = _product("bhtf,bhsf->bhts", q, k)
    if not masked:
        return scores
    count = rows.stop - rows.start
    hidden = _hidden(rows, seen, span)
    if q.shape[2] > count:
        hidden = jnp.tile(hidden, (q.shape[2] // count, 1))
    return jnp.where(hidden, MASKED, scores)


def _hidden(rows: slice, seen: slice, span: int):
    """(t,s) bool: which keys at `seen` a query at `rows` does not see."""
    ahead = rows.start - seen.start
    read, own = jnp.arange(seen.stop - seen.start)[None], jnp.arange(ahead, ahead + rows.stop - rows.start)[:, None]
    later = read > own
    return later | (own - read >= span) if span and ahead + rows.stop - rows.start > span else later


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


def _parts(rows: slice, span: int) -> list[tuple[slice, bool]]:
    """(keys, masked): what the queries at `rows` read: what came before, and themselves, which needs a mask.

    With a span they read nothing before what the first of them sees, and what not all of them see needs a mask too.
    """
    first = max(0, rows.start - span + 1) if span else 0
    seen_by_all = min(max(first, rows.stop - span), rows.start) if span else 0
    before = [(slice(first, seen_by_all), True), (slice(seen_by_all, rows.start), False)]
    return [*(part for part in before if part[0].start < part[0].stop), (rows, True)]


def _blocks(length: int, size: int = BLOCK) -> list[slice]:
    # No token at all (an empty prefix is read into a cache) is one block of none.
    return [slice(start, min(start + size, length)) for start in range(0, max(length, 1), size)]
