"""Texts as vectors, to find near ones: the mean of a model's last states (config.evaluate.demos="dense").

Axes: B texts at a time, T tokens of a text, D width.
"""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from mend_jax.data.retrieval import Encode
from mend_jax.data.tokenize import check_tokenizer, encode, tokenizer_text
from mend_jax.llm.decoder_only import LLM
from mend_jax.llm.encoder_decoder import EncoderDecoderLLM
from mend_jax.llm.sentence_encoder import is_sentence_encoder, sentence_encoder
from mend_jax.models.families import EncoderDecoderConfig
from mend_jax.models.folders import fingerprint, load_model
from mend_jax.models.programs import program
from mend_jax.prefixes.context import bucket

BATCH, TOKENS = 32, 512  # texts at a time; tokens of a text that are read, at most


def encoder_of(config, llm: LLM | EncoderDecoderLLM) -> tuple[str, Encode] | None:
    """(what it is, texts -> (count, D) float32) of the model that config.evaluate.encoder names, by default the LLM itself; None
    where an evaluation needs none. The encoder alone of an encoder–decoder will do, and a sentence encoder of another family."""
    if config.evaluate.demos != "dense":
        return None
    path, reader = config.evaluate.encoder, llm
    if path and is_sentence_encoder(path):
        return sentence_encoder(path)
    if path:
        found = load_model(path)
        check_tokenizer(found.tokenizer, found.config.vocab_size, path, "encoder")
        kind = EncoderDecoderLLM if isinstance(found.config, EncoderDecoderConfig) else LLM
        reader = kind(found.config, found.params, found.tokenizer, str(found.folder), "float32")
    weights = "full" if path else config.llm.weights
    return f"{fingerprint(path or config.llm.path)} {reader.dtype} {weights} {reader.bos}", partial(mean_states, reader)


def mean_states(reader: LLM | EncoderDecoderLLM, texts: Sequence[str]) -> np.ndarray:
    """(count, D) float32: the mean of the last states at each text's tokens, of an encoder–decoder those of the encoder."""
    most = min(TOKENS, reader.window)
    rows = [ids[:most] for ids in encode(Tokenizer.from_str(tokenizer_text(reader.tokenizer)), texts)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    made = np.zeros((len(rows), reader.config.width), np.float32)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        columns = min(most, bucket(max(len(rows[i]) for i in part)))
        tokens, length = np.zeros((BATCH, columns), np.int32), np.ones(BATCH, np.int32)
        for at, i in enumerate(part):
            tokens[at, : len(rows[i])], length[at] = rows[i], max(1, len(rows[i]))
        made[part] = np.asarray(_means(reader, reader.params, tokens, length))[: len(part)]
    return made


@program
def _means(reader, params, tokens, length):
    states = reader.text_states(params, tokens, length).astype(jnp.float32)
    inside = (jnp.arange(tokens.shape[1]) < length[:, None])[..., None]
    return (states * inside).sum(1) / length[:, None]
