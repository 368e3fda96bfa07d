"""What the heads of a frozen LLM attend to: induction heads, and what they look at before an answer.

An **induction head** (Olsson et al., 2022) looks, from a token that occurred before, at the token that followed it then. Its
**prefix matching score** is the mean share of its attention that goes there, in a random sequence that is read twice.

Axes: n tokens of a sequence, X tokens of an input, P prefix, S keys, H heads.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.llm.decoder_only import LLM
from mend_jax.models.attention_weights import attention_weights, queries_and_keys, spans
from mend_jax.models.programs import program
from mend_jax.prefixes.prefix import Prefix, join


def random_sequences(llm: LLM, count: int, length: int, seed: int) -> np.ndarray:
    """Tokens (count,n) int32, none of them special, n = `length` or as many as fit the LLM's window twice."""
    special = set(getattr(llm.tokenizer, "all_special_ids", []))
    words = np.array([token for token in range(llm.config.vocab_size) if token not in special])
    n = min(length, llm.window // 2)
    return np.random.default_rng(seed).choice(words, (count, n)).astype(np.int32)


def by_chance(n: int) -> float:
    """The prefix matching score of a head that attends to all tokens alike."""
    return float(np.mean(1 / np.arange(n + 1, 2 * n + 1)))


@program
def prefix_matching(llm: LLM, params, tokens):
    """(layers,H) scores of one sequence of tokens (n,), read twice."""
    n = len(tokens)
    twice = llm.embed(params, jnp.concatenate([tokens, tokens])[None])
    prefix = llm.begin(params, Prefix(twice, jnp.full((1,), 2 * n, jnp.int32)))
    queries, keys, _ = queries_and_keys(llm.model, params, prefix.embeds)
    at = llm.before + n + jnp.arange(n)

    def of_layer(layer):
        q, k, span = layer
        shares = attention_weights(q[:, at], k, at, span)[0]
        return shares[:, jnp.arange(n), at - n + 1].mean(-1)

    return jax.lax.map(of_layer, (queries, keys, spans(llm.config)))


@program
def attention_before_answer(llm: LLM, params, prefix: Prefix, inputs, length):
    """(layers,H,S) shares of the last token of an input (1,X) with `length` (1,), which predicts the answer's first token: to what
    stands before the prefix (`llm.before` columns), the prefix and the input, in this order without gaps, then padding."""
    joined, end = join(llm.begin(params, prefix), llm.embed(params, inputs), length)
    end = length if end is None else end
    queries, keys, _ = queries_and_keys(llm.model, params, joined)

    def of_layer(layer):
        q, k, span = layer
        row = jax.lax.dynamic_slice_in_dim(q, end[0] - 1, 1, 1)
        return attention_weights(row, k, end[:1] - 1, span)[0, :, 0]

    return jax.lax.map(of_layer, (queries, keys, spans(llm.config)))
