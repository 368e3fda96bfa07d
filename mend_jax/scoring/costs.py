"""Costs by formula (FLOPs of matrix products, bytes of prefixes), and a counter of the products in any function.

Axes: B batch, N demonstration tokens, L vectors, P prefix, Q query tokens, T any sequence, S keys, D width,
W width inside the layers, V vocabulary. A FLOP is a multiplication or an addition: a product (m,k) x (k,n) counts 2mkn. Attention counts all pairs
of tokens, the masked ones too (the convention of model-FLOPs utilisation), but in a sliding layer no more keys than its window; norms, softmax, rotations and activations are left out, under
2% at these sizes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.extend import core

from mend_jax.models.families import Config, EncoderDecoderConfig, key_table
from mend_jax.models.int8 import SUMMED

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}  # dense bfloat16, from data sheets; keyed by a part of the device's name


class Products(NamedTuple):
    """FLOPs of one pass over a row, in two parts because their gradients cost differently."""

    linear: int  # products with weights
    attention: int  # queries with keys, and attention weights with values

    @property
    def forward(self) -> int:
        return self.linear + self.attention

    @property
    def input_gradient(self) -> int:
        """Backward through frozen weights: one product per linear layer, two per attention product."""
        return self.linear + 2 * self.attention

    @property
    def gradient(self) -> int:
        """Backward with trained weights."""
        return 2 * self.linear + 2 * self.attention


def reading(config: Config, tokens: int, keys: int | None = None) -> Products:
    """The model on one row of T tokens that attend to S keys each (None: to one another), without embedding and head.

    For an encoder–decoder this is the encoder, whose tokens always attend to one another.
    """
    if isinstance(config, EncoderDecoderConfig):
        return _encoder_decoder(config, tokens, 0)
    W, keys = config.hidden_width, tokens if keys is None else keys
    heads = 2 * (config.heads + config.kv_heads) * config.head_width  # queries and output, keys and values
    layer = W * heads + (3 if config.gated else 2) * W * config.mlp_width
    ends = 2 * config.width * W if config.width != W else 0  # embeddings and states are projected
    slide = sum(config.sliding)
    pairs = tokens * ((config.layers - slide) * keys + slide * min(keys, config.attention_span))
    attention = 4 * pairs * config.heads * config.head_width
    return Products(2 * tokens * (config.layers * layer + ends), attention)


def query_reading(llm: Config, before: int, query: int, targets: int, queries: int = 1) -> Products:
    """The LLM on `queries` queries after one prefix of `before` positions, which a decoder reads once for all; an encoder–decoder
    reads it with each, and decodes the query's last `targets` tokens."""
    if isinstance(llm, EncoderDecoderConfig):
        return Products(*(queries * part for part in _encoder_decoder(llm, before + query - targets, targets)))
    if queries == 1:
        return reading(llm, before + query)
    prefix, one = reading(llm, before), reading(llm, query, before + query)
    return Products(*(first + queries * part for first, part in zip(prefix, one, strict=True)))


def _encoder_decoder(config: EncoderDecoderConfig, tokens: int, targets: int) -> Products:
    """The encoder on S tokens and the decoder on Y; 0 leaves the decoder out."""
    D, W, S, Y = config.width, config.heads * config.head_width, tokens, targets
    mlp = (3 if config.gated else 2) * D * config.mlp_width
    linear = config.layers * 2 * S * (4 * D * W + mlp)
    attention = config.layers * 4 * S * S * W
    if Y:
        linear += config.decoder_layers * (2 * Y * (6 * D * W + mlp) + 2 * S * 2 * D * W)
        attention += config.decoder_layers * 4 * Y * (Y + S) * W
    return Products(linear, attention)


def head(config: Config, tokens: int) -> int:
    """FLOPs of the logits of T tokens."""
    return 2 * tokens * config.width * config.vocab_size


def projection(width: int, llm_width: int, vectors: int, by: str = "auto") -> int:
    """FLOPs of projecting L vectors to the LLM's width `by` a value of prefix.projection: 0 by "identity", and by "auto" where
    the widths are equal."""
    none = by == "identity" or (by == "auto" and width == llm_width)
    return 0 if none else 2 * vectors * width * llm_width


def step(
    llm: Config, distiller: Config, rows: int, demos: int, query: int, vectors: int, targets: int = 0, queries: int = 1
) -> dict[str, int]:
    """FLOPs of one train step (finetuning with L_distill and L_pred), by part; "total" is their sum.

    Forward and backward through the distiller's weights, forward and the vectors' gradient through the LLM, the teacher's
    forward, and the head at the query's tokens: both logits and one gradient. `targets` is the number of tokens of y; only an
    encoder–decoder treats them differently from x, and applies the head to them alone. `queries` of one row share its context.
    """
    own = reading(distiller, demos + vectors)
    student = query_reading(llm, vectors, query, targets, queries)
    predicted = targets if isinstance(llm, EncoderDecoderConfig) else query
    parts = {
        "distiller": own.forward + own.gradient + 3 * projection(distiller.width, llm.width, vectors),
        "student": student.forward + student.input_gradient,
        "teacher": query_reading(llm, demos, query, targets, queries).forward,
        "head": 3 * queries * head(llm, predicted),
    }
    parts = {name: rows * flops for name, flops in parts.items()}
    return parts | {"total": sum(parts.values())}


def release_step(
    llm: Config, distiller: Config, rows: int, demos: int, query: int, vectors: int, queries: int = 1, query_head=False
) -> int:
    """FLOPs of the same step with the head as in the public release: logits and the student's gradient at every position.

    The release has one query to a context. With several, which read the teacher's context once too, the student's vectors are
    rows of each query's sequence. `query_head`: as in `step`, the head is at the queries alone.
    """
    ours = step(llm, distiller, rows, demos, query, vectors, queries=queries)
    student = query_reading(llm, vectors, query, 0)
    body = ours["distiller"] + rows * queries * (student.forward + student.input_gradient) + ours["teacher"]
    if query_head:
        return body + ours["head"]
    read = demos + query if queries == 1 else queries * query
    return body + rows * (head(llm, read) + 2 * queries * head(llm, vectors + query))


def distil(distiller: Config, llm: Config, demos: int, vectors: int, by: str = "auto") -> int:
    """FLOPs of turning N demonstration tokens into L vectors; `by` is as in `projection`."""
    whole, keys = reading(distiller, demos + vectors).forward, demos + vectors
    if not isinstance(distiller, EncoderDecoderConfig) and distiller.sliding and distiller.sliding[-1]:
        keys = min(keys, distiller.attention_span)
    return whole - not_wanted(distiller, demos, demos * keys) + projection(distiller.width, llm.width, vectors, by)


def not_wanted(distiller: Config, demos: int, pairs: int) -> int:
    """FLOPs of `reading` that a distiller saves where no gradient is taken: at N demonstrations a decoder's last layer makes
    queries, keys and values alone, and leaves out so many pairs of tokens."""
    if isinstance(distiller, EncoderDecoderConfig):
        return 0
    W, heads = distiller.hidden_width, distiller.heads * distiller.head_width
    after = W * heads + (3 if distiller.gated else 2) * W * distiller.mlp_width
    after += W * distiller.width if distiller.width != W else 0  # states are projected
    return (2 * demos * after + 4 * pairs * heads) if distiller.layers else 0


def score_cached(llm: Config, prefix: int, query: int, options: list[int]) -> int:
    """FLOPs of scoring one item after a prefix whose keys and values are cached: x and all options in one pass.

    `options` are lengths in tokens. An option's last token is predicted, not read. An encoder–decoder reads the prefix
    with every item (the prefix's states depend on x), once for all options.
    """
    if isinstance(llm, EncoderDecoderConfig):
        targets = sum(options)
        return _encoder_decoder(llm, prefix + query, targets).forward + head(llm, targets)
    read = sum(options) - len(options)
    return reading(llm, query + read, prefix + query + read).forward + head(llm, 1 + read)


def score_rereading(llm: Config, prefix: int, query: int, options: list[int]) -> int:
    """FLOPs of scoring one item if the LLM reads the prefix and x again for every option, as in the paper and the release.

    The head is applied at the option's tokens only (the release applies it everywhere).
    """
    if isinstance(llm, EncoderDecoderConfig):
        return sum(_encoder_decoder(llm, prefix + query, n).forward + head(llm, n) for n in options)
    return sum(reading(llm, prefix + query + n - 1).forward + head(llm, n) for n in options)


def read_prefix(llm: Config, positions: int) -> int:
    """FLOPs of a prefix's keys and values, which are kept for all items; 0 for an encoder–decoder, which keeps embeddings."""
    return 0 if isinstance(llm, EncoderDecoderConfig) else reading(llm, positions).forward


def cache_bytes(llm: Config, positions: int, itemsize: int) -> int:
    """Bytes of the keys and values of one row; for an encoder–decoder, of the embeddings that it keeps instead."""
    if isinstance(llm, EncoderDecoderConfig):
        return vector_bytes(llm, positions, itemsize)
    return 2 * llm.layers * positions * llm.kv_heads * llm.head_width * itemsize


def vector_bytes(llm: Config, vectors: int, itemsize: int) -> int:
    """Bytes of L vectors in the LLM's embedding space."""
    return vectors * llm.width * itemsize


def weight_bytes(config: Config, itemsize: int, int8: bool = False) -> int:
    """Bytes of a model's weights; with `int8` its kernels and token tables are 8-bit, with scales (models/int8.py)."""
    total = 0
    for entry in key_table(config).values():
        size, summed = math.prod(entry.shape), SUMMED.get(entry.path[-1])
        total += itemsize * size if not int8 or summed is None else size + 4 * size // entry.our_shape[summed]
    return total


def count_products(function: Callable, *args, while_trips: int = 1) -> int:
    """FLOPs of all matrix products in `function(*args)`, counted in its jaxpr; a scan's body counts once per iteration.

    (XLA's own cost analysis counts a scan's body once in all.)

    Args:
        function: traced, not run; `args` may be `jax.ShapeDtypeStruct`s.
        while_trips: the number of iterations of each while loop, which a jaxpr does not contain.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, while_trips)


def peak_flops(device_kind: str) -> float | None:
    """The dense bfloat16 FLOP/s of a known GPU, found by its name; None for other devices."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_kind), None)


def _count(jaxpr, while_trips: int) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [_count(part, while_trips) for part in _jaxprs(equation.params.values())]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "scan":
            total += equation.params["length"] * sum(inner)
        elif name == "while":
            total += while_trips * sum(inner)
        elif name == "cond":
            total += max(inner)
        else:
            total += sum(inner)
    return total


def _jaxprs(values):
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)
