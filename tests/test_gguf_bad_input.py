"""GGUF files that are damaged or that cannot be read: one sentence each, at once, whatever their headers claim."""

import re
import struct
import sys

import numpy as np
import pytest

gguf_package = pytest.importorskip("gguf")

from facts import says  # noqa: E402

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
    with says(path, "damaged", "copy"):
        read_model(path)


def test_a_long_list_of_nothing_is_not_read(tmp_path):
    """Every length in it is 0, and it fits: only its number is wrong."""
    path, count = tmp_path / "m.gguf", 1 << 23
    with open(path, "wb") as file:
        file.write(header([entry("x", ARRAY, array(STRING, count))], end=b""))
        file.truncate(9 * count)
    with says(path, count, "texts"):
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
    ("change", "facts"),
    [
        ({"architecture": "falcon"}, ["architecture", "falcon", "gpt2", "llama", "qwen2"]),
        ({"metadata": {"block_count": None}}, ["llama.block_count", "metadata"]),
        ({"metadata": {"block_count": 1 << 31}}, [1 << 31, "layers", 11, "tensors"]),
        ({"metadata": {"attention.head_count": 1 << 30}}, []),
        ({"metadata": {"feed_forward_length": 1 << 18}}, [f"({1 << 18}, 32)"]),
        ({"metadata": {"feed_forward_length": 1 << 31}}, ["intermediate_size", 1 << 31]),
        ({"metadata": {"expert_count": 8}}, ["experts"]),
        ({"metadata": {"rope.dimension_count": 8}}, ["partial_rotary_factor=0.5"]),
        ({"tensors": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, ["Llama 3"]),
        ({"tensors": {"blk.0.ffn_up.weight": None}}, ["layers.0.mlp.up_proj.weight"]),
        ({"tensors": {"blk.0.strange.weight": np.ones(4, np.float32)}}, ["blk.0.strange.weight"]),
        ({"tensors": {"token_embd.weight": None}}, ["token_embd.weight"]),
        (
            {"tensors": {"blk.0.attn_q.weight": np.ones((D, 8), np.float32)}},
            [re.compile(r"\bq_proj\.weight "), "(32, 8)"],
        ),
        ({"tensors": {"blk.0.attn_q.weight": np.ones((D, D), np.int32)}}, ["blk.0.attn_q.weight", 26, "I32"]),
        ({"tokenizer": False}, ["no tokenizer"]),
        ({"tokenizer": "t5"}, ["tokenizer", "t5", "gpt2", "llama"]),
        ({"tokenizer": "gpt2"}, ["chameleon"]),
    ],
)
def test_what_a_file_may_not_hold(change, facts, tmp_path):
    path = write(tmp_path / "m.gguf", **change)
    with says(re.compile(r"\bm\.gguf\b"), *facts):
        load_model(path)


def test_a_cut_file(tmp_path):
    path = write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for length in (0, 3, 30, 200, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with says(path, re.compile("damaged|no GGUF file")):
            load_model(path)


def test_an_unknown_type_of_blocks(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(header([LLAMA], [("blk.0.x", (4,), 99, 0)]))
    with says(path, "blk.0.x", 99):
        read_model(path)


def test_other_files(tmp_path):
    path = tmp_path / "m.gguf"
    with says(path, "not there"):
        local_folder(path)
    write(path)
    with says(tmp_path / "config.json", "not there", path):
        load_model(tmp_path)
    path.write_bytes(b"PK\3\4" + b"\0" * 100)
    with says(path, "no GGUF file"):
        load_model(path)
    for version in (1, 3 << 24):
        path.write_bytes(header(version=version))
        with says(path, "only 2 and 3", "lowest byte first"):
            load_model(path)
    path.write_bytes(header([entry("split.count", UINT32, 4)]))
    with says(path, 4, "parts", "name"):
        load_model(path)
    path.write_bytes(header([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", UINT32, 1)]))
    with says(path, "name", "not text"):
        load_model(path)


def test_merges_of_tokens_that_are_not_there(tmp_path):
    writer = gguf_package.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a nowhere"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with says("tokenizer", tmp_path / "m.gguf"):
        load_tokenizer(tmp_path / "m.gguf")


def test_the_package_is_not_installed(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with says("pip install gguf"):
        load_model(path)
