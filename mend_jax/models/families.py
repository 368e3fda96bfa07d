"""Model families: a Hugging Face `config.json` read as our settings, and written back.

A family is a function from its `config.json` to `DecoderConfig`; its key table is in `weights.py`.
"""

import dataclasses
import json
from pathlib import Path

from mend_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of one decoder-only transformer; hashable, so that it may be a static argument."""

    family: str  # Hugging Face's `model_type`
    vocab_size: int
    width: int  # D
    layers: int
    heads: int
    mlp_width: int
    max_positions: int  # the window: tokens and vectors the model can read at once
    norm_eps: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def from_hf_config(source: dict | str | Path) -> DecoderConfig:
    """Settings of the model described by a `config.json`: its content, its path, or its folder's path."""
    if not isinstance(source, dict):
        source = _read_json(Path(source))
    model_type = source.get("model_type")
    if model_type not in _READERS:
        raise UserError(f"model_type {model_type!r} is not supported: use one of {', '.join(sorted(_READERS))}.")
    try:
        config = _READERS[model_type](source)
    except KeyError as missing:
        raise UserError(f"config.json of a {model_type} model lacks the field {missing}: take the model's own file.") from None
    if config.width % config.heads:
        raise UserError(f"config.json says width {config.width} and {config.heads} heads: the width must be a multiple.")
    return config


def to_hf_config(config: DecoderConfig) -> dict:
    """The inverse of `from_hf_config`: a `config.json` that transformers reads."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": None if config.mlp_width == 4 * config.width else config.mlp_width,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": min(50256, config.vocab_size - 1),
        "eos_token_id": min(50256, config.vocab_size - 1),
        "tie_word_embeddings": True,
    }


def _read_gpt2(hf: dict) -> DecoderConfig:
    # What would change the arithmetic must be what the decoder computes, else parity is lost without a word.
    expected = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    }
    for field, allowed in expected.items():
        if hf.get(field, allowed[0]) not in allowed:
            raise UserError(f"config.json says {field}={hf[field]!r}, which is not supported for gpt2: only {allowed[0]!r}.")
    return DecoderConfig(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        width=hf["n_embd"],
        layers=hf["n_layer"],
        heads=hf["n_head"],
        mlp_width=hf.get("n_inner") or 4 * hf["n_embd"],
        max_positions=hf.get("n_positions") or hf["n_ctx"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
    )


_READERS = {"gpt2": _read_gpt2}


def _read_json(path: Path) -> dict:
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is not there: a Hugging Face model folder holds a config.json.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON (line {error.lineno}: {error.msg}): copy the model's folder again.") from error
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text: copy the model's folder again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object but {content!r:.40}: copy the model's folder again.")
    return content
