"""The tokenizer of a GGUF file gives the ids of the one that its metadata were written from."""

import json
import sys

import pytest

gguf_package = pytest.importorskip("gguf")

from gguf_files import MODELS, add_tokenizer, write  # noqa: E402
from gguf_texts import (  # noqa: E402
    describe_bytes,
    describe_pieces,
    joined_by_score,
    trained_bytes,
    trained_pieces,
    varied_texts,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers  # noqa: E402

from mend_jax.interchange.export import export_llm  # noqa: E402
from mend_jax.models.folders import load_tokenizer  # noqa: E402

TEXTS = varied_texts()
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = (  # as its tokenizer.json has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIVIDED = {
    "gpt-2": [pre_tokenizers.Split(Regex(GPT2), "isolated"), BYTES],
    "smollm": [pre_tokenizers.Digits(True), pre_tokenizers.Split(Regex(GPT2), "isolated"), BYTES],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES],
}


def header_alone(path, describe, architecture="llama"):
    writer = gguf_package.GGUFWriter(path, architecture)
    describe(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def ids(tokenizer, texts=TEXTS):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.fixture(scope="module", params=DIVIDED)
def byte_level(request):
    """(pre-tokenizer's name, vocabulary, merges, the tokenizer)."""
    divided = pre_tokenizers.Sequence(DIVIDED[request.param])
    vocab, merges = trained_bytes(divided)
    whole = request.param == "llama-bpe"
    if whole:  # a token that no merges make
        vocab = vocab | {"ĠzyzzyvasĠ"[:-1]: len(vocab)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
    tokenizer.pre_tokenizer = divided
    tokenizer.normalizer = normalizers.NFC() if request.param == "qwen2" else None
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    return request.param, vocab, merges, tokenizer


def test_byte_level_ids(byte_level, tmp_path):
    pre, vocab, merges, source = byte_level
    path = header_alone(tmp_path / "model.gguf", lambda writer: describe_bytes(writer, vocab, merges, pre))
    texts = [*TEXTS, "a<|endoftext|>b 12", "see zyzzyvas", "zyzzyvas"]
    ours = load_tokenizer(path)
    assert ids(ours, texts) == [source.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ours.decode(numbers) for numbers in ids(ours)] == [
        source.normalizer.normalize_str(text) if source.normalizer else text for text in TEXTS
    ]
    assert (ours.eos_token_id, ours.bos_token_id, ours.chat_template) == (0, None, None)


def test_sentencepiece_ids(tmp_path):
    scores = trained_pieces()
    ours = load_tokenizer(header_alone(tmp_path / "model.gguf", lambda writer: describe_pieces(writer, scores)))
    for text in TEXTS:
        assert ours.tokenize(text) == joined_by_score(text, scores), text
    assert ours("Hello")["input_ids"][0] == ours.bos_token_id == 1
    assert ours.decode(ours("Hello 😀 world", add_special_tokens=False)["input_ids"]) == "Hello 😀 world"


def test_sentencepiece_ids_without_a_space_before_a_text(tmp_path):
    """Gemma's kind: no space is put before a text, and lines and runs of spaces are tokens of the user's, which llama.cpp's converter writes with
    spaces."""
    own = ["\n", "\n\n", "\n\n\n", "  ", "   ", "<start_of_turn>"]
    scores = trained_pieces() | dict.fromkeys(own, -100000.0)
    path = tmp_path / "model.gguf"
    ours = load_tokenizer(
        header_alone(path, lambda writer: describe_pieces(writer, scores, own, add_space_prefix=False), "gemma3")
    )
    for text in [*TEXTS, "a\n\n\n\nb   c", "<start_of_turn>user\nhi", "    x"]:
        assert ours.tokenize(text) == joined_by_score(text, scores, own, prefix=False), text
        assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("pre", "said", "begins"),
    [
        ("llama-bpe", None, True),  # a file that does not say it is read as llama.cpp reads it
        ("tekken", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", None, False),
        ("smollm", None, False),
        ("gpt-2", True, True),
    ],
)
def test_whether_a_text_begins_with_bos(pre, said, begins, tmp_path):
    vocab, merges = trained_bytes(pre_tokenizers.Sequence(DIVIDED["gpt-2"]), size=300)
    tokens = sorted(vocab, key=vocab.get)
    fields = {"bos_token_id": vocab["<|endoftext|>"]} | ({} if said is None else {"add_bos_token": said})
    types = [3 if token.startswith("<|") else 1 for token in tokens]
    path = tmp_path / "model.gguf"
    header_alone(path, lambda writer: add_tokenizer(writer, "gpt2", pre, tokens, types, merges, **fields))
    ours = load_tokenizer(path)
    assert (ours("Hello")["input_ids"][0] == ours.bos_token_id) == begins


def test_tokens_that_only_fill_the_table_are_left_out(tmp_path):
    vocab, merges = trained_bytes(pre_tokenizers.Sequence(DIVIDED["gpt-2"]), size=300, special=())
    tokens = [*sorted(vocab, key=vocab.get), "[PAD300]", "<think>"]
    types = [1] * len(vocab) + [5, 4]
    path = tmp_path / "model.gguf"
    header_alone(path, lambda writer: add_tokenizer(writer, "gpt2", None, tokens, types, merges), "gpt2")
    ours = load_tokenizer(path)
    assert "[PAD300]" not in ours.get_vocab() and ours.get_vocab()["<think>"] == len(vocab) + 1
    assert ours.tokenize("a<think>b") == ["a", "<think>", "b"] and ours.all_special_tokens == []


@pytest.mark.parametrize("name", ["smollm2", "gpt2"])
def test_what_transformers_need_not_know(name, tmp_path, monkeypatch):
    """Its list of how texts are divided is newer than the package, and imports PyTorch in some versions."""
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf.gguf_tokenizer_mapping", None)
    describe, _ = described(name)
    assert ids(load_tokenizer(header_alone(tmp_path / "model.gguf", describe)), ["a 12 bc"])


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "gpt2", "gemma3"])
def test_an_exported_folder_has_the_same(name, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    describe, size = described(name)
    write(tmp_path / "model.gguf", MODELS[name], "Q8_0", tokenizer=describe, vocabulary=size)
    export_llm(tmp_path / "model.gguf", tmp_path / "folder")
    ours = load_tokenizer(tmp_path / "model.gguf")
    assert ids(load_tokenizer(tmp_path / "folder")) == ids(ours)
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "folder")) == ids(ours)


def described(name):
    """(what writes a tokenizer's metadata, of so many tokens) of the kind that the model has."""
    if name == "gemma3":
        scores = trained_pieces()
        return (lambda writer: describe_pieces(writer, scores)), len(scores)
    pre = {"smollm2": "smollm", "gpt2": "gpt-2"}.get(name, name)
    vocab, merges = trained_bytes(pre_tokenizers.Sequence(DIVIDED[pre]), size=400)
    return (lambda writer: describe_bytes(writer, vocab, merges, pre)), len(vocab)


def test_gpt2s_own_vocabulary(shared, tmp_path):
    folder = shared / "tokenizers" / "gpt2"
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:] if line]
    special = ("<|endoftext|>",)
    path = header_alone(
        tmp_path / "m.gguf", lambda writer: describe_bytes(writer, vocab, merges, "gpt-2", special), "gpt2"
    )
    assert ids(load_tokenizer(path)) == ids(load_tokenizer(folder))
