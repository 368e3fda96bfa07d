"""Texts of many kinds, and tokenizers that were trained on them, as GGUF files describe them."""

import json
import random
import re

from gguf_files import add_tokenizer

PIECES = [
    "Hello", " world", "the cat", " sat", " on the mat.", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "1", "23", " 456", "7890",
    "3.14", "1,000", " don't", "I'll", "WE'VE", "naïve", "café", "Übermaß", "e\u0301", "日本語", "こんにちは", "안녕하세요",
    "你好，世界", "مرحبا", "٣٤٥", "नमस्ते", "Привет", "ελληνικά", "😀", "👩‍👩‍👧", " 🎉", "!!!", "...", "{x: 1}", "def f(x):\n    return x",
    "½", "\u00a0", "\u200b", "a_b", "C++", "@#$%", "1st", "—", "“q”", "https://x.org/?a=b&c", "x²", "Ⅷ",
]  # fmt: skip


def varied_texts(count=200, seed=0):
    rng = random.Random(seed)
    return PIECES + ["".join(rng.choices(PIECES, k=rng.randint(2, 9))) for _ in range(count - len(PIECES))]


def trained_bytes(pre_tokenizer, size=600, special=("<|endoftext|>", "<|im_start|>")):
    """({token: id}, merges) of byte-level BPE, special tokens first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(varied_texts(400, seed=1), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def describe_bytes(writer, vocab, merges, pre, special=("<|endoftext|>", "<|im_start|>")):
    """Its metadata."""
    tokens = sorted(vocab, key=vocab.get)
    types = [3 if token in special else 1 for token in tokens]
    add_tokenizer(writer, "gpt2", pre, tokens, types, merges, eos_token_id=vocab[special[0]])


def trained_pieces(size=500):
    """{token: score} of SentencePiece's kind: <unk>, <s>, </s>, 256 bytes, then pieces; rare letters have none."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(varied_texts(400, seed=1), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    joined = ["".join(pair) for pair in model["merges"]]
    letters = [token for token in model["vocab"] if token not in set(joined)]
    scores = dict.fromkeys(["<unk>", "<s>", "</s>"], 0.0) | {f"<0x{byte:02X}>": 0.0 for byte in range(256)}
    scores |= {token: -float(rank) for rank, token in enumerate(dict.fromkeys(joined))}
    return scores | {letter: -1e4 - rank for rank, letter in enumerate(letters)}


def describe_pieces(writer, scores, own=(), **flags):
    """Its metadata; `own` are tokens of the user's, which are found before anything is joined."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | dict.fromkeys(own, 4)
    types = [6 if token.startswith("<0x") else kinds.get(token, 1) for token in scores]
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    add_tokenizer(writer, "llama", "default", list(scores), types, scores=list(scores.values()), **ids, **flags)


def joined_by_score(text, scores, own=(), prefix=True):
    """What SentencePiece does, word for word: of all neighbours that together are a token, those that score best are joined,
    the first of equals, until there are none; letters without a token are bytes. Tokens of the user's `own` come first, the
    longest of those that begin at a place; without `prefix` no space stands before a text."""
    if own:
        parts = re.split("(" + "|".join(map(re.escape, sorted(own, key=len, reverse=True))) + ")", text)
        made = [[part] if part in own else joined_by_score(part, scores, prefix=prefix) for part in parts if part]
        return [token for tokens in made for token in tokens]
    letters = list(("▁" if prefix and not text.startswith(" ") else "") + text.replace(" ", "▁"))

    def is_known(piece):
        return piece in scores and not piece.startswith("<")

    while True:
        pairs = [
            (scores[a + b], -i) for i, (a, b) in enumerate(zip(letters, letters[1:], strict=False)) if is_known(a + b)
        ]
        if not pairs:
            break
        at = -max(pairs)[1]
        letters[at : at + 2] = ["".join(letters[at : at + 2])]
    return [token for piece in letters for token in ([piece] if is_known(piece) else _as_bytes(piece))]


def _as_bytes(piece):
    return [f"<0x{byte:02X}>" for byte in piece.encode()]
