"""OPT (Zhang et al., 2022): opt-125m to opt-66b. opt-350m alone puts its norms after the residuals and projects
embeddings that are narrower than its layers, at both ends.

What stands before a query lives where the token table does: before `project_in`.
"""

from mend_jax.models.config import DecoderConfig
from mend_jax.models.tables import Entry, Table, check, linear, stacked

OFFSET = 2  # the position table begins with two rows that no token uses


def read(hf: dict) -> DecoderConfig:
    """The settings of a `config.json`."""
    check(hf, {"activation_function": ("relu",), "layer_norm_elementwise_affine": (True,)})
    norm_first, bias = hf.get("do_layer_norm_before", True), hf.get("enable_bias", True)
    return DecoderConfig(
        family="opt",
        vocab_size=hf["vocab_size"],
        width=hf.get("word_embed_proj_dim") or hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        mlp_width=hf["ffn_dim"],
        max_positions=hf["max_position_embeddings"],
        hidden_width=hf["hidden_size"],
        activation="relu",
        norm_first=norm_first,
        final_norm=norm_first and not hf.get("_remove_final_layer_norm", False),
        fused_qkv=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        position_offset=OFFSET,
        tied_head=hf.get("tie_word_embeddings", True),
    )


def write(config: DecoderConfig) -> dict:
    """The inverse of `read`."""
    return {
        "vocab_size": config.vocab_size,
        "word_embed_proj_dim": config.width,
        "hidden_size": config.hidden_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "ffn_dim": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "activation_function": "relu",
        "do_layer_norm_before": config.norm_first,
        "_remove_final_layer_norm": config.norm_first and not config.final_norm,
        "enable_bias": config.qkv_bias,
        "layer_norm_elementwise_affine": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
    }


def table(config: DecoderConfig) -> Table:
    """OPTModel's names."""
    D, W, M, bias = config.width, config.hidden_width, config.mlp_width, config.qkv_bias
    rows = {
        **linear("self_attn.k_proj", "k", W, W, bias),
        **linear("self_attn.v_proj", "v", W, W, bias),
        **linear("self_attn.q_proj", "q", W, W, bias),
        **linear("self_attn.out_proj", "out", W, W, bias),
        **_norm("self_attn_layer_norm", "norm1", W),
        **linear("fc1", "up", W, M, bias),
        **linear("fc2", "down", M, W, bias),
        **_norm("final_layer_norm", "norm2", W),
    }
    names = {
        "embed_tokens.weight": Entry(("embed", "tokens"), (config.vocab_size, D)),
        "embed_positions.weight": Entry(("embed", "positions"), (config.max_positions + OFFSET, W)),
    }
    if D != W:
        names |= linear("project_out", "project_out", W, D, bias=False)
        names |= linear("project_in", "project_in", D, W, bias=False)
    if config.final_norm:
        names |= _norm("final_layer_norm", "final_norm", W)
    names |= stacked("layers", config.layers, rows)
    return {f"decoder.{name}": entry for name, entry in names.items()}


def derived(name: str) -> bool:
    """Nothing that a file holds follows from the rest."""
    return False


def _norm(name: str, path: str, width: int) -> Table:
    return {f"{name}.weight": Entry((path, "scale"), (width,)), f"{name}.bias": Entry((path, "bias"), (width,))}
