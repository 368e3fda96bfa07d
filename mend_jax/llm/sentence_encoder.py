"""Sentence encoders (config.evaluate.encoder): models of families that are not ours, BERT's above all, read by sentence-transformers."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data.retrieval import Encode
from mend_jax.data.tokenize import fingerprint as text_fingerprint
from mend_jax.models.families import FAMILIES, read_json
from mend_jax.models.folders import fingerprint, local_folder
from mend_jax.models.gguf.header import is_gguf

MODULES = "modules.json"  # of a folder that sentence-transformers wrote: how states become an embedding


def is_sentence_encoder(path: str | Path) -> bool:
    """Whether a folder or hub name is a sentence encoder: it says how states become an embedding, or is of no family of ours."""
    folder = local_folder(path)
    if is_gguf(folder):
        return False
    return (folder / MODULES).is_file() or read_json(folder).get("model_type") not in FAMILIES


def require_sentence_transformers(path: str | Path) -> type:
    """The library's class. Raises UserError where it is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            f"{path} is a sentence encoder, which sentence-transformers reads: pip install sentence-transformers, or leave"
            f" evaluate.encoder out for the LLM itself ({error})."
        ) from None
    return SentenceTransformer


def sentence_encoder(path: str | Path) -> tuple[str, Encode]:
    """(what it is, texts -> (count, D) float32 embeddings, as its folder says, or means over tokens where it does not).

    Raises UserError: the library is missing, or it cannot read the folder.
    """
    kind, folder = require_sentence_transformers(path), local_folder(path)
    try:
        model = kind(str(folder), device="cpu", trust_remote_code=False)
    except Exception as error:  # of many kinds, the libraries' own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no sentence encoder that sentence-transformers reads ({reason}).") from error
    return f"{fingerprint(folder)} {_settings(folder)} sentence-transformers", partial(_encode, model)


def _encode(model, texts: Sequence[str]) -> np.ndarray:
    return np.asarray(model.encode(list(texts), show_progress_bar=False, convert_to_numpy=True), np.float32)


def _settings(folder: Path) -> str:
    """Changes with what stands in the folder's own settings and those of its modules."""
    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/config.json"))]
    return text_fingerprint(*(file.read_bytes() for file in files))
