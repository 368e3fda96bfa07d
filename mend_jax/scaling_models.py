"""The models whose train step `scaling` computes: each LLM with its distiller's backbone, as their config.json say sizes."""

from mend_jax.benchmark_jax import Settings
from mend_jax.models.families import from_hf_config


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


SMOL = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
# LLM -> (it, its distiller's backbone): the paper's pairs (Tables 2, 5 and 6), and two of Llama's family whose
# tokenizers are the same.
MODELS = {
    "gpt2-large": (gpt2(1280, 36, 20), gpt2(768, 12, 12)),
    "gpt2-xl": (gpt2(1600, 48, 25), gpt2(768, 12, 12)),
    "opt-6.7b": (opt(4096, 32, 32), opt(768, 12, 12)),
    "t5-large-lm-adapt": (t5(1024, 24, 16, 2816), t5(512, 8, 6, 1024)),
    "flan-t5-xl": (t5(2048, 24, 32, 5120), t5(768, 12, 12, 2048)),
    "smollm2-1.7b": (llama(2048, 24, 32, 32, 8192, **SMOL), llama(576, 30, 9, 3, 1536, **SMOL)),
    "llama-2-7b": (llama(4096, 32, 32, 32, 11008), llama(2048, 22, 32, 4, 5632)),  # TinyLlama
}


def workload(name: str, rows: int, **fields) -> Settings:
    """A step of finetuning with the pair `name`: 900 + 124 tokens, 4 of them y, 100 vectors, bfloat16; `fields` differ."""
    llm, backbone = (from_hf_config(source) for source in MODELS[name])
    usual = {"dtype": "bfloat16", "demos": 900, "query": 124, "target": 4, "vectors": 100, "attention": "xla"}
    return Settings(llm, backbone.headless, rows=rows, **(usual | fields))
