"""The config.json of real models, as far as it says their sizes, and their published numbers of parameters."""


def _opt(layers, width, heads, embed=None, **rest):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "ffn_dim": 4 * width}
    fixed = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048}
    return fixed | sizes | {"word_embed_proj_dim": embed or width} | rest


def _llama(model_type, vocab, layers, width, mlp, heads, kv_heads, **rest):
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        **rest,
    }


def _gemma3(layers, width, mlp, heads, kv_heads, **rest):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp}
    return {"model_type": "gemma3_text", "num_attention_heads": heads, "num_key_value_heads": kv_heads} | sizes | rest


TIED = {"tie_word_embeddings": True}
QWEN3 = {"head_dim": 128}
SIZES = {
    "opt-125m": (_opt(12, 768, 12), 125_239_296),
    "opt-350m": (_opt(24, 1024, 16, embed=512, do_layer_norm_before=False), 331_196_416),
    "opt-1.3b": (_opt(24, 2048, 32), 1_315_758_080),
    "opt-6.7b": (_opt(32, 4096, 32), 6_658_473_984),
    "Llama-2-7b": (_llama("llama", 32000, 32, 4096, 11008, 32, 32), 6_738_415_616),
    "Llama-2-13b": (_llama("llama", 32000, 40, 5120, 13824, 40, 40), 13_015_864_320),
    "Meta-Llama-3-8B": (_llama("llama", 128256, 32, 4096, 14336, 32, 8), 8_030_261_248),
    "Llama-3.2-1B": (_llama("llama", 128256, 16, 2048, 8192, 32, 8, head_dim=64, **TIED), 1_235_814_400),
    "Mistral-7B-v0.1": (_llama("mistral", 32000, 32, 4096, 14336, 32, 8), 7_241_732_096),
    "Mistral-7B-v0.3": (_llama("mistral", 32768, 32, 4096, 14336, 32, 8, sliding_window=None), 7_248_023_552),
    "Qwen2-0.5B": (_llama("qwen2", 151936, 24, 896, 4864, 14, 2, **TIED), 494_032_768),
    "Qwen2.5-1.5B": (_llama("qwen2", 151936, 28, 1536, 8960, 12, 2, **TIED), 1_543_714_304),
    "Qwen2.5-7B": (_llama("qwen2", 152064, 28, 3584, 18944, 28, 4), 7_615_616_512),
    "Qwen3-0.6B": (_llama("qwen3", 151936, 28, 1024, 3072, 16, 8, **QWEN3, **TIED), 596_049_920),
    "Qwen3-8B": (_llama("qwen3", 151936, 36, 4096, 12288, 32, 8, **QWEN3), 8_190_735_360),
    "Gemma-3-270m": (_gemma3(18, 640, 2048, 4, 1, vocab_size=262144), 268_098_176),
    "Gemma-3-1b": (_gemma3(26, 1152, 6912, 4, 1, vocab_size=262144), 999_885_952),
    "SmolLM2-135M": (_llama("llama", 49152, 30, 576, 1536, 9, 3, **TIED), 134_515_008),
    "SmolLM2-360M": (_llama("llama", 49152, 32, 960, 2560, 15, 5, **TIED), 361_821_120),
    "SmolLM2-1.7B": (_llama("llama", 49152, 24, 2048, 8192, 32, 32, **TIED), 1_711_376_384),
    "TinyLlama-1.1B": (_llama("llama", 32000, 22, 2048, 5632, 32, 4), 1_100_048_384),
}
