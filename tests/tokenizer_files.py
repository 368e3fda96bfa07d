"""Small tokenizers of several kinds that read the words w0 ... w59 of data_files.py, as folders of Hugging Face."""

import json

from conftest import WORDS, save_tokenizer


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def save_word_tokenizer(folder):
    """One token a word; spaces only separate."""
    save_tokenizer(folder)
    return folder


def save_byte_tokenizer(folder):
    """GPT-2's kind: pieces of bytes, a space belongs to the word behind it. Most words are two or three tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "w"), ("1", "2"), ("Ġw", "5"), ("3", "3")]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in merges), "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _save(tokenizer, folder)


def save_piece_tokenizer(folder):
    """T5's kind: pieces of the likeliest way to take a word apart; all white space is one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁w", "w", *"0123456789", "▁w1", "▁w2", "▁w3", "45", "67"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - 0.01 * i) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return _save(tokenizer, folder)


SPACED = ["<unk>", "▁", "\n", *(chr(i) for i in range(33, 127)), *(f"▁{letter}" for letter in "Iadlpw")]


def save_spaced_tokenizer(folder):
    """Mistral 7B v0.1's kind: it puts a space before every text, also before one that begins with a space."""
    from tokenizers import Tokenizer, models, normalizers

    vocab = {piece: i for i, piece in enumerate(SPACED)}
    merges = [tuple(piece) for piece in SPACED[-6:]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _save(tokenizer, folder)


def dropping(tokenizer, text):
    """A copy of a tokenizer of transformers that reads a text as nothing at all."""
    import copy

    from tokenizers import normalizers

    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.normalizer = normalizers.Replace(text, "")
    return made


def _save(tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


SIZES = {"word": len(WORDS), "byte": 261, "piece": 21, "spaced": len(SPACED)}  # their vocabularies
SAVE = {
    "word": save_word_tokenizer,
    "byte": save_byte_tokenizer,
    "piece": save_piece_tokenizer,
    "spaced": save_spaced_tokenizer,
}


def save_model_folder(folder, kind, fields, seed=0):
    """A folder of a model with random weights, config.json's `fields`, and a tokenizer of one of these kinds."""
    from mend_jax.models.families import from_hf_config
    from mend_jax.models.folders import init_model, save_model

    SAVE[kind](folder)
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": SIZES[kind]}))
    save_model(folder, from_hf_config(folder), init_model(folder, seed).params, folder)
    SAVE[kind](folder)  # as it was: `save_model` writes tokenizers as we read them
    return folder


GPT2 = {
    "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 100, "n_inner": None,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
