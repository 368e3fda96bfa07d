"""How a distiller begins: with the first layers of its backbone, and with vectors as large as the LLM's embeddings.

A backbone's last states are many times larger than token embeddings (SmolLM2: RMS 0.136 of the embeddings), and an LLM that reads
such vectors starts far from where it was trained. So what makes the vectors last, the projection or the final norm, is scaled
once, before the first step. Nothing of this is needed again: the scaled parameters are trained on and saved like all others.

Axes: B batch, N demonstration tokens, L vectors, D width.
"""

import dataclasses
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.models.families import Config, EncoderDecoderConfig

SAMPLE = 4_096  # embeddings whose RMS is measured
CONTEXTS, TOKENS = 4, 64  # random contexts, and the most tokens of each, whose vectors are measured
RESIDUAL_SHARE = 0.1  # of the embeddings' RMS, that what is added to them begins with (prefix.residual)
PROJECTION_START = {"kernel": jax.nn.initializers.normal(0.02), "bias": jax.nn.initializers.zeros}  # as the release
TANH_RMS = 0.5  # more than that tanh, which is bounded by 1, would have to be saturated for


def first_layers(config: Config, layers: int, where: str = "prefix.backbone") -> Config:
    """The settings of the model's first `layers` layers (of an encoder–decoder its encoder's); 0: all.

    Raises UserError where it has fewer.
    """
    if layers > config.layers:
        raise UserError(f"prefix.layers is {layers}, but {where} has {config.layers} layers: set it to that at most.")
    return dataclasses.replace(config, layers=layers or config.layers)


def embeddings_rms(llm) -> float:
    """The root mean square of the LLM's token embeddings, as it reads them, of `SAMPLE` random tokens; four digits."""
    tokens = np.random.default_rng(0).integers(0, llm.config.vocab_size, (1, SAMPLE), np.int32)
    return float(f"{_rms(llm.embed(llm.params, tokens)):.4g}")


def first_rms(prefix, llm) -> float:
    """The root mean square of the first vectors, by the section `prefix` of a run's config. What is added to embeddings begins small;
    a projection that makes it begins at zero, and the measure is that of the states which it reads."""
    if prefix.rms >= 0:
        return prefix.rms
    small = prefix.residual and prefix.projection != "linear"
    return float(f"{embeddings_rms(llm) * (RESIDUAL_SHARE if small else 1):.4g}")


def first_projection(width: int, llm_width: int, seed: int, zero: bool) -> dict:
    """{"kernel": (width,llm_width), "bias": (llm_width,)}, drawn as in the release, or zero (Zhang et al., 2023, ControlNet's zero
    convolution): what is added begins as nothing and grows by whole matrices, not by the scales of a norm alone."""
    shapes = {"kernel": (width, llm_width), "bias": (llm_width,)}
    if zero:
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return {name: PROJECTION_START[name](jax.random.key(seed + 1), shape) for name, shape in shapes.items()}


def with_rms(vectors_of: Callable, config: Config, params, projection: str, rms: float):
    """A distiller's parameters whose first vectors have the root mean square `rms`.

    Args:
        vectors_of: (params, tokens (B,N) int32, lengths (B,) int32) -> vectors (B,L,llm_width).
        config: settings of the backbone.
        params: of the distiller; what makes its vectors last is scaled.
        projection: "tanh", "linear" or "identity". Of tanh more than `TANH_RMS` is not asked: a warning says so.
    """
    if projection == "tanh" and rms > TANH_RMS:
        logging.warning(
            'Vectors behind a tanh cannot have the RMS %.3g of the LLM\'s embeddings: they begin with %.3g; prefix.projection="linear"'
            " has no such bound.",
            rms,
            TANH_RMS,
        )
        rms = TANH_RMS
    shape = CONTEXTS, min(TOKENS, config.window - len(params["placeholders"]))
    tokens, length = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32), np.full(*shape, np.int32)
    for _ in range(4):  # behind a tanh, or a norm with a bias, once is not enough
        found = _rms(vectors_of(params, tokens, length))
        if abs(found / rms - 1) < 0.01 or not found:
            break
        params = _scaled(config, params, projection, rms / found)
    return params


def _scaled(config: Config, params, projection: str, factor: float):
    """With the last linear part of the distiller, kernel and bias, times `factor`."""
    if projection != "identity":
        return {**params, "projection": jax.tree.map(lambda a: a * factor, params["projection"])}
    backbone = params["backbone"]
    if isinstance(config, EncoderDecoderConfig):
        return {**params, "backbone": {**backbone, "encoder": _scaled_norm(backbone["encoder"], factor)}}
    if "project_out" in backbone:
        last = {**backbone, "project_out": jax.tree.map(lambda a: a * factor, backbone["project_out"])}
        return {**params, "backbone": last}
    return {**params, "backbone": _scaled_norm(backbone, factor, config.norm_adds_one)}


def _scaled_norm(stack, factor: float, adds_one: bool = False):
    one = 1.0 if adds_one else 0.0
    norm = {
        name: (a + one) * factor - one if name == "scale" else a * factor for name, a in stack["final_norm"].items()
    }
    return {**stack, "final_norm": norm}


def _rms(x) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))
