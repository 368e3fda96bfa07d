"""What a decoder's heads attend to: the weights that its fast attention never holds, from the same queries and keys.

Axes: B batch, H heads, G heads of keys, R = H/G, T tokens, t those that read, S those that are read, F width of a head.
"""

import jax
import jax.numpy as jnp

from mend_jax.models.attention import MASKED
from mend_jax.models.config import DecoderConfig
from mend_jax.models.decoder import Decoder


def queries_and_keys(model: Decoder, params, embeds):
    """Of each layer that reads embeddings (B,T,D): queries (layers,B,T,H,F) and keys (layers,B,T,G,F), turned by their positions;
    with them the states (B,T,D), which are those of the usual path."""
    reader = model.clone(keep_cache=True)
    (states, (keys, _)), kept = reader.apply({"params": params}, embeds, mutable=["intermediates"])
    (queries,) = kept["intermediates"]["layers"]["queries"]
    return queries, keys, states


def attention_weights(q, k, at, span):
    """Shares (B,H,t,S), float32, that sum to 1 over S: of tokens at the positions `at` (t,), whose queries are q (B,t,H,F), to the
    keys k (B,S,G,F) of positions 0 to S-1. They see themselves and what came before, the last `span` tokens alone."""
    B, t, H, F = q.shape
    G, S = k.shape[2], k.shape[1]
    folded = (q * F**-0.5).reshape(B, t, G, H // G, F)
    scores = jnp.einsum("btgrf,bsgf->bgrts", folded, k, preferred_element_type=jnp.float32)
    back = at[:, None] - jnp.arange(S)
    shares = jax.nn.softmax(jnp.where((back >= 0) & (back < span), scores, MASKED))
    return shares.reshape(B, H, t, S)


def spans(config: DecoderConfig):
    """(layers,) int32: how many tokens each layer's heads see."""
    sliding = jnp.asarray(config.sliding or (False,) * config.layers)
    return jnp.where(sliding, config.attention_span or 0, jnp.iinfo(jnp.int32).max).astype(jnp.int32)
