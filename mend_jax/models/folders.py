"""Hugging Face folders, hub names and GGUF files: where a model's settings, weights and tokenizer come from and go to.

A GGUF file stands wherever a folder can: `from_hf_config`, `weights.weight_files` and `load_tokenizer` read either.
"""

import functools
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives numpy the name "bfloat16")

from mend_jax.cli.errors import UserError
from mend_jax.models import decoder, encoder_decoder, weights
from mend_jax.models.families import Config, EncoderDecoderConfig, family_of, from_hf_config, read_json, to_hf_config
from mend_jax.models.gguf.header import is_gguf
from mend_jax.models.gguf.packaged import PACKAGED, near, packaged_file, refuse_others
from mend_jax.models.gguf.tokenizer import gguf_tokenizer
from mend_jax.models.split_weights import read_split
from mend_jax.models.tables import Table
from mend_jax.models.weights import AGAIN
from mend_jax.run.reading import require_regular
from mend_jax.run.sealed import require_unchanged
from mend_jax.run.sharding import Place, places

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")  # a tokenizer has one of them
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Fields of a config.json that change no number of ours, but what others do with the model: they go along.
KEPT_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers")
# Those of a sentence encoder (llm/sentence_encoder.py) come last.
HUB_FILES = [
    "config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES,
    "modules.json", "*_*/config.json", "*sentence_*.json", "vocab.txt",
]  # fmt: skip
HUB_TWICE = ["consolidated*"]  # the same weights again, under Mistral's own names
HUB_BIN = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]  # only where there are no safetensors


class Model(NamedTuple):
    """What a folder or a GGUF file holds."""

    config: Config
    params: Any
    tokenizer: Any  # of transformers, or None where the folder has none
    folder: Path


def load_model(path: str | Path, dtype: str = "float32", int8: bool = False, place: Place | None = None) -> Model:
    """The model of a folder, GGUF file or hub name, its weights in `dtype`, or kernels and tables in 8 bits (models/int8.py).

    The host never holds two copies: its peak is the tree and 1.2 times the largest file of weights. With `place`
    (sharding.py) the weights are read straight to where it says: the tree is then what this host's devices hold, and of
    the rest it reads its share of one parameter at a time (split_weights.py).
    """
    folder = local_folder(path)
    config = from_hf_config(folder)
    params = read_weights(folder, config, dtype, int8, place)
    return Model(weights.as_read(config, params), params, load_tokenizer(folder), folder)


def read_weights(
    folder: Path, config: Config, dtype="float32", int8=False, place: Place | None = None, wanted: Table | None = None
) -> dict:
    """The tree of `load_model` alone. Where some tensors are `wanted` (as in `weights.matched`) no others are read."""
    require_unchanged(folder)
    if place is not None:
        return read_split(folder, config, dtype, int8, place, wanted)
    return _to_device(weights.read_params(folder, config, dtype, int8, wanted))


def init_model(path: str | Path, seed: int, dtype: str = "float32", place: Place | None = None) -> Model:
    """As `load_model` with random weights: `path` needs a config.json alone. With `place` they are made where it says."""
    folder = local_folder(path)
    config = from_hf_config(folder)

    def init():
        return jax.tree.map(lambda a: a.astype(dtype), init_params(config, seed))

    params = init() if place is None else jax.jit(init, out_shardings=places(jax.eval_shape(init), place))()
    return Model(config, params, load_tokenizer(folder), folder)


def _to_device(tree: dict) -> dict:
    """NumPy's arrays as JAX's, in place: one is gone before the next is copied."""
    for name in tree:
        tree[name] = _to_device(tree[name]) if isinstance(tree[name], dict) else jnp.asarray(tree[name])
        jax.block_until_ready(tree[name])
    return tree


def init_params(config: Config, seed) -> dict:
    """Random float32 parameters of a model; `seed` is a whole number, or a key of JAX."""
    module = encoder_decoder if isinstance(config, EncoderDecoderConfig) else decoder
    return module.init_params(config, seed)


def has_weights(path: str | Path) -> bool:
    """Whether a folder, or a hub's model, holds weights. True for damaged ones too, so that reading them says so."""
    return weights.has_weights(local_folder(path))


def save_model(folder: str | Path, config: Config, params, source: str | Path, dtype: str | None = None) -> None:
    """A Hugging Face folder: config.json, model.safetensors, and the tokenizer of the folder `source`.

    `dtype` is that of the file, None that of `params`; config.json names it.
    """
    folder, source = Path(folder), Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    _write_settings(folder, config, source, dtype or str(params["embed"]["tokens"].dtype))
    write_tokenizer(folder, source)
    weights.write_params(folder, config, params, dtype)


def convert_model(source: str | Path, folder: str | Path) -> None:
    """A GGUF file as a Hugging Face folder, in float32, which holds every dequantised number as it is.

    In memory there is never more than one shard (weights.SHARD_BYTES). Raises UserError: a file that cannot be read, no
    GGUF file; OSError: a folder that cannot be written.
    """
    source, folder = local_folder(source), Path(folder)
    if not is_gguf(source):
        raise UserError(f"{source} is a Hugging Face folder already: name a GGUF file.")
    config = from_hf_config(source)
    folder.mkdir(parents=True, exist_ok=True)
    _write_settings(folder, config, source, "float32")
    write_tokenizer(folder, source)
    weights.copy_weights(source, config, folder)


def _write_settings(folder: Path, config: Config, source: Path, dtype: str) -> None:
    """The config.json of weights in `dtype`."""
    fields = to_hf_config(config) | {"dtype": dtype}
    if is_gguf(source) or (source / "config.json").exists():
        known = read_json(source)
        if known.get("model_type") == config.family:
            fields |= {name: known[name] for name in KEPT_FIELDS if name in known}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def write_tokenizer(folder: Path, source: Path) -> None:
    """The tokenizer of another folder, byte by byte, or of a GGUF file; one that `load_tokenizer` changes as it is then."""
    read = load_tokenizer(source) if is_gguf(source) else changed_tokenizer(source)
    if read is not None:
        read.save_pretrained(folder)
        return
    for name in TOKENIZER_FILES:
        file = source / name
        if file.exists() and file.resolve() != (folder / name).resolve():
            shutil.copyfile(file, folder / name)


def local_folder(path: str | Path) -> Path:
    """`path` itself where it is a folder or a GGUF file, else the local copy of the model of that name: of a package
    (PACKAGED), or of the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir() or (is_gguf(path) and folder.is_file()):
        return folder
    if is_gguf(path):
        raise UserError(
            f"{path} is not there: give a GGUF file, a Hugging Face model folder or a hub name such as gpt2."
        )
    if str(path) in PACKAGED:
        return packaged_file(str(path))
    refuse_others(str(path))
    if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") > 1:
        raise UserError(f"{path} is not a folder: give a Hugging Face model folder or a hub name such as gpt2.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(path), allow_patterns=HUB_FILES, ignore_patterns=HUB_TWICE))
        if weights.has_weights(folder):
            return folder
        return Path(snapshot_download(str(path), allow_patterns=[*HUB_FILES, *HUB_BIN]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason, meant = str(error).splitlines()[0], near(str(path))
        advice = f"check the name and the network, or give a folder{f'; or did you mean {meant}?' if meant else '.'}"
        raise UserError(
            f"{path} is neither a folder nor a model that the Hugging Face hub gave ({reason}): {advice}"
        ) from error


def settings_here(path: str | Path) -> Config | None:
    """The settings of the model that `path` names as in `local_folder`; None where this machine does not have it.

    Nothing is downloaded.
    """
    folder = _folder_here(path)
    try:
        return None if folder is None else from_hf_config(folder)
    except UserError:
        return None


def _folder_here(path: str | Path) -> Path | None:
    """`local_folder` where this machine has it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        if str(path) in PACKAGED or Path(path).expanduser().exists():
            return local_folder(path)
        file = try_to_load_from_cache(str(path), "config.json")
        return Path(file).parent if isinstance(file, str) else None
    except (UserError, ValueError):  # ValueError: no name of the hub
        return None


def fingerprint(path: str | Path) -> str:
    """16 hexadecimal digits that change with any byte of a model's config.json, vocabulary or weights, wherever it lies."""
    folder = local_folder(path)
    files = [folder / name for name in VOCABULARIES if (folder / name).exists()]
    files = [] if is_gguf(folder) else [folder / "config.json", *files]
    files += weights.weight_files(folder) if weights.has_weights(folder) else []
    for file in files:
        require_regular(file, AGAIN)
    stats = [file.stat() for file in files]
    return _fingerprint(tuple((str(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)))


@functools.lru_cache(maxsize=8)
def _fingerprint(files: tuple) -> str:
    """Of (path, size, time of change): a model of many gigabytes is read once in a process."""
    digest = hashlib.sha256()
    for name, size, _ in files:
        digest.update(f"{size} ".encode())
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def load_tokenizer(folder: str | Path):
    """The tokenizer of a Hugging Face folder or GGUF file, or None where a folder has none. Nothing is downloaded."""
    folder = Path(folder)
    if is_gguf(folder):
        return _without_doubled_space(gguf_tokenizer(folder))
    there = [name for name in VOCABULARIES if (folder / name).exists()]
    if not there:
        return None
    if (folder / "config.json").exists():
        family_of(
            read_json(folder)
        )  # before transformers, which would run the folder's code for a model it does not know
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            require_regular(folder / name, AGAIN)
    if there[0].endswith(".model") and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(f"{folder / there[0]} needs SentencePiece to be read: pip install sentencepiece.")
    from transformers import AutoTokenizer  # slow to import: only where texts are read

    try:
        return _without_doubled_space(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except BaseException as error:  # of many kinds; tokenizers itself raises bare ones, and panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The tokenizer in {folder} cannot be read ({reason}): copy it again.") from error


def changed_tokenizer(path: str | Path):
    """The tokenizer of `load_tokenizer` of the model that `path` names, if it reads texts otherwise than transformers reads
    the model's; else None, also where this machine does not have the model. Nothing is downloaded.
    """
    folder = _folder_here(path)
    tokenizer = None if folder is None else load_tokenizer(folder)
    steps = _normalizers(tokenizer)
    return tokenizer if [step["type"] for step in steps] == ["Prepend", "Replace", "Replace"] else None


def _normalizers(tokenizer) -> list[dict]:
    """The steps of its normalizer, where it is a sequence."""
    from tokenizers import normalizers

    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    known = json.loads(normalizer.__getstate__()) if isinstance(normalizer, normalizers.Sequence) else {}
    return known.get("normalizers", [])


def _without_doubled_space(tokenizer):
    """`tokenizer`, which no longer puts a space before a text that begins with one.

    Tokenizers like Mistral 7B v0.1's do, so that every x and y behind its separator would begin with an empty word;
    SentencePiece, which they were made from, and the newer ones do not. mend_distiller.py does the same (`_as_trained`), for it
    stands alone; other exports hold the changed tokenizer (`changed_tokenizer`).
    """
    from tokenizers import Regex, normalizers

    steps = _normalizers(tokenizer)
    if [step["type"] for step in steps] == ["Prepend", "Replace"] and steps[0]["prepend"] == steps[1]["content"]:
        space = steps[0]["prepend"]
        # \A and not ^, which is the beginning of every line.
        once = normalizers.Replace(Regex(rf"\A{space}{space}"), space)
        steps = [normalizers.Prepend(space), normalizers.Replace(" ", space), once]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer
