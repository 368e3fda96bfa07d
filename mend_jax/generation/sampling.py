"""How a token is chosen from the LLM's predictions.

Axes: B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp


def choose(logits, keys, temperature, top_p):
    """A token (B,) int32 of each row of logits (B,V) float32, drawn with a key (B,) of each row.

    Args:
        temperature: () or (B,1): the logits are divided by it.
        top_p: () or (B,1) in (0, 1]: only the likeliest tokens are drawn, so many that their probabilities add up to it (nucleus
            sampling, Holtzman et al., 2020); the likeliest always is one.
    """
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=1)
    ranked = jnp.take_along_axis(logits, order, 1)
    shares = jax.nn.softmax(ranked, axis=1)
    before = jnp.cumsum(shares, axis=1) - shares  # the probability of all likelier ones
    ranked = jnp.where((before < top_p) | (jnp.arange(logits.shape[1]) == 0), ranked, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, drawn[:, None], 1)[:, 0].astype(jnp.int32)
