"""Gemma 3 (Gemma Team, 2025): gemma3_text, and the text part of gemma3, which sees images too.

As the Llama-like, with GELU, a norm before and one after attention and MLP, norms of every head's queries and keys, norms
that scale by 1 + w, and embeddings that are scaled by the root of the width. Five of six layers see a sliding window alone,
and have rotary positions of their own.
"""

from mend_jax.cli.errors import UserError
from mend_jax.models.config import DecoderConfig
from mend_jax.models.rope import read_rope, write_rope
from mend_jax.models.tables import Entry, Table, check, linear, read_sliding, stacked, write_sliding

OF_IMAGES = ("vision_tower.", "multi_modal_projector.")


def read(hf: dict) -> DecoderConfig:
    """The settings of a `config.json`; fields that it leaves out have transformers' values, as in the hub's files."""
    if hf["model_type"] == "gemma3":
        hf = {
            "tie_word_embeddings": hf.get("tie_word_embeddings", True),
            **hf["text_config"],
            "model_type": "gemma3_text",
        }
    expected = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
        "partial_rotary_factor": (1.0, None),
        "use_bidirectional_attention": (False, None),
    }
    check(hf, expected)
    full, sliding = _ropes(hf)
    kinds, span = read_sliding(hf, _pattern(hf))
    config = DecoderConfig(
        family="gemma3_text",
        vocab_size=hf.get("vocab_size", 262_208),
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf.get("num_attention_heads", 8),
        mlp_width=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 131_072),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        kv_heads=hf.get("num_key_value_heads", 4),
        head_width=hf.get("head_dim", 256),
        activation="gelu_tanh",
        gated=True,
        rms_norm=True,
        norm_adds_one=True,
        post_norms=True,
        fused_qkv=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=True,
        rope=full,
        sliding=kinds,
        attention_span=span,
        sliding_rope=sliding,
        score_width=hf.get("query_pre_attn_scalar", 256),
        embed_scale=hf["hidden_size"] ** 0.5,
        tied_head=hf.get("tie_word_embeddings", True),
    )
    if config.head_width % 2:
        raise UserError(f"config.json says heads of width {config.head_width}: rotary positions need an even width.")
    return config


def write(config: DecoderConfig) -> dict:
    """The inverse of `read`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "query_pre_attn_scalar": config.score_width,
        **write_sliding(config),
        **write_rope(config.rope),
        "rope_local_base_freq": config.sliding_rope.theta,
    }


def table(config: DecoderConfig) -> Table:
    """Gemma3TextModel's names."""
    D, M, F = config.width, config.mlp_width, config.head_width
    rows = {
        "self_attn.q_norm.weight": Entry(("q_norm", "scale"), (F,)),
        "self_attn.k_norm.weight": Entry(("k_norm", "scale"), (F,)),
        **linear("self_attn.q_proj", "q", D, config.heads * F, False),
        **linear("self_attn.k_proj", "k", D, config.kv_heads * F, False),
        **linear("self_attn.v_proj", "v", D, config.kv_heads * F, False),
        **linear("self_attn.o_proj", "out", config.heads * F, D, False),
        **linear("mlp.gate_proj", "gate", D, M, False),
        **linear("mlp.up_proj", "up", D, M, False),
        **linear("mlp.down_proj", "down", M, D, False),
        "input_layernorm.weight": Entry(("norm1", "scale"), (D,)),
        "post_attention_layernorm.weight": Entry(("out_norm", "scale"), (D,)),
        "pre_feedforward_layernorm.weight": Entry(("norm2", "scale"), (D,)),
        "post_feedforward_layernorm.weight": Entry(("down_norm", "scale"), (D,)),
    }
    return {
        "embed_tokens.weight": Entry(("embed", "tokens"), (config.vocab_size, D)),
        **stacked("layers", config.layers, rows),
        "norm.weight": Entry(("final_norm", "scale"), (D,)),
    }


def derived(name: str) -> bool:
    """What reads images, which no text needs."""
    return name.startswith(OF_IMAGES)


def _pattern(hf: dict) -> list[bool]:
    """Of each layer, whether it slides, where config.json does not list them: all but every sixth."""
    every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    return [bool((i + 1) % every) for i in range(hf["num_hidden_layers"])]


def _ropes(hf: dict):
    """(of the full layers, of the sliding ones), as config.json has them since transformers 5, or before."""
    both = hf.get("rope_parameters") or {}
    full = {
        "rope_theta": hf.get("rope_theta") or 1e6,
        **(both.get("full_attention") or {}),
        **(hf.get("rope_scaling") or {}),
    }
    sliding = {"rope_theta": hf.get("rope_local_base_freq") or 1e4, **(both.get("sliding_attention") or {})}
    longest = {"max_position_embeddings": hf.get("max_position_embeddings", 131_072)}
    ropes = [read_rope(longest | {"rope_parameters": fields}) for fields in (full, sliding)]
    if ropes[1].kind != "default":
        raise UserError(
            f"config.json asks for RoPE scaling {ropes[1].kind!r} in sliding layers, which is not supported."
        )
    return ropes
