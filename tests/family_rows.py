"""The decoder-only families of docs/models.md on small random weights, with the quirks of the real models: a row each."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_training import write_tokenizer

from mend_jax.llm.decoder_only import load_llm
from mend_jax.models.families import from_hf_config
from mend_jax.models.folders import init_params, save_model

GPT2 = {
    "model_type": "gpt2",
    "n_embd": 24,
    "n_inner": 40,
    "n_head": 3,
    "n_layer": 2,
    "n_positions": 64,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 24,
    "ffn_dim": 40,
    "num_attention_heads": 3,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
}
QWEN = LLAMA | {"num_key_value_heads": 2, "rms_norm_eps": 1e-6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "query_pre_attn_scalar": 12,
    "sliding_window": 7,
    "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rms_norm_eps": 1e-6,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROWS = {  # name: what its config.json says beside COMMON
    "gpt2": GPT2,
    "opt-125m": OPT,
    "opt-350m": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "llama-2": LLAMA | {"num_key_value_heads": 4},
    "llama-3": LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "mistral": LLAMA | {"model_type": "mistral", "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 9},
    "qwen2": QWEN | {"model_type": "qwen2", "tie_word_embeddings": True, "rope_scaling": YARN, "rope_theta": 1e6},
    "qwen2-sliding": QWEN
    | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6},
    "qwen3": QWEN | {"model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
    "gemma3": GEMMA | {"tie_word_embeddings": True},
    "tinyllama": LLAMA | {"num_key_value_heads": 2},
    "smollm2": LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
}
COMMON = {"vocab_size": 61, "num_hidden_layers": 2, "max_position_embeddings": 64}
IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}


def torch_model(fields, seed=0):
    """The PyTorch model of a config.json's fields, with random biases and norms too: fresh ones would hide mistakes."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**(COMMON | IDS | fields))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def make_row(name, folder):
    """One family: its PyTorch model, the folder that transformers saves, our LLM of it."""
    model = torch_model(ROWS[name])
    model.save_pretrained(folder)
    return SimpleNamespace(name=name, torch=model, folder=folder, llm=load_llm(folder))


def smaller(fields):
    """The fields of a model of the same family that is less wide: a distiller's backbone."""
    width, heads = ("n_embd", "n_head") if fields["model_type"] == "gpt2" else ("hidden_size", "num_attention_heads")
    return fields | {width: 4 * fields[heads]}


def save_random(folder, fields, seed):
    """A folder of a model with random weights, and a tokenizer of the words of data_files.py."""
    folder.mkdir()
    config, rng = from_hf_config(fields), np.random.default_rng(seed)
    ones = not getattr(config, "norm_adds_one", False)  # the scales of norms are about 1

    def draw(path, leaf):
        return 0.15 * rng.standard_normal(leaf.shape, np.float32) + np.float32(ones and path[-1].key == "scale")

    params = jax.tree.map_with_path(draw, jax.eval_shape(lambda: init_params(config, 0)))
    if config.family == "qwen2":
        _write_letters(folder)
    else:
        write_tokenizer(folder, [f"w{i}" for i in range(config.vocab_size)])
    save_model(folder, config, params, folder)
    return str(folder)


def _write_letters(folder):
    """Two or three tokens a word: whatever lies in a qwen2 folder, transformers reads it as Qwen2's own kind."""
    from tokenizers import Tokenizer, models

    pieces = ["<|endoftext|>", "Ġ", "w", *"0123456789", "Ġw"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    Tokenizer(models.BPE(vocab, [("Ġ", "w")])).save(str(folder / "tokenizer.json"))


def tokens(*shape):
    """Random token ids that every row has."""
    return np.random.randint(0, COMMON["vocab_size"], shape).astype(np.int32)
