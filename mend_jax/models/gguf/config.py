"""The metadata of a GGUF file as the fields of a Hugging Face config.json, which the families read.

An architecture is an entry of ARCHITECTURES, by the name that the file gives it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.models.gguf.header import Header, read_model
from mend_jax.models.rope import Rope, frequencies

TOKENS = "token_embd.weight"
HEAD = "output.weight"
FREQUENCIES = "rope_freqs.weight"  # of Llama 3: what each angle is divided by
# Llama 3's ways to stretch positions differ in `factor` alone, which is the largest of those divisors.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding", "unk_token_id": "unknown"}


class _Metadata:
    """The metadata of one architecture, and which tensors there are."""

    def __init__(self, path: Path, header: Header):
        self.path, self.all, self.tensors = path, header.metadata, header.tensors
        self.architecture = self.all.get("general.architecture")

    def get(self, name: str, default=None):
        value = self.all.get(f"{self.architecture}.{name}", default)
        if isinstance(value, np.ndarray) and len(set(value.tolist())) == 1:
            return value[0].item()  # the same in every layer
        return value

    def need(self, name: str):
        value = self.get(name)
        if not isinstance(value, (int, float)):
            fault = "lacks" if value is None else "has no single number for"
            raise UserError(
                f"{self.path} {fault} {self.architecture}.{name} in its metadata: take another file of the model."
            )
        return value

    def layers(self) -> int:
        """Raises UserError where there are more than tensors, before a table is made of so many."""
        layers = self.need("block_count")
        if layers > len(self.tensors):
            raise UserError(
                f"{self.path} says that it has {layers} layers and holds {len(self.tensors)} tensors: copy it again."
            )
        return layers


def _gpt2(of: _Metadata) -> dict:
    return {
        "model_type": "gpt2",
        "n_embd": of.need("embedding_length"),
        "n_layer": of.layers(),
        "n_head": of.need("attention.head_count"),
        "n_inner": of.need("feed_forward_length"),
        "n_positions": of.need("context_length"),
        "layer_norm_epsilon": of.need("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _llama(of: _Metadata) -> dict:
    """Mistral's files call themselves llama too."""
    fields = _like_llama(of) | {
        "model_type": "llama",
        "attention_bias": "blk.0.attn_output.bias" in of.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in of.tensors,
    }
    span = of.get("attention.sliding_window")
    return fields | {"model_type": "mistral", "sliding_window": span} if span else fields


def _qwen2(of: _Metadata) -> dict:
    return _like_llama(of) | {"model_type": "qwen2"} | _span(of)


def _qwen3(of: _Metadata) -> dict:
    return _like_llama(of) | {"model_type": "qwen3"} | _span(of)


def _gemma3(of: _Metadata) -> dict:
    """What its files leave out is as in llama.cpp's code. Their rotary base, stretched or not, is that of the full layers."""
    fields = _like_llama(of)
    # The 27B alone divides scores by another width than its heads', and no file says so.
    score_width = fields["hidden_size"] // fields["num_attention_heads"] if of.layers() == 62 else fields["head_dim"]
    every = "attention.sliding_window_pattern"
    return fields | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": score_width,
        "sliding_window": of.need("attention.sliding_window"),
        "sliding_window_pattern": 6 if of.get(every) is None else of.need(every),
        "rope_theta": of.need("rope.freq_base"),
        "rope_local_base_freq": of.get("rope.freq_base_swa") or 1e4,
        "final_logit_softcapping": of.get("final_logit_softcapping"),
    }


def _span(of: _Metadata) -> dict:
    span = of.get("attention.sliding_window")
    return {"use_sliding_window": True, "sliding_window": span, "max_window_layers": 0} if span else {}


def _like_llama(of: _Metadata) -> dict:
    width, heads = of.need("embedding_length"), of.need("attention.head_count")
    if of.get("expert_count"):
        raise UserError(f"{of.path} holds a mixture of experts, which is not supported: take a dense model.")
    head_width = of.get("attention.key_length") or width // max(1, heads)
    return {
        "hidden_size": width,
        "num_hidden_layers": of.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": of.get("attention.head_count_kv") or heads,
        "head_dim": head_width,
        "intermediate_size": of.need("feed_forward_length"),
        "max_position_embeddings": of.need("context_length"),
        "rms_norm_eps": of.need("attention.layer_norm_rms_epsilon"),
        **_rope(of, head_width),
    }


def _rope(of: _Metadata, head_width: int) -> dict:
    theta = of.get("rope.freq_base") or 10000.0
    fields = {"rope_theta": theta}
    turned = of.get("rope.dimension_count") or head_width
    if turned != head_width:
        fields["partial_rotary_factor"] = turned / head_width
    kind = of.get("rope.scaling.type") or "none"
    if FREQUENCIES in of.tensors:
        fields["rope_scaling"] = _llama3(of, theta, head_width)
    elif kind != "none":
        scaling = {"rope_type": kind, "factor": of.get("rope.scaling.factor")}
        original = of.get("rope.scaling.original_context_length")
        fields["rope_scaling"] = scaling | ({"original_max_position_embeddings": original} if original else {})
    return fields


def _llama3(of: _Metadata, theta: float, head_width: int) -> dict:
    """The settings that give the divisors of a file. Raises UserError where none do."""
    stored = of.tensors[FREQUENCIES]
    if stored.kind == 0 and stored.shape == (head_width // 2,):
        divisors = np.fromfile(stored.file, "<f4", head_width // 2, offset=stored.start)
        settings = LLAMA3 | {"factor": float(divisors.max())}
        stretched, _ = frequencies(Rope(theta, "llama3", tuple(sorted(settings.items()))), head_width)
        plain, _ = frequencies(Rope(theta), head_width)
        if np.allclose(plain / divisors, stretched, rtol=1e-4, atol=0):
            return settings | {"rope_type": "llama3"}
    raise UserError(
        f"{of.path} stretches its positions ({FREQUENCIES}) in another way than Llama 3 does: only that is supported."
    )


class Architecture(NamedTuple):
    """What is particular to the files of an architecture."""

    fields: Callable[[_Metadata], dict]  # of config.json
    paired: bool = False  # rows of queries and keys: the two numbers that are turned together stand side by side
    transposed: tuple[str, ...] = ()  # tensors that Hugging Face's file has as (in, out), this one as (out, in)
    one_added: bool = False  # to the scales of norms: Hugging Face's file has w where 1 + w is multiplied by


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        _gpt2, transposed=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    ),
    "llama": Architecture(_llama, paired=True),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
    "gemma3": Architecture(_gemma3, one_added=True),
}


def hf_fields(path: str | Path) -> dict[str, Any]:
    """What a config.json of the model in a GGUF file would say. Raises UserError: an architecture that is not supported,
    metadata that lacks something."""
    path = Path(path)
    of = _Metadata(path, read_model(path))
    architecture_of(path)
    if TOKENS not in of.tensors:
        raise UserError(f"{path} lacks {TOKENS}: the file is of another model or incomplete.")
    ids = {ours: of.all.get(f"tokenizer.ggml.{name}_token_id") for ours, name in TOKEN_IDS.items()}
    return {
        **ARCHITECTURES[of.architecture].fields(of),
        "vocab_size": of.tensors[TOKENS].shape[0],
        "tie_word_embeddings": HEAD not in of.tensors,
        **{name: number for name, number in ids.items() if number is not None},
    }


def architecture_of(path: str | Path) -> str:
    """A key of ARCHITECTURES. Raises UserError where the file is of none."""
    name = read_model(path).metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{path} holds a model of the architecture {name!r}, which is not supported: use one of {', '.join(ARCHITECTURES)}."
        )
    return name
