"""Model families: a Hugging Face `config.json` read as our settings, and written back.

A family is a file of its own: `read` and `write` (config.json <-> `DecoderConfig`), and `table`, which says where each
tensor of its files lives in our tree. Weights are read and written by `weights.py`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mend_jax.cli.errors import UserError
from mend_jax.models.config import DecoderConfig, EncoderDecoderConfig
from mend_jax.models.families import gemma, gpt2, llama, opt, t5
from mend_jax.models.gguf.config import hf_fields
from mend_jax.models.gguf.header import is_gguf
from mend_jax.models.sizes import require_fields
from mend_jax.models.tables import Entry, Table
from mend_jax.run import reading

__all__ = [
    "Config",
    "DecoderConfig",
    "EncoderDecoderConfig",
    "Family",
    "FAMILIES",
    "family_of",
    "from_hf_config",
    "key_table",
    "to_hf_config",
]

Config = DecoderConfig | EncoderDecoderConfig


class Family(NamedTuple):
    """How models of one `model_type` are described and stored."""

    read: Callable[[dict], Config]
    write: Callable[[Config], dict]
    table: Callable[[Config], Table]  # of the base model, without the head
    derived: Callable[[str], bool]  # whether a file's tensor follows from the rest and is passed over
    prefix: str  # of the base model's names in a file with a head
    lm_class: str  # of transformers
    base_class: str
    other_prefixes: tuple[str, ...] = ()  # of the same names, in files of a larger model that it is a part of

    def bare(self, name: str) -> str:
        """A file's name of a tensor, without a prefix."""
        return name.removeprefix(next((p for p in (*self.other_prefixes, self.prefix) if name.startswith(p)), ""))


def _family(module, prefix: str, lm_class: str, base_class: str, *other_prefixes: str) -> Family:
    return Family(module.read, module.write, module.table, module.derived, prefix, lm_class, base_class, other_prefixes)


_GEMMA_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.")
_GEMMA = _family(gemma, "model.", "Gemma3ForCausalLM", "Gemma3TextModel", *_GEMMA_PREFIXES)


FAMILIES = {
    "gpt2": _family(gpt2, "transformer.", "GPT2LMHeadModel", "GPT2Model"),
    "opt": _family(opt, "model.", "OPTForCausalLM", "OPTModel"),
    "llama": _family(llama, "model.", "LlamaForCausalLM", "LlamaModel"),
    "mistral": _family(llama, "model.", "MistralForCausalLM", "MistralModel"),
    "qwen2": _family(llama, "model.", "Qwen2ForCausalLM", "Qwen2Model"),
    "qwen3": _family(llama, "model.", "Qwen3ForCausalLM", "Qwen3Model"),
    "gemma3_text": _GEMMA,
    "gemma3": _GEMMA,  # its text part
    "t5": _family(t5, "", "T5ForConditionalGeneration", "T5EncoderModel"),
}
HEAD = "lm_head.weight"  # in every family, without the prefix


def from_hf_config(source: dict | str | Path) -> Config:
    """Settings of the model described by a `config.json`: its content, its path, its folder's path, or a GGUF file in its
    place. Raises UserError."""
    if isinstance(source, dict):
        return _from_fields(source)
    fields = read_json(Path(source))
    try:
        return _from_fields(fields)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def family_of(source: dict) -> str:
    """The key of FAMILIES that a `config.json` names. Raises UserError where it is none."""
    model_type = source.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported: use one of {', '.join(sorted(FAMILIES))}.")
    return model_type


def _from_fields(source: dict) -> Config:
    model_type = family_of(source)
    if source.get("quantization_config"):
        raise UserError(
            f"config.json of a {model_type} model says that its weights are quantised (quantization_config): take the model "
            'that they were made from, and llm.weights="int8" for 8 bits.'
        )
    require_fields(source, model_type)
    try:
        config = FAMILIES[model_type].read(source)
    except KeyError as missing:
        raise UserError(
            f"config.json of a {model_type} model lacks the field {missing}: take the model's own file."
        ) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"config.json of a {model_type} model holds a wrong value ({error}): take the model's own file."
        ) from None
    config = _of_its_types(config, model_type)
    if isinstance(config, DecoderConfig):
        _check_heads(config, source)
    return config


def _of_its_types(config: Config, model_type: str) -> Config:
    """`config`, in which a truth that config.json has as null is false, as for transformers. Raises UserError for a number that is null."""
    nothing = {field.name: field.type for field in dataclasses.fields(config) if getattr(config, field.name) is None}
    number = next((name for name, kind in nothing.items() if kind in (int, float)), None)
    if number:
        raise UserError(f"config.json of a {model_type} model has null for its {number}: take the model's own file.")
    return dataclasses.replace(config, **{name: False for name, kind in nothing.items() if kind is bool})


def _check_heads(config: DecoderConfig, source: dict) -> None:
    # A width of heads that is given need not follow from the others.
    if config.hidden_width % config.heads and not source.get("head_dim"):
        raise UserError(
            f"config.json says width {config.hidden_width} and {config.heads} heads: the width must be a multiple."
        )
    if config.heads % config.kv_heads:
        raise UserError(
            f"config.json says {config.heads} heads and {config.kv_heads} of keys and values: the first must be a multiple."
        )


def to_hf_config(config: Config, head: bool = True) -> dict:
    """The inverse of `from_hf_config`: a `config.json` that transformers reads, of the model with or without its head."""
    family = FAMILIES[config.family]
    return {
        "architectures": [family.lm_class if head else family.base_class],
        "model_type": config.family,
        **family.write(config),
        "tie_word_embeddings": config.tied_head,
    }


def key_table(config: Config) -> Table:
    """Their name, without the family's prefix -> our place, in the order of the model."""
    table = FAMILIES[config.family].table(config)
    return table if config.tied_head else table | {HEAD: Entry(("embed", "head"), (config.vocab_size, config.width))}


def file_says_head(config: Config) -> bool:
    """Whether files of such a model come with a head of its own and without one, whatever config.json says of it.

    T5's do, but for v1.0's: transformers 5 calls every T5 tied, and takes the token table where a file has no head.
    """
    return isinstance(config, EncoderDecoderConfig) and not (config.tied_head and config.scaled_head)


def read_json(path: Path) -> dict:
    """The object that a JSON file, or a folder's config.json, holds; of a GGUF file what a config.json would say."""
    if is_gguf(path):
        return hf_fields(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        return reading.read_json(path, "copy the model's folder again")
    except FileNotFoundError:
        found = next(iter(sorted(path.parent.glob("*.gguf"))), None)
        what = f"name the GGUF file beside it, {found}" if found else "a Hugging Face model folder holds a config.json"
        raise UserError(f"{path} is not there: {what}.") from None
