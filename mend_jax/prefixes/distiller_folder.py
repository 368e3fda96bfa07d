"""The exported folder of a distiller: its settings, weights, card and PyTorch module."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES
from mend_jax.data.bos import NONE, argument, first_lines
from mend_jax.data.templates import QUERY, from_fields, in_words
from mend_jax.models import weights
from mend_jax.models.families import Config, EncoderDecoderConfig, from_hf_config, to_hf_config
from mend_jax.models.folders import load_tokenizer
from mend_jax.prefixes.embeddings import OF_LLM, TRAINED
from mend_jax.prefixes.stored_weights import read_backbone, write_backbone
from mend_jax.run.reading import described, read_json
from mend_jax.run.sharding import Place

PROJECTIONS = tuple(name for name in CHOICES["prefix.projection"] if name != "auto")  # which a distiller has
SETTINGS = "distiller_config.json"  # in an exported folder
TENSORS = "distiller.safetensors"
MODULE = "mend_distiller.py"


CARD = """Turns {demos} into {vectors} that a frozen LLM of width
{llm_width} ({llm}) reads in {whose} place. MEND: Meta dEmonstratioN Distillation for Efficient and Effective
In-Context Learning (Li et al., ICLR 2024). The backbone is a {family} of {layers} layers and width {width};
projection to the LLM's width: {projection}.{residual} It reads {reads}.

## Use

In PyTorch, with this folder's `mend_distiller.py` (needs only torch, transformers and safetensors):

```python
import sys

import torch

# folder: the path of this folder
# llm, tokenizer: {llm} in transformers, by AutoTokenizer and AutoModelForCausalLM (T5: AutoModelForSeq2SeqLM)
sys.path.append(folder)  # for mend_distiller.py
from mend_distiller import MendDistiller

distiller = MendDistiller.from_pretrained(folder{given})
vectors = distiller.distill([("a great film", "positive"), ("dull", "negative")])  # {shape}
# Training put {put}, without special tokens.
query_ids = distiller.query_ids(tokenizer, {said}).to(llm.device)
query = llm.get_input_embeddings()(query_ids)
{first}embeds = torch.cat([{before}vectors.to(query), query], dim=1)  # in the LLM's dtype, on its device
{logits}
```

In JAX: `{load}(folder, mend_jax.load_llm(llm_folder{bos})).distill(demos)`.

{rule}; `distill` does so itself. {alone} If there is a folder `release/`, it holds the same distiller in the layout of the public PyTorch release.

"""
RESIDUAL = " The vectors are added to the embeddings of as many tokens, the last ones that it reads{of}."
WITHOUT_TOKENS = "The backbone reads\nwith the LLM's token embeddings and tokenizer, which this folder does not hold."


def write_folder(
    distiller, folder: str | Path, settings: dict | None = None, dtype: str = "float32", llm: str = ""
) -> None:
    """Writes the distiller as a Hugging Face folder, without card and release files; `settings` replace its own, `dtype` is that
    of the backbone's file (stored_weights.py), `llm` the LLM's name where everybody has it under one."""
    folder, params = Path(folder), distiller.params
    folder.mkdir(parents=True, exist_ok=True)
    of_file = {"dtype": dtype} if dtype == "bfloat16" else {}  # for `from_pretrained(dtype="auto")`
    _write_json(folder / "config.json", to_hf_config(distiller.config, head=False) | of_file)
    write_backbone(folder, distiller.config, params["backbone"], distiller.embeddings, dtype)
    tensors = {"placeholders": np.asarray(params["placeholders"])}
    if "projection" in params:
        tensors["projection.weight"] = np.asarray(params["projection"]["kernel"]).T
        tensors["projection.bias"] = np.asarray(params["projection"]["bias"])
    weights.write_file(_contiguous(tensors), folder / TENSORS)
    _write_json(folder / SETTINGS, (settings or distiller.settings()) | ({"llm": llm} if llm else {}))
    if distiller.tokenizer is not None and distiller.embeddings != OF_LLM:  # else it is the LLM's too
        distiller.tokenizer.save_pretrained(folder)
    shutil.copyfile(Path(__file__).parent / MODULE, folder / MODULE)


def read_folder(folder: Path, place: Place | None = None) -> tuple:
    """What `write_folder` wrote, as `Distiller.of` takes it. Raises UserError if a file is damaged or belongs to another model."""
    settings = read_settings(folder)
    try:
        projection, llm_width, template = settings["projection"], settings["llm_width"], from_fields(settings)
        nested, residual = tuple(map(int, settings.get("nested", ()))), settings.get("residual", False)
        if type(llm_width) is not int or llm_width < 1:
            raise ValueError(f"llm_width is {described(llm_width)}, not a width")
        if type(residual) is not bool or (residual and projection == "tanh"):
            raise ValueError(f"residual is {described(residual)}, not false, or true without a tanh")
        if settings.get("bos", NONE) not in CHOICES["data.bos"]:
            raise ValueError(f"bos is {described(settings['bos'])}, not one of {', '.join(CHOICES['data.bos'])}")
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(folder, error) from None
    if projection not in PROJECTIONS:
        raise UserError(
            f"{folder / SETTINGS} has projection={projection!r}: it must be one of {', '.join(PROJECTIONS)}."
        )
    config, where = from_hf_config(folder), folder / TENSORS
    own = {name: np.asarray(tensor[:], np.float32) for name, tensor in weights.read_file(where)}
    embeddings = settings.get("embeddings", TRAINED)
    params = {"backbone": read_backbone(folder, config, embeddings, place)}
    params["placeholders"] = weights.take(own, "placeholders", (None, config.width), where)
    if projection != "identity":
        kernel = weights.take(own, "projection.weight", (llm_width, config.width), where).T
        params["projection"] = {
            "kernel": np.ascontiguousarray(kernel),
            "bias": weights.take(own, "projection.bias", (llm_width,), where),
        }
    if own:
        raise UserError(f"{where} holds {sorted(own)[0]}, which a {projection} projection does not have.")
    rest = template, settings.get("bos", NONE), embeddings, nested, residual
    return config, params, projection, load_tokenizer(folder), *rest


def read_settings(folder: Path) -> dict:
    """The settings in `SETTINGS` of an exported folder. Raises UserError if the file is damaged."""
    return read_json(folder / SETTINGS, "export the distiller again")


def _unreadable(folder: Path, error) -> UserError:
    return UserError(f"{folder / SETTINGS} cannot be read ({error}): export the distiller again.")


def _contiguous(tensors: Mapping) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _write_json(path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


class InWords(NamedTuple):
    """What a card says of how a distiller reads: "Turns `demos` into `vectors` that an LLM reads in `whose` place. The vectors are
    added to the last tokens that it reads`of`. It reads `reads`."."""

    demos: str
    vectors: str
    reads: str
    whose: str = "their"
    of: str = ""


def card_text(distiller, llm: str, logits: str, shape: str, load: str, words: InWords) -> str:
    """The model card's text; `shape` is that of the result of `distill`, `load` the function that reads the folder."""
    return CARD.format(
        logits=logits,
        **words._asdict(),
        llm_width=distiller.llm_width,
        llm=llm,
        layers=distiller.config.layers,
        family=distiller.config.family,
        width=distiller.config.width,
        projection=distiller.projection,
        residual=RESIDUAL.format(of=words.of) if distiller.residual else "",
        **in_words(distiller.template),
        said=json.dumps(QUERY),
        **first_lines(distiller.bos),
        given=", llm=llm, tokenizer=tokenizer" if distiller.embeddings == OF_LLM else "",
        alone=WITHOUT_TOKENS
        if distiller.embeddings == OF_LLM
        else f"`{_loader(distiller.config)}.from_pretrained(folder)`\nloads the backbone alone.",
        shape=shape,
        load=load,
        bos=argument(distiller.bos),
    )


def _loader(backbone: Config) -> str:
    """The class of transformers that loads an exported backbone: `AutoModel` would add a decoder to T5's encoder."""
    return "T5EncoderModel" if isinstance(backbone, EncoderDecoderConfig) else "AutoModel"
