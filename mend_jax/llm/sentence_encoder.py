"""Sentence encoders (config.evaluate.encoder): models of families that are not ours, BERT's above all, read by sentence-transformers.

They run in a process of their own, which ends with this one: commands hide PyTorch, which the library needs, from their own.
"""

import importlib.util
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data.retrieval import Encode
from mend_jax.data.tokenize import fingerprint as text_fingerprint
from mend_jax.models.families import FAMILIES, read_json
from mend_jax.models.folders import local_folder
from mend_jax.models.gguf.header import is_gguf
from mend_jax.run.files import sha256_of

MODULES = "modules.json"  # of a folder that sentence-transformers wrote: how states become an embedding
LIBRARY = "sentence_transformers"


def is_sentence_encoder(path: str | Path) -> bool:
    """Whether a folder or hub name is a sentence encoder: it says how states become an embedding, or is of no family of ours."""
    folder = local_folder(path)
    if is_gguf(folder):
        return False
    return (folder / MODULES).is_file() or read_json(folder).get("model_type") not in FAMILIES


def require_sentence_transformers(path: str | Path) -> None:
    """Raises UserError where the library is not installed."""
    if importlib.util.find_spec(LIBRARY) is None:
        raise UserError(
            f"{path} is a sentence encoder, which sentence-transformers reads: pip install sentence-transformers, or leave"
            " evaluate.encoder out for the LLM itself."
        )


def sentence_encoder(path: str | Path) -> tuple[str, Encode]:
    """(what it is, texts -> (count, D) float32 embeddings, as its folder says, or means over tokens where it does not).

    Raises UserError: the library is missing, or it cannot read the folder.
    """
    require_sentence_transformers(path)
    folder = local_folder(path)
    return f"{_fingerprint(folder)} sentence-transformers", _Encoder(folder, path)


class _Encoder:
    """The model in its own process."""

    def __init__(self, folder: Path, named: str | Path):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, str(folder)), daemon=True)
        self.process.start()
        theirs.close()
        if reason := self._answer():
            raise UserError(f"{named} is no sentence encoder that sentence-transformers reads ({reason}).")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.pipe.send(list(texts))
        return self._answer()

    def _answer(self):
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError("the process of the sentence encoder has ended") from None


def _serve(pipe, folder: str) -> None:
    """Says whether it has read the model, in the reason why not; then answers until the other end is closed."""
    try:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(folder, device="cpu", trust_remote_code=False)
    except Exception as error:  # of many kinds, the libraries' own
        pipe.send(next((line for line in str(error).splitlines() if line), type(error).__name__))
        return
    pipe.send("")
    while True:
        try:
            texts = pipe.recv()
        except EOFError:
            return
        found = model.encode(texts, show_progress_bar=False, convert_to_numpy=True)
        pipe.send(np.asarray(found, np.float32))


def _fingerprint(folder: Path) -> str:
    """Changes with any settings, vocabulary or weights, those of modules in folders of their own among them."""
    names = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin")
    files = sorted(file for name in names for pattern in (name, f"*/{name}") for file in folder.glob(pattern))
    return text_fingerprint(*(part for file in files for part in (file.relative_to(folder), sha256_of(file))))
