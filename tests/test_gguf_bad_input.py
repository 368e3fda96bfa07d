"""GGUF files that are damaged or that cannot be read: one sentence each, at once, whatever their headers claim."""

import struct
import sys

import numpy as np
import pytest

gguf_package = pytest.importorskip("gguf")

from mend_jax.cli.errors import UserError  # noqa: E402
from mend_jax.models.folders import load_model, load_tokenizer, local_folder  # noqa: E402
from mend_jax.models.gguf.header import read_model  # noqa: E402

D, VOCABULARY = 32, 8
TOKENS = ["<unk>", "a", "b", "c", "d", "e", "f", "ab"]
UINT32, UINT8, STRING, ARRAY = 4, 0, 8, 9
HUGE = 1 << 60


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def entry(name, kind, value):
    """One of the metadata: number, text, or the bytes of an array."""
    if kind == STRING:
        value = string(value)
    elif kind == UINT32:
        value = struct.pack("<I", value)
    return string(name) + struct.pack("<I", kind) + value


def header(entries=(), tensors=(), counts=None, version=3, end=b"\0" * 64):
    """A file of entries of metadata and of (name, axes, type, offset)."""
    many = counts or (len(tensors), len(entries))
    infos = [
        string(name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes) + struct.pack("<IQ", kind, offset)
        for name, axes, kind, offset in tensors
    ]
    return b"GGUF" + struct.pack("<IQQ", version, *many) + b"".join(entries) + b"".join(infos) + end


def array(kind, count, content=b""):
    return struct.pack("<IQ", kind, count) + content


LLAMA = entry("general.architecture", STRING, "llama")
CLAIMS = {
    "metadata": header(counts=(0, HUGE)),
    "tensors": header(counts=(HUGE, 0)),
    "numbers": header([entry("x", ARRAY, array(UINT8, HUGE))]),
    "texts": header([entry("x", ARRAY, array(STRING, HUGE))]),
    "a text": header([string("x") + struct.pack("<I", STRING) + struct.pack("<Q", HUGE)]),
    "a name": header([struct.pack("<Q", HUGE)], counts=(0, 1)),
    "a tensor": header([LLAMA], [("t", (HUGE, HUGE), 0, 0)]),
    "an offset": header([LLAMA], [("t", (4,), 0, HUGE)]),
    "axes": header([LLAMA], [("t", (), 0, 0)]).replace(string("t") + b"\0\0\0\0", string("t") + b"\xff\xff\xff\x7f"),
    "nested arrays": header([entry("x", ARRAY, array(ARRAY, 1, array(ARRAY, HUGE)))]),
    "a type of value": header([entry("x", 77, b"")]),
    "alignment": header([entry("general.alignment", UINT32, 0)]),
    "the same name": header([LLAMA, LLAMA]),
    "the same tensor": header([LLAMA], [("t", (4,), 0, 0)] * 2),
    "parts of blocks": header([LLAMA], [("t", (33, 2), 8, 0)]),
    "nothing": b"GGUF\3",
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_header_that_cannot_be_right(name, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(CLAIMS[name])
    with pytest.raises(UserError, match=r"m.gguf is cut or damaged \(.*\): copy it again.$"):
        read_model(path)


def test_a_long_list_of_nothing_is_not_read(tmp_path):
    """Every length in it is 0, and it fits: only its number is wrong."""
    path, count = tmp_path / "m.gguf", 1 << 23
    with open(path, "wb") as file:
        file.write(header([entry("x", ARRAY, array(STRING, count))], end=b""))
        file.truncate(9 * count)
    with pytest.raises(UserError, match="claims 8388608 texts in one list"):
        read_model(path)


def write(path, architecture="llama", kind=None, tokenizer=True, metadata=(), tensors=()):
    """A small Llama's file, with what is given in other ways."""
    writer = gguf_package.GGUFWriter(path, architecture)
    fields = {"embedding_length": D, "feed_forward_length": D, "block_count": 1, "context_length": 16}
    fields |= {"attention.head_count": 2} | dict(metadata)
    for name, value in fields.items():
        if value is not None:
            writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    if tokenizer:
        writer.add_tokenizer_model("llama" if tokenizer is True else tokenizer)
        writer.add_token_list(TOKENS)
        writer.add_token_types([2] + [1] * 7)
        writer.add_token_scores([0.0] * 8)
        writer.add_token_merges(["a b"])
        writer.add_tokenizer_pre("chameleon")
    square, vector = np.ones((D, D), np.float32), np.ones(D, np.float32)
    parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    found = {"token_embd.weight": np.ones((VOCABULARY, D), np.float32), "output_norm.weight": vector}
    found |= {f"blk.0.{part}.weight": square for part in parts}
    found |= {"blk.0.attn_norm.weight": vector, "blk.0.ffn_norm.weight": vector} | dict(tensors)
    for name, content in found.items():
        if content is not None:
            writer.add_tensor(name, content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_gemma(**metadata):
    return {"architecture": "gemma3", "metadata": {"attention.sliding_window": 4, "rope.freq_base": 10, **metadata}}


def test_the_file_that_is_changed_below_is_whole(tmp_path):
    assert load_model(write(tmp_path / "m.gguf")).config.layers == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"architecture": "falcon"},
            "the architecture 'falcon', which is not supported: use one of gpt2, llama, qwen2, qwen3, gemma3",
        ),
        ({"metadata": {"block_count": None}}, "lacks llama.block_count in its metadata"),
        ({"metadata": {"block_count": 1 << 31}}, "says that it has 2147483648 layers and holds 11 tensors"),
        ({"metadata": {"attention.head_count": 1 << 30}}, "m.gguf"),
        ({"metadata": {"feed_forward_length": 1 << 31}}, r"asks for \(2147483648, 32\)"),
        ({"metadata": {"expert_count": 8}}, "a mixture of experts"),
        ({"metadata": {"rope.dimension_count": 8}}, "partial_rotary_factor=0.5"),
        ({"tensors": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "in another way than Llama 3 does"),
        ({"tensors": {"blk.0.ffn_up.weight": None}}, "lacks layers.0.mlp.up_proj.weight"),
        ({"tensors": {"blk.0.strange.weight": np.ones(4, np.float32)}}, "holds blk.0.strange.weight"),
        ({"tensors": {"token_embd.weight": None}}, "lacks token_embd.weight"),
        ({"tensors": {"blk.0.attn_q.weight": np.ones((D, 8), np.float32)}}, r"q_proj.weight has shape \(32, 8\)"),
        ({"tensors": {"blk.0.attn_q.weight": np.ones((D, D), np.int32)}}, r"ggml's type 26 \(I32\), which the package"),
        ({"architecture": "gemma3"}, "lacks gemma3.attention.sliding_window in its metadata"),
        (
            {"architecture": "gemma3", "metadata": {"attention.sliding_window": 4}},
            "lacks gemma3.rope.freq_base in its metadata",
        ),
        (of_gemma(final_logit_softcapping=30), "final_logit_softcapping=30"),
        (of_gemma(**{"rope.dimension_count": 8}), "partial_rotary_factor=0.5"),
        ({"tokenizer": False}, "holds no tokenizer"),
        ({"tokenizer": "t5"}, "a tokenizer of the kind 't5', which is not supported: only gpt2, llama"),
        ({"tokenizer": "gpt2"}, "divides texts as 'chameleon' does"),
    ],
)
def test_what_a_file_may_not_hold(change, said, tmp_path):
    path = write(tmp_path / "m.gguf", **change)
    with pytest.raises(UserError, match=said) as caught:
        load_model(path)
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_a_cut_file(tmp_path):
    path = write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for length in (0, 3, 30, 200, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="m.gguf is cut or damaged|m.gguf is no GGUF file"):
            load_model(path)


def test_an_unknown_type_of_blocks(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(header([LLAMA], [("blk.0.x", (4,), 99, 0)]))
    with pytest.raises(UserError, match="holds blk.0.x in ggml's type 99, which the package gguf cannot dequantise"):
        read_model(path)


def test_other_files(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(UserError, match="m.gguf is not there: give a GGUF file"):
        local_folder(path)
    write(path)
    with pytest.raises(UserError, match=f"config.json is not there: name the GGUF file beside it, {path}"):
        load_model(tmp_path)
    path.write_bytes(b"PK\3\4" + b"\0" * 100)
    with pytest.raises(UserError, match="is no GGUF file"):
        load_model(path)
    for version in (1, 3 << 24):
        path.write_bytes(header(version=version))
        with pytest.raises(UserError, match="only 2 and 3, lowest byte first"):
            load_model(path)
    path.write_bytes(header([entry("split.count", UINT32, 4)]))
    with pytest.raises(UserError, match="is one of 4 parts, but its name does not say so"):
        load_model(path)
    path.write_bytes(header([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", UINT32, 1)]))
    with pytest.raises(UserError, match="a name in it is not text"):
        load_model(path)


def test_merges_of_tokens_that_are_not_there(tmp_path):
    writer = gguf_package.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a nowhere"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="The tokenizer in .*m.gguf cannot be read"):
        load_tokenizer(tmp_path / "m.gguf")


def test_the_package_is_not_installed(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="need the package gguf to be read: pip install gguf"):
        load_model(path)
