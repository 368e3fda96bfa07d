"""Rotary positions (Su et al., 2021) and the ways to stretch them: the formulas of transformers' `rope_parameters`.

Axes: B batch, T tokens, H heads, F width of a head.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError

_ORIGINAL = "original_max_position_embeddings"


class Rope(NamedTuple):
    """The rotary positions of a model; hashable."""

    theta: float
    kind: str = "default"  # a key of KINDS
    settings: tuple[tuple[str, Any], ...] = ()  # of its kind, as config.json has them, sorted by name


def read_rope(hf: Mapping) -> Rope:
    """The rotary positions that a config.json describes: `rope_parameters`, or the older `rope_theta`, `rope_scaling`.

    Raises:
        UserError: a kind of scaling that is not supported, or one that lacks a field.
    """
    fields = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    theta = fields.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    partial = fields.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
    if kind not in KINDS:
        raise UserError(f"config.json asks for RoPE scaling {kind!r}, which is not supported: only {', '.join(KINDS)}.")
    if partial != 1:
        raise UserError(f"config.json says partial_rotary_factor={partial}, which is not supported: only 1.0.")
    _, needed, optional = KINDS[kind]
    if _ORIGINAL in needed:
        fields.setdefault(_ORIGINAL, hf["max_position_embeddings"])
        fields[_ORIGINAL] = hf.get(_ORIGINAL) or fields[_ORIGINAL]
    missing = [name for name in needed if fields.get(name) is None]
    if missing:
        raise UserError(f"config.json's RoPE scaling {kind!r} lacks {missing[0]}: take the model's own file.")
    kept = {name: value for name, value in fields.items() if name in (*needed, *optional) and value is not None}
    return Rope(float(theta), kind, tuple(sorted(kept.items())))


def write_rope(rope: Rope) -> dict:
    """The inverse of `read_rope`, in the form that every version of transformers reads."""
    scaling = None if rope.kind == "default" else {"rope_type": rope.kind, **dict(rope.settings)}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def frequencies(rope: Rope, head_width: int) -> tuple[np.ndarray, float]:
    """(angle of one position (F/2,) float32, factor of the rotated vectors)."""
    steps = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return KINDS[rope.kind][0](np.float32(1) / np.float32(rope.theta) ** steps, rope, dict(rope.settings))


def rotations(rope: Rope, head_width: int, positions: jax.Array):
    """(cos, sin), each (B,T,1,F/2) float32, of positions (B,T)."""
    angle, factor = frequencies(rope, head_width)
    angles = positions.astype(jnp.float32)[..., None, None] * angle
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x, cos, sin):
    """(B,T,H,F) queries or keys turned by their positions: the two halves of a head are the pairs' coordinates."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _default(angle, rope, s):
    return angle, 1.0


def _linear(angle, rope, s):
    return angle / np.float32(s["factor"]), 1.0


def _llama3(angle, rope, s):
    """Long waves are slowed down by `factor`, short ones kept, those between are mixed."""
    turns = s[_ORIGINAL] * angle / (2 * math.pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * angle / s["factor"] + kept * angle).astype(np.float32), 1.0


def _yarn(angle, rope, s):
    """Peng et al., 2023: as llama3 with a ramp over dimensions, and larger scores."""
    factor, F = s["factor"], 2 * len(angle)

    def dimension(turns):  # whose wave turns so often within the original window
        return F * math.log(s[_ORIGINAL] / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(s.get("beta_fast") or 32), dimension(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, F - 1)
    slowed = np.clip((np.arange(F // 2) - low) / ((high - low) or 0.001), 0, 1)
    scale = s.get("attention_factor")
    if scale is None:
        mscale, mscale_all = s.get("mscale"), s.get("mscale_all_dim")
        both = mscale and mscale_all
        scale = _mscale(factor, mscale) / _mscale(factor, mscale_all) if both else _mscale(factor, 1)
    return (angle / factor * slowed + angle * (1 - slowed)).astype(np.float32), float(scale)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


# kind: (its formula, fields it needs, fields it may have). "dynamic" begins to stretch beyond max_position_embeddings,
# which is the window here: within it, it is the default. (Further on angles would depend on the sequence's length, and
# no prefix could be shared by queries of different lengths.)
KINDS: dict[str, tuple[Callable, tuple[str, ...], tuple[str, ...]]] = {
    "default": (_default, (), ()),
    "linear": (_linear, ("factor",), ()),
    "dynamic": (_default, ("factor",), ()),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (
        _yarn,
        ("factor", _ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
