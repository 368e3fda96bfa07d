"""A method is a prefix: what precedes a query, as embeddings with a length. The kinds of prefix are beside this file.

Axes: B batch, N demonstration tokens, L vectors, P prefix, Q query tokens, D width.
Every row is right-padded and has a length; rows are joined without gaps, so positions are 0, 1, 2, ...
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from mend_jax.models.decoder import Decoder, Wanted

QUERY_ROOM = 256  # positions of the LLM that vectors leave to a query, where their number depends on the demonstrations


def room_for_vectors(llm) -> int:
    """Positions of an LLM that vectors may take."""
    return max(1, llm.window - min(QUERY_ROOM, llm.window // 2))


@struct.dataclass
class Prefix:
    """What precedes a query, in the LLM's embedding space."""

    embeds: jax.Array  # (B,P,D) float32 or bfloat16; the reader converts them
    length: jax.Array  # (B,) int32, at most P


def join(prefix: Prefix, embeds, length=None):
    """Prefix rows, each followed without a gap by its row of `embeds` (B,Q,D): ((B,P+Q,D), length (B,))."""
    B, Q, D = embeds.shape
    if prefix.embeds.shape[1] == 0:
        return embeds, length
    room = jnp.zeros((B, Q, D), embeds.dtype)
    buffer = jnp.concatenate([prefix.embeds.astype(embeds.dtype), room], 1)
    joined = jax.vmap(lambda row, query, start: jax.lax.dynamic_update_slice(row, query, (start, 0)))(
        buffer, embeds, prefix.length
    )
    return joined, None if length is None else prefix.length + length


def continue_after(model: Decoder, params, prefix: Prefix, embeds):
    """The model's states at `embeds` (B,Q,D), read after the prefix: (B,Q,D)."""
    joined, _ = join(prefix, embeds)
    # Padding may exceed the window though no row does: it is cut off, and its states are returned as zeros.
    beyond = max(0, joined.shape[1] - model.config.window)
    states = model.apply({"params": params}, joined[:, : joined.shape[1] - beyond])
    states = jnp.pad(states, ((0, 0), (0, beyond), (0, 0)))
    return states if prefix.embeds.shape[1] == 0 else take_rows(states, prefix.length, embeds.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def vectors_after(model: Decoder, params, prefix: Prefix, embeds):
    """`continue_after` for a distiller, whose prefix is all that it reads but for few placeholders: of the last layer only what
    their states need is computed. Where a gradient is taken, all is: it needs one scan over the layers."""
    joined, _ = join(prefix, embeds)
    return model.apply(
        {"params": params}, joined[:, : model.config.window], wanted=Wanted(prefix.length, embeds.shape[1])
    )


def _with_gradient(model, *arguments):
    return jax.vjp(partial(continue_after, model), *arguments)


def _gradient(_, back, grad):
    return back(grad)


vectors_after.defvjp(_with_gradient, _gradient)


def take_rows(states, start, count: int):
    """`count` columns of (B,T,D), starting at each row's `start` (B,): (B,count,D)."""
    shape = count, states.shape[2]
    return jax.vmap(lambda row, first: jax.lax.dynamic_slice(row, (first, 0), shape))(states, start)


def last_embeds(prefix: Prefix, count: int, wanted=None):
    """The last embeddings of each row, one for each of `count` places: (B,P,D) -> (B,count,D).

    `wanted` (B,) int32 places are filled, the first ones (None: all), with as many of the row's last embeddings; where it has
    fewer, the first of these places are zero.
    """
    wanted = jnp.full_like(prefix.length, count) if wanted is None else wanted
    at = (prefix.length - wanted)[:, None] + jnp.arange(count)
    inside = (at >= 0) & (at < prefix.length[:, None])
    found = jnp.take_along_axis(prefix.embeds, jnp.clip(at, 0, prefix.embeds.shape[1] - 1)[..., None], 1)
    return jnp.where(inside[..., None], found, jnp.zeros((), found.dtype))
