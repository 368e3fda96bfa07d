"""The Llama-like: llama (Llama 2 and 3, SmolLM2, TinyLlama), mistral, qwen2 (and 2.5), qwen3.

RMSNorm, rotary positions, grouped-query attention, gated SiLU, no bias. qwen2 has one on queries, keys and values;
qwen3 norms every head's queries and keys; all layers of mistral, and some of qwen, may see a sliding window alone.
"""

from mend_jax.cli.errors import UserError
from mend_jax.models.config import DecoderConfig
from mend_jax.models.rope import read_rope, write_rope
from mend_jax.models.tables import Entry, Table, check, linear, read_sliding, stacked, write_sliding

QWEN = ("qwen2", "qwen3")


def read(hf: dict) -> DecoderConfig:
    """The settings of a `config.json`."""
    check(hf, {"hidden_act": ("silu",)})
    family, heads = hf["model_type"], hf["num_attention_heads"]
    # Where one of these fields is no matter of the family, transformers does not read it either.
    bias = hf.get("attention_bias", False) if family in ("llama", "qwen3") else False
    head_width = hf.get("head_dim") or (128 if family == "qwen3" else 0)
    kinds, span = _sliding(hf)
    config = DecoderConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        mlp_width=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_width=head_width,
        activation="silu",
        gated=True,
        rms_norm=True,
        fused_qkv=False,
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=hf.get("mlp_bias", False) if family == "llama" else False,
        qk_norm=family == "qwen3",
        rope=read_rope(hf),
        sliding=kinds,
        attention_span=span,
        tied_head=hf.get("tie_word_embeddings", False),
    )
    if config.head_width % 2:
        raise UserError(f"config.json says heads of width {config.head_width}: rotary positions need an even width.")
    return config


def write(config: DecoderConfig) -> dict:
    """The inverse of `read`."""
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "head_dim": config.head_width,
        "attention_dropout": 0.0,
        **write_rope(config.rope),
    }
    if config.family in ("llama", "qwen3"):
        fields["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    elif config.family == "mistral":
        fields["sliding_window"] = config.attention_span or None
    else:
        fields |= {**write_sliding(config), "use_sliding_window": bool(config.sliding)}
    return fields


def table(config: DecoderConfig) -> Table:
    """LlamaModel's names, which are those of all its kin."""
    D, M, F = config.width, config.mlp_width, config.head_width
    rows = {
        "input_layernorm.weight": Entry(("norm1", "scale"), (D,)),
        **linear("self_attn.q_proj", "q", D, config.heads * F, config.qkv_bias),
        **linear("self_attn.k_proj", "k", D, config.kv_heads * F, config.qkv_bias),
        **linear("self_attn.v_proj", "v", D, config.kv_heads * F, config.qkv_bias),
        **linear("self_attn.o_proj", "out", config.heads * F, D, config.out_bias),
        "post_attention_layernorm.weight": Entry(("norm2", "scale"), (D,)),
        **linear("mlp.gate_proj", "gate", D, M, config.mlp_bias),
        **linear("mlp.up_proj", "up", D, M, config.mlp_bias),
        **linear("mlp.down_proj", "down", M, D, config.mlp_bias),
    }
    if config.qk_norm:
        rows["self_attn.q_norm.weight"] = Entry(("q_norm", "scale"), (F,))
        rows["self_attn.k_norm.weight"] = Entry(("k_norm", "scale"), (F,))
    return {
        "embed_tokens.weight": Entry(("embed", "tokens"), (config.vocab_size, D)),
        **stacked("layers", config.layers, rows),
        "norm.weight": Entry(("final_norm", "scale"), (D,)),
    }


def derived(name: str) -> bool:
    """Angles that old files carry as buffers."""
    return name.endswith(".rotary_emb.inv_freq")


def _sliding(hf: dict) -> tuple[tuple[bool, ...], int]:
    """`read_sliding`: of Mistral's layers all slide, of Qwen's those from `max_window_layers` on, or those that it lists."""
    layers = hf["num_hidden_layers"]
    if hf["model_type"] == "mistral":
        return read_sliding({name: value for name, value in hf.items() if name != "layer_types"}, [True] * layers)
    if hf["model_type"] in QWEN and hf.get("use_sliding_window", False):
        return read_sliding(hf, [i >= hf.get("max_window_layers", 28) for i in range(layers)])
    return (), 0
