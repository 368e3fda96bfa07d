"""GPT-2 (Radford et al., 2019): gpt2 to gpt2-xl, distilgpt2."""

from mend_jax.models.config import DecoderConfig
from mend_jax.models.tables import Entry, Table, check, stacked


def read(hf: dict) -> DecoderConfig:
    """The settings of a `config.json`."""
    expected = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    check(hf, expected)
    return DecoderConfig(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        width=hf["n_embd"],
        layers=hf["n_layer"],
        heads=hf["n_head"],
        mlp_width=hf.get("n_inner") or 4 * hf["n_embd"],
        max_positions=hf.get("n_positions") or hf["n_ctx"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tied_head=hf.get("tie_word_embeddings", True),  # GGUF files may hold the table twice, in other blocks
    )


def write(config: DecoderConfig) -> dict:
    """The inverse of `read`."""
    return {
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
    }


def table(config: DecoderConfig) -> Table:
    """GPT2Model's names. Conv1D kernels are (in, out) as ours: nothing is transposed."""
    D, M = config.width, config.mlp_width
    rows = {
        "ln_1.weight": Entry(("norm1", "scale"), (D,)),
        "ln_1.bias": Entry(("norm1", "bias"), (D,)),
        "attn.c_attn.weight": Entry(("qkv", "kernel"), (D, 3 * D)),
        "attn.c_attn.bias": Entry(("qkv", "bias"), (3 * D,)),
        "attn.c_proj.weight": Entry(("out", "kernel"), (D, D)),
        "attn.c_proj.bias": Entry(("out", "bias"), (D,)),
        "ln_2.weight": Entry(("norm2", "scale"), (D,)),
        "ln_2.bias": Entry(("norm2", "bias"), (D,)),
        "mlp.c_fc.weight": Entry(("up", "kernel"), (D, M)),
        "mlp.c_fc.bias": Entry(("up", "bias"), (M,)),
        "mlp.c_proj.weight": Entry(("down", "kernel"), (M, D)),
        "mlp.c_proj.bias": Entry(("down", "bias"), (D,)),
    }
    return {
        "wte.weight": Entry(("embed", "tokens"), (config.vocab_size, D)),
        "wpe.weight": Entry(("embed", "positions"), (config.max_positions, D)),
        **stacked("h", config.layers, rows),
        "ln_f.weight": Entry(("final_norm", "scale"), (D,)),
        "ln_f.bias": Entry(("final_norm", "bias"), (D,)),
    }


def derived(name: str) -> bool:
    """Masks that old files carry as buffers."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))
