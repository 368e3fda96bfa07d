"""The tokenizer that the metadata of a GGUF file describes, as one of transformers', which gives the ids of the one it was made
from: byte-level pieces that merges join (GPT-2's kind), or SentencePiece's with scores (Llama 2's kind).

How a byte-level tokenizer divides a text before it joins pieces is known by a name alone, `tokenizer.ggml.pre`.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mend_jax.cli.errors import UserError
from mend_jax.models.gguf.header import read_model

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # llama.cpp's types of tokens; 1 is a normal one
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SPACE = "▁"  # SentencePiece's
GPT2_PRE = ("gpt-2", "gpt2")
DIGIT_PRE = ("smollm", "starcoder", "refact", "codeshell")  # as GPT-2, every digit by itself
WHOLE_WORDS = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "tekken",
)  # a word of the vocabulary is one token, whatever the merges
COMPOSED = ("qwen2", "deepseek-r1-qwen")  # texts are brought into the form NFC first
USUAL_PRE = {"gpt2": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}  # of files of before 2024, which name none


def gguf_tokenizer(path: str | Path):
    """A `PreTrainedTokenizerFast`. Raises UserError: no tokenizer in the metadata, or one of an unknown kind."""
    from transformers import PreTrainedTokenizerFast  # slow to import: only where texts are read

    metadata = read_model(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(metadata.get("tokenizer.ggml.tokens"), list) or not metadata["tokenizer.ggml.tokens"]:
        raise UserError(f"{path} holds no tokenizer (tokenizer.ggml.tokens): take a file that was made with one.")
    if kind not in KINDS:
        raise UserError(
            f"{path} holds a tokenizer of the kind {kind!r}, which is not supported: only {', '.join(KINDS)}."
        )
    try:
        tokenizer = KINDS[kind](metadata, path)
        named = _special(metadata)
        _add(tokenizer, metadata)
        # Of a file that does not say it, llama.cpp takes these kinds for ones that put BOS before a text.
        usual = kind == "llama" or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
        if metadata.get("tokenizer.ggml.add_bos_token", usual) and "bos_token" in named:
            tokenizer.post_processor = _begins_with(named["bos_token"], tokenizer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path=str(path), **named)
    except UserError:
        raise
    except Exception as error:  # of many kinds; tokenizers itself raises bare ones
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The tokenizer in {path} cannot be read ({reason}): copy it again.") from error
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


def _byte_pieces(metadata: dict[str, Any], path) -> Tokenizer:
    """GPT-2's kind: tokens are written in its alphabet of 256 letters, one for each byte."""
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    pre = metadata.get("tokenizer.ggml.pre") or USUAL_PRE.get(metadata.get("general.architecture"))
    tokenizer = Tokenizer(models.BPE(_vocabulary(metadata), merges, ignore_merges=pre in WHOLE_WORDS))
    tokenizer.normalizer = normalizers.NFC() if pre in COMPOSED else None
    tokenizer.pre_tokenizer = _divided(pre, path)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _divided(pre: str | None, path) -> pre_tokenizers.PreTokenizer:
    """How texts are divided into words. Raises UserError for an unknown name."""
    if pre in GPT2_PRE + DIGIT_PRE:  # without transformers' list, which not every version has
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
            if pre in DIGIT_PRE
            else words
        )
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as splits

    if pre in splits:
        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(splits[pre]), "isolated"), pieces])
    known = ", ".join(sorted({*GPT2_PRE, *DIGIT_PRE, *splits}))
    raise UserError(f"{path} divides texts as {pre!r} does (tokenizer.ggml.pre), which is not supported: only {known}.")


def _scored_pieces(metadata: dict[str, Any], path) -> Tokenizer:
    """SentencePiece's BPE: of two neighbours that together are a token those are joined first whose token scores best."""
    from transformers.tokenization_utils_base import generate_merges

    tokens, types = metadata["tokenizer.ggml.tokens"], _types(metadata)
    scores = dict(zip(tokens, (float(score) for score in metadata["tokenizer.ggml.scores"]), strict=True))
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, UNUSED, BYTE)]
    vocabulary = _vocabulary(metadata)
    merges = generate_merges(vocabulary, {t: s for t, s in scores.items() if t in vocabulary}, skip_tokens=whole)
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types))
    steps = [normalizers.Replace(" ", SPACE)]
    ends = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps, ends = [normalizers.Prepend(SPACE), *steps], [*ends, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(steps), decoders.Sequence(ends)
    return tokenizer


KINDS = {"gpt2": _byte_pieces, "llama": _scored_pieces}  # by tokenizer.ggml.model


def _types(metadata: dict[str, Any]) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    return [1] * len(metadata["tokenizer.ggml.tokens"]) if types is None else types.tolist()


def _vocabulary(metadata: dict[str, Any]) -> dict[str, int]:
    """{token: id}, without those that only fill up the table of embeddings."""
    tokens = zip(metadata["tokenizer.ggml.tokens"], _types(metadata), strict=True)
    return {token: i for i, (token, kind) in enumerate(tokens) if kind != UNUSED}


def _special(metadata: dict[str, Any]) -> dict[str, str]:
    tokens, named = metadata["tokenizer.ggml.tokens"], {}
    for ours, theirs in SPECIAL.items():
        number = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None and number < len(tokens):
            named[ours] = tokens[number]
    return named


def _add(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Tokens that are found in texts before these are divided."""
    tokens = zip(metadata["tokenizer.ggml.tokens"], _types(metadata), strict=True)
    found = [(token, kind == USER_DEFINED) for token, kind in tokens if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=not plain) for token, plain in found])


def _begins_with(token: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    ids = [(token, tokenizer.token_to_id(token))]
    return processors.TemplateProcessing(single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=ids)
