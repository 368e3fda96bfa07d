"""The README.md of an exported model: what it is, what it was trained on, and how it is used. Paths stay private."""

import json
from pathlib import Path

NOT_MEASURED = ("step", "learning_rate", "grad_norm", "tokens", "padding")  # of a line of metrics.jsonl

_HEAD = """---
library_name: transformers
tags: [mend, in-context-learning, demonstration-distillation]
---

# {title}

"""

_DISTILLER = """Turns demonstrations (x, y), concatenated, into {num_vectors} vectors that a frozen LLM of width
{llm_width} ({llm}) reads in their place. MEND: Meta dEmonstratioN Distillation for Efficient and Effective
In-Context Learning (Li et al., ICLR 2024). The backbone is a {layers}-layer {family} of width {width};
projection to the LLM's width: {projection}. It reads {window} demonstration tokens.

## Use

In PyTorch, with `mend_distiller.py` of this folder (torch, transformers, safetensors; nothing else):

```python
import torch
from mend_distiller import MendDistiller

distiller = MendDistiller.from_pretrained(folder)
vectors = distiller.distill([("a great film", "positive"), ("dull", "negative")])  # (1, {num_vectors}, {llm_width})
query_ids = tokenizer("I loved it", return_tensors="pt").input_ids  # llm, tokenizer: {llm}, in transformers
embeds = torch.cat([vectors, llm.get_input_embeddings()(query_ids)], dim=1)
logits = llm(inputs_embeds=embeds).logits
```

In JAX: `mend_jax.load_distiller(folder, mend_jax.load_llm(llm_folder)).distill(demos)`.

Every x and y is tokenised behind {separator}. The backbone alone: `AutoModel.from_pretrained(folder)`. Where there
is a folder `release/`, it holds the same distiller in the layout of the method's public PyTorch release.

"""

_SOFT_PROMPT = """{num_vectors} learned vectors (PromptTuning) that a frozen LLM of width {llm_width} ({llm}) reads
before every query: `vectors` ({num_vectors}, {llm_width}) in `soft_prompt.safetensors`.

## Use

```python
import torch
from safetensors.torch import load_file

vectors = load_file("soft_prompt.safetensors")["vectors"][None]
query_ids = tokenizer("I loved it", return_tensors="pt").input_ids  # llm, tokenizer: {llm}, in transformers
embeds = torch.cat([vectors, llm.get_input_embeddings()(query_ids)], dim=1)
logits = llm(inputs_embeds=embeds).logits
```

`python -m mend_jax.evaluate --config.evaluate.methods=NAME=FOLDER` scores it.

"""

_LLM = """A small language model, trained from text and in-context sequences.
`AutoModelForCausalLM.from_pretrained(folder)` reads it.

"""


def distiller_card(config: dict, meta: dict, workdir, distiller) -> str:
    """The card of a `Distiller`; config and meta as its workdir holds them."""
    text = _DISTILLER.format(
        num_vectors=distiller.num_vectors,
        llm_width=distiller.llm_width,
        llm=_name(config["llm"]["path"]),
        layers=distiller.config.layers,
        family=distiller.config.family,
        width=distiller.config.width,
        projection=distiller.projection,
        window="any number of" if distiller.config.window > 2**29 else f"at most {distiller.window}",
        separator={" ": "a space", "\n": "a newline"}[distiller.separator],
    )
    return _HEAD.format(title="A MEND distiller") + text + _training(config, meta, workdir)


def soft_prompt_card(config: dict, meta: dict, workdir, soft_prompt) -> str:
    text = _SOFT_PROMPT.format(
        num_vectors=soft_prompt.num_vectors, llm_width=soft_prompt.llm_width, llm=_name(config["llm"]["path"])
    )
    return _HEAD.format(title="A soft prompt") + text + _training(config, meta, workdir)


def llm_card(config: dict, meta: dict, workdir) -> str:
    return _HEAD.format(title="A language model") + _LLM + _training(config, meta, workdir)


def _training(config, meta, workdir) -> str:
    """The settings that made it and what was measured, as tables."""
    data, loss, optimizer, train = (config[part] for part in ("data", "loss", "optimizer", "train"))
    rows = {"stage": config["stage"], "checkpoint": f"step {meta['step']} of {train['steps']}, the best of the run"}
    if config["stage"] != "lm":
        rows["LLM"] = _name(config["llm"]["path"])
        rows["began with"] = _name(config["prefix"]["start_from"] or config["prefix"]["backbone"])
    if config["stage"] == "finetune":
        rows["tasks"] = f"{_name(data['tasks'])}, partition {data['partition']}, {data['k']} demonstrations per context"
        rows["loss"] = f"{loss['pred']} L_pred + {loss['kd']} L_distill"
    elif config["stage"] == "pretrain":
        rows["text"] = f"{_name(data['text'])}, {data['beta']:.0%} of each text distilled"
        rows["loss"] = f"{loss['kd']} L_distill + {loss['clm']} L_CLM"
    else:
        rows["data"] = (
            f"{data['text_share']:.0%} text of {_name(data['text'])}, the rest tasks of {_name(data['tasks'])}"
        )
    rows["optimizer"] = (
        f"AdamW, {optimizer['learning_rate']:g} with linear decay, {train['batch_size']} sequences a step"
    )
    rows["seed"] = config["seed"]
    measured = _measured(workdir, meta["step"])
    text = "## Training\n\n" + _table(rows)
    return text + ("\n## Measured at this checkpoint\n\n" + _table(measured) if measured else "")


def _measured(workdir, step) -> dict[str, str]:
    """What metrics.jsonl says of a step; a loss that is exactly 0 was not computed."""
    path, values = Path(workdir).expanduser() / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        if row.get("step") == step:
            values |= {name: f"{value:.4f}" for name, value in row.items() if value and name not in NOT_MEASURED}
    return values


def _table(rows) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def _name(path: str) -> str:
    """A hub name as it is; of a folder only its own name: a card is public, a home directory is not."""
    return path if path.count("/") < 2 and not path.startswith(("/", ".", "~")) else Path(path).name
