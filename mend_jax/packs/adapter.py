"""A pack as an adapter of PEFT: a prompt-tuning folder, which puts the vectors before the LLM's input embeddings.

    adapter_config.json          what PEFT reads
    adapter_model.safetensors    prompt_embeddings (l, llm_width)
    tokenizer files              of the LLM, only where transformers reads " x" otherwise than we do (models/folders.py)
    README.md                    how to use the vectors with PEFT, and with transformers alone

PEFT (https://github.com/huggingface/peft) is not needed to write it.
"""

import json
from pathlib import Path

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data.bos import NONE
from mend_jax.data.templates import in_words, tokenizer_lines
from mend_jax.interchange.export import new_folder, written
from mend_jax.interchange.model_card import public_name
from mend_jax.models.config import EncoderDecoderConfig
from mend_jax.models.families import from_hf_config
from mend_jax.models.folders import PACKAGED, changed_tokenizer, local_folder
from mend_jax.models.weights import write_file
from mend_jax.packs.pack import Pack, asking_for_llm, load_pack, require_packs_llm
from mend_jax.run.files import write_json, write_text

CARD = """---
library_name: peft
tags: [mend, in-context-learning, prompt-tuning]
---

# {num_vectors} vectors in the place of {num_demonstrations} demonstrations

For the LLM {llm}; made by a MEND distiller (Li et al., ICLR 2024). {rule}.{hint}

## With PEFT

`pip install peft`, then

```python
import torch
from peft import PeftModel
{imports}
# llm, tokenizer: the LLM and its tokenizer, in transformers; folder: this one
model = PeftModel.from_pretrained(llm, folder)
{loads}{query}
logits = model(input_ids=query_ids{decoder}).logits{behind}
```

## With transformers alone

```python
import torch
from safetensors.torch import load_file
{imports}
vectors = load_file(f"{{folder}}/adapter_model.safetensors")["prompt_embeddings"]
{loads}{query}
query = llm.get_input_embeddings()(query_ids)
embeds = torch.cat([vectors[None].to(query), query], dim=1)  # in the LLM's dtype, on its device
logits = llm(inputs_embeds=embeds{decoder}).logits
mask = torch.ones(embeds.shape[:2], device=llm.device)
answer = llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=16)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
```
"""


def export_pack(path: str | Path, out: str | Path, llm: str = "") -> str:
    """Writes the pack in a file as a PEFT folder, whole or not at all; returns a sentence about it.

    Args:
        path: the pack's file.
        out: a folder that does not exist or is empty.
        llm: where the pack's LLM is; "": where the pack says.
    Raises:
        UserError: no pack, an `out` with content, an LLM that cannot be found or is another one, one that reads a BOS before the
            vectors (no adapter can put one there), a full disk.
    """
    pack, out = load_pack(path), new_folder(out)
    if pack.bos != NONE:
        raise UserError(
            f"{path} stands behind the LLM's BOS, which an adapter cannot put before its vectors: give transformers or vLLM the"
            " embeddings of both (mend_jax.packs.vllm)."
        )
    with asking_for_llm(pack, path, llm):
        config = from_hf_config(local_folder(llm or pack.llm))
    require_packs_llm(pack, path, llm or pack.llm)
    separate = isinstance(config, EncoderDecoderConfig)
    with written(out) as folder:
        tensors = {"prompt_embeddings": np.ascontiguousarray(pack.vectors)}
        write_file(tensors, folder / "adapter_model.safetensors")
        write_json(folder / "adapter_config.json", adapter_config(pack, config, separate), indent=2)
        tokenizer = changed_tokenizer(llm or pack.llm)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", card(pack, separate, tokenizer is not None))
    return f"{pack.num_vectors} vectors as an adapter of PEFT are in {out}: PeftModel.from_pretrained(llm, folder) reads it."


def adapter_config(pack: Pack, config, separate: bool) -> dict:
    """What PEFT's PromptTuningConfig says of these vectors."""
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM" if separate else "CAUSAL_LM",
        "base_model_name_or_path": public_name(pack.llm),
        "inference_mode": True,
        "num_virtual_tokens": pack.num_vectors,
        "token_dim": pack.vectors.shape[1],
        "num_transformer_submodules": 1,  # of an encoder–decoder only the encoder reads them
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "prompt_tuning_init": "RANDOM",  # PEFT wants one; the file's vectors replace it
    }


def card(pack: Pack, separate: bool, own_tokenizer: bool = False) -> str:
    """The folder's README.md; `own_tokenizer`: the folder holds the LLM's tokenizer, as it was read."""
    words = in_words(pack.template)
    start = ", decoder_input_ids=torch.tensor([[llm.config.decoder_start_token_id]], device=llm.device)"
    return CARD.format(
        num_vectors=pack.num_vectors,
        num_demonstrations=pack.num_demonstrations,
        llm=json.dumps(public_name(pack.llm)),
        rule=words["rule"],
        hint=f" `python -m mend_jax.export --llm={pack.llm} --out=FOLDER` writes this LLM."
        if pack.llm in PACKAGED
        else "",
        query=words["query"],
        **tokenizer_lines(own_tokenizer),
        decoder=start if separate else "",
        behind="" if separate else f"[:, {pack.num_vectors}:]  # at the query",
    )
