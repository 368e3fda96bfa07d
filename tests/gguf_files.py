"""GGUF files of random models, written with the package `gguf` as llama.cpp's converter does, and the PyTorch models whose
weights they hold."""

import gguf
import numpy as np
from conftest import WORDS
from gguf import GGMLQuantizationType as Kind

KINDS = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
HEADS, KV_HEADS, HEAD_WIDTH = 4, 2, 64
LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "factor": 8.0}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MODELS = {  # what config.json says, beside the vocabulary
    "gpt2": {"model_type": "gpt2", "n_embd": 256, "n_inner": 512, "n_head": 4, "n_layer": 2, "n_positions": 96},
    "gpt2-head": {"model_type": "gpt2", "n_embd": 256, "n_inner": 512, "n_head": 4, "n_layer": 2, "n_positions": 96}
    | UNTIED,
    "smollm2": {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e5, **LLAMA, **TIED},
    "llama-3": {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5, **LLAMA},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **LLAMA},
    "mistral": {"model_type": "mistral", "sliding_window": 48, **LLAMA},
    "qwen2": {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, **LLAMA, **TIED},
    "qwen3": {"model_type": "qwen3", "head_dim": HEAD_WIDTH, **LLAMA},
    "gemma3": {
        **LLAMA,
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,  # the last alone does not slide
        "sliding_window": 16,
        "head_dim": 2 * HEAD_WIDTH,
        "query_pre_attn_scalar": 2 * HEAD_WIDTH,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        **TIED,
    },
}
NAMES = {"mistral": "llama", "gemma3_text": "gemma3"}  # of architectures, where they are not a config.json's
VOCABULARY = 64


def torch_model(fields, vocabulary=VOCABULARY):
    """PyTorch's model, with random biases and norms too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=vocabulary, **ids, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def write(path, fields, kind="F32", model=None, tokenizer=None, vocabulary=VOCABULARY):
    """Writes a random model in blocks of a kind, and returns PyTorch's model with the numbers that they stand for.

    `tokenizer(writer)` writes its metadata.
    """
    import torch

    model = model or torch_model(fields, vocabulary)
    architecture, layers = NAMES.get(fields["model_type"], fields["model_type"]), model.config.num_hidden_layers
    writer = gguf.GGUFWriter(path, architecture)
    _settings(writer, architecture, fields, vocabulary)
    if tokenizer:
        tokenizer(writer)
    rng = np.random.default_rng(1)
    named = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs = named.get_name(name, try_suffixes=(".weight", ".bias"))
            there, back = _rearranged(architecture, name)
            stored = there(parameter.numpy())
            blocks, used = _blocks(stored, kind, rng)
            writer.add_tensor(theirs, blocks, raw_dtype=used)
            parameter.copy_(torch.from_numpy(back(gguf.quants.dequantize(blocks, used).reshape(stored.shape)).copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _settings(writer, architecture, fields, vocabulary):
    if architecture == "gpt2":
        writer.add_embedding_length(fields["n_embd"])
        writer.add_feed_forward_length(fields["n_inner"])
        writer.add_head_count(fields["n_head"])
        writer.add_block_count(fields["n_layer"])
        writer.add_context_length(fields["n_positions"])
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_vocab_size(vocabulary)
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(fields.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(fields.get("rope_theta", 1e4))
    if "head_dim" in fields:
        writer.add_key_length(fields["head_dim"])
    else:
        writer.add_rope_dimension_count(HEAD_WIDTH)
    if "sliding_window" in fields:
        writer.add_sliding_window(fields["sliding_window"])
    stretched = fields.get("rope_scaling", {})
    if stretched.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(fields["rope_theta"], **LLAMA3))
    elif stretched:
        writer.add_rope_scaling_type(gguf.RopeScalingType(stretched["rope_type"]))
        writer.add_rope_scaling_factor(stretched["factor"])


def divisors(theta, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """What each of Llama 3's angles is divided by (its converter's formula)."""
    found = []
    for step in range(HEAD_WIDTH // 2):
        wave = 2 * np.pi * theta ** (2 * step / HEAD_WIDTH)
        turns = original_max_position_embeddings / wave
        share = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        found.append(1 / ((1 - share) / factor + share))
    return np.array(found, np.float32)


def _rearranged(architecture, name):
    """(to the file's layout, back) of a tensor: Llama's queries and keys in pairs, GPT-2's kernels turned over, Gemma's w
    of its norms as 1 + w."""
    if architecture == "gpt2" and ".weight" in name and ("attn." in name or "mlp." in name):
        return np.transpose, np.transpose
    if architecture == "gemma3" and "norm.weight" in name:
        return (lambda a: a + 1), (lambda a: a - 1)
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = HEADS if "q_proj" in name else KV_HEADS

        def there(a):
            return a.reshape(heads, 2, HEAD_WIDTH // 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)

        def back(a):
            return a.reshape(heads, HEAD_WIDTH // 2, 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)

        return there, back
    return (lambda a: a), (lambda a: a)


def _blocks(array, kind, rng):
    """(what the file holds, its type): matrices in blocks of a kind, vectors as they are."""
    array = np.ascontiguousarray(array)
    if array.ndim == 1 or kind == "F32":
        return array, Kind.F32
    if kind == "F16":
        return array.astype(np.float16), Kind.F16
    if not kind.endswith("_K"):
        return gguf.quants.quantize(array, Kind[kind]), Kind[kind]
    # The package reads these and does not write them: random blocks, of which only the scales need be sensible.
    count, size = array.size // 256, gguf.GGML_QUANT_SIZES[Kind[kind]][1]
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    if kind == "Q4_K":
        blocks[:, :4] = np.array([4e-4, 3e-3], np.float16).view(np.uint8)  # scale of the values, of the lowest
    else:
        blocks[:, -2:] = np.array([5e-5], np.float16).view(np.uint8)
    return blocks.reshape(len(array), -1), Kind[kind]


def add_tokenizer(writer, kind, pre, tokens, types, merges=(), scores=(), **flags):
    """A tokenizer's metadata; `flags` as `add_bos_token=True`."""
    writer.add_tokenizer_model(kind)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    if scores:
        writer.add_token_scores(scores)
    for name, value in flags.items():
        (writer.add_uint32 if type(value) is int else writer.add_bool)(f"tokenizer.ggml.{name}", value)


def describe_words(writer):
    """The words of data_files.py as SentencePiece's kind: every piece of a word is a token, so that the whole is one."""
    words = ["▁" + word for word in WORDS[2:]]
    digits = [word[:3] for word in words] + ["▁w", "▁", "w", *"0123456789"]
    tokens = ["<unk>", *words, *sorted(set(digits) - set(words))]
    kinds = [2] + [1] * (len(tokens) - 1)
    add_tokenizer(writer, "llama", "default", tokens, kinds, scores=[float(len(token)) for token in tokens])


WORD_VOCABULARY = 80


def write_with_words(path, name="smollm2", kind="Q8_0"):
    """As `write`, with a tokenizer of the words of data_files.py."""
    path.parent.mkdir(exist_ok=True)
    return write(path, MODELS[name], kind, tokenizer=describe_words, vocabulary=WORD_VOCABULARY)


def copy_part(file, path, tensors=slice(None), numbers=(), tokenizer=False):
    """A GGUF file with some of the tensors of another, without its tokenizer, which transformers reads for half a minute."""
    whole = gguf.GGUFReader(file)
    architecture = whole.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for name, number in dict(numbers).items():
        writer.add_uint32(name, number)
    for key, field in whole.fields.items():
        if key.startswith(f"{architecture}.") or (tokenizer and key.startswith("tokenizer.")):
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:][-1:])
    for tensor in whole.tensors[tensors]:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
