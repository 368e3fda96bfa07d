"""PromptTuning: one learned matrix, whatever the demonstrations (Lester et al., 2021).

Axes: B batch, N demonstration tokens, L vectors.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.text import counted
from mend_jax.data.bos import NONE, argument, first_lines
from mend_jax.data.templates import SPACE, Template, as_fields, chosen, from_fields, in_words, tokenizer_lines
from mend_jax.models import weights
from mend_jax.models.folders import changed_tokenizer
from mend_jax.prefixes.kind import Kind, initial_rows
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.reading import parse_json
from mend_jax.run.sharding import Place

FILE = "soft_prompt.safetensors"

CARD = """{learned} (PromptTuning) that a frozen LLM of width {llm_width} ({llm}) reads
before every query: `vectors` ({num_vectors}, {llm_width}) in `soft_prompt.safetensors`.

## Use

```python
import torch
from safetensors.torch import load_file
{imports}
vectors = load_file(f"{{folder}}/soft_prompt.safetensors")["vectors"][None]
# llm, tokenizer: {llm}, in transformers. Training put {put}, without special tokens.
{loads}{query}
query = llm.get_input_embeddings()(query_ids)
{first}embeds = torch.cat([{before}vectors.to(query), query], dim=1)  # in the LLM's dtype, on its device
{logits}
```

In JAX: `mend_jax.load_prefix(folder, mend_jax.load_llm(llm_folder{bos})).distill()`.

`python -m mend_jax.evaluate --config=CONFIG --workdir=WORKDIR --config.evaluate.methods=NAME=FOLDER{field}` scores it, with the
config of its training.

"""


@dataclasses.dataclass(frozen=True, eq=False)
class SoftPrompt(Kind):
    """L vectors in the LLM's embedding space."""

    name, title, begins_with = "soft_prompt", "a soft prompt", ("soft_prompt",)

    params: Any  # {"vectors": (L, llm_width)}
    bos: str = NONE  # what they stand behind: config.data.bos of their training
    template: Template = SPACE  # the texts around every x and y: that of config.data.template of their training
    tokenizer: Any = None  # the LLM's, for the exported folder, where transformers would read texts otherwise

    @property
    def num_vectors(self) -> int:
        return self.params["vectors"].shape[0]

    @property
    def llm_width(self) -> int:
        return self.params["vectors"].shape[1]

    @classmethod
    def init(cls, config, llm, seed: int, place: Place | None = None) -> "SoftPrompt":
        """A new soft prompt in the LLM's embedding space, initialised by `prefix.placeholder_init`."""
        del place  # it is small
        return cls({"vectors": initial_rows(config.prefix, llm, seed)}, config.data.bos, chosen(config.data.template))

    def apply(self, params, demos, length) -> Prefix:
        """The same L vectors for every row; `demos` (B,N) and `length` are not read."""
        vectors, rows = params["vectors"], demos.shape[0]
        return Prefix(jnp.broadcast_to(vectors, (rows, *vectors.shape)), jnp.full((rows,), len(vectors), jnp.int32))

    def facts(self) -> dict:
        return {"projection": ""}

    @classmethod
    def from_run(cls, config: dict, params, backbone: Path | None) -> "SoftPrompt":
        data = config["data"]
        made = cls._of(params, "the checkpoint", data.get("bos", NONE), chosen(data["template"]))
        return dataclasses.replace(made, tokenizer=changed_tokenizer(config["llm"]["path"]))

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return (folder / FILE).exists()

    @classmethod
    def from_folder(cls, folder: Path, place: Place | None = None) -> "SoftPrompt":
        tensors = {name: tensor[:] for name, tensor in weights.read_file(folder / FILE)}
        metadata = weights.read_metadata(folder / FILE)
        made = cls._of(tensors, folder / FILE, metadata.get("bos", NONE), _read_template(metadata, folder / FILE))
        return dataclasses.replace(made, tokenizer=changed_tokenizer(folder))

    def write(self, folder: Path, dtype: str = "float32", llm: str = "") -> str:
        if dtype != "float32":
            raise UserError(
                f"A soft prompt has few numbers, which are exported as float32: leave --weights={dtype} out."
            )
        metadata = weights.FORMAT | ({} if self.bos == NONE else {"bos": self.bos})
        metadata |= {} if self.template == SPACE else _in_texts(as_fields(self.template))
        weights.write_file({name: np.ascontiguousarray(a) for name, a in self.params.items()}, folder / FILE, metadata)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        return f"A soft prompt: {self.num_vectors} vectors in {FILE}."

    def card(self, llm: str, logits: str) -> tuple[str, str]:
        text = CARD.format(
            learned=counted(self.num_vectors, "learned vector"),
            num_vectors=self.num_vectors,
            llm_width=self.llm_width,
            llm=llm,
            logits=logits,
            **in_words(self.template),
            **first_lines(self.bos),
            **tokenizer_lines(self.tokenizer is not None),
            bos=argument(self.bos),
            field="" if self.bos == NONE else f" --config.data.bos={self.bos}",
        )
        return "A soft prompt", text

    @classmethod
    def _of(cls, params, where, bos: str, template: Template) -> "SoftPrompt":
        vectors = np.asarray(weights.take(dict(params), "vectors", (None, None), where), np.float32)
        return cls({"vectors": jnp.asarray(vectors)}, bos, template)


def _in_texts(fields: dict) -> dict[str, str]:
    """Metadata hold texts alone: another value is put there as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}


def _read_template(metadata: dict[str, str], where: Path) -> Template:
    try:
        fields = (
            {"template": parse_json(metadata["template"], dict)}
            if "template" in metadata
            else {"separator": " "} | metadata
        )
        return from_fields(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The template in {where} cannot be read ({error}): export the soft prompt again.") from None
