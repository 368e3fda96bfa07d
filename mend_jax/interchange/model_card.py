"""The README.md of an exported model: what it is, how to use it and how it was trained. Paths stay private."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from mend_jax.cli.text import markdown
from mend_jax.data.bos import NONE, in_python
from mend_jax.data.templates import QUERY, chosen, in_words
from mend_jax.objectives import Numbers, Objective
from mend_jax.run.best import lines_until

NOT_MEASURED = ("step", "learning_rate", "grad_norm", "tokens", "padding")  # fields of a line of metrics.jsonl
FORWARD_KL = Objective().name  # the paper's

_TRAINING = "## Training\n"  # begins the part of a card that `again_card` takes over

_HEAD = """---
library_name: transformers
tags: [mend, in-context-learning, demonstration-distillation]
---

# {title}

"""

_LLM = """A small language model, trained from text and in-context sequences.

## Use

In the sequences, {pieces}.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

llm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
texts = [{texts}]
pieces = tokenizer(texts, add_special_tokens=False).input_ids
logits = llm(torch.tensor([{first}sum(pieces, [])])).logits
```

"""


# The last lines of the snippet of a prefix, by whether the LLM is an encoder–decoder; None: it is not known.
_LOGITS = {
    False: "logits = llm(inputs_embeds=embeds).logits",
    True: """start = torch.tensor([[llm.config.decoder_start_token_id]], device=llm.device)  # the decoder says y
logits = llm(inputs_embeds=embeds, decoder_input_ids=start).logits""",
    None: """inputs = {"inputs_embeds": embeds}
if llm.config.is_encoder_decoder:  # its decoder says y
    inputs["decoder_input_ids"] = torch.tensor([[llm.config.decoder_start_token_id]], device=llm.device)
logits = llm(**inputs).logits""",
}


def prefix_card(config: dict, meta: dict, workdir, model, encoder_decoder: bool | None) -> str:
    """The card of a trained `Kind`; config and meta are those of its workdir.

    `encoder_decoder` says whether the LLM is one; None: it is not known, and the snippet suits both.
    """
    title, text = model.card(public_name(config["llm"]["path"]), _LOGITS[encoder_decoder])
    return _HEAD.format(title=title) + text + _training(config, meta, workdir, type(model).backbone(ConfigDict(config)))


def again_card(path: Path, model, llm: str, encoder_decoder: bool | None) -> str:
    """The card of a `Kind` read from the exported folder or file in `path`; what that folder's card says of the training and
    behind it stays. `llm`: its LLM's name, or ""; `encoder_decoder` is as in `prefix_card`."""
    title, text = model.card(public_name(llm) or "the LLM of its training", _LOGITS[encoder_decoder])
    card = path / "README.md"
    said = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    at = said.find(_TRAINING)
    return _HEAD.format(title=title) + text + (said[at:] if at >= 0 else "")


def llm_card(config: dict, meta: dict, workdir) -> str:
    template = chosen(config["data"]["template"])
    demos = [("a great film", "positive"), ("dull", "negative")]
    texts = [piece for pair in demos for piece in template.example(*pair)] + template.query(QUERY)
    bos = config["data"].get("bos", NONE)
    first = "" if bos == NONE else f"({in_python(bos)}) + "
    use = _LLM.format(pieces=in_words(template)["pieces"], texts=", ".join(map(json.dumps, texts)), first=first)
    return _HEAD.format(title="A language model") + use + _training(config, meta, workdir)


def _training(config, meta, workdir, backbone: str = "") -> str:
    """Tables of the training's settings and of what was measured; `backbone` is that of the kind of prefix, if it has one."""
    data, loss, optimizer, train = (config[part] for part in ("data", "loss", "optimizer", "train"))
    rows = {"stage": config["stage"], "checkpoint": f"step {meta['step']} of {train['steps']}, the best of the run"}
    if config["stage"] != "lm":
        rows["LLM"] = public_name(config["llm"]["path"])
        if began := config["prefix"]["start_from"] or backbone:
            rows["began with"] = public_name(began)
    if config["stage"] == "finetune":
        rows["tasks"] = (
            f"{public_name(data['tasks'])}, partition {data['partition']}, {data['k']} demonstrations per context{_symbols(data)}"
        )
        rows["loss"] = f"{loss['pred']} L_pred + {loss['kd']} L_distill{_objective(loss, 'kd_tokens')}"
    elif config["stage"] == "pretrain":
        rows["text"] = f"{public_name(data['text'])}, {data['beta']:.0%} of each text distilled"
        rows["loss"] = f"{loss['kd']} L_distill{_objective(loss)} + {loss['clm']} L_CLM"
    else:
        rows["data"] = (
            f"{data['text_share']:.0%} text of {public_name(data['text'])}, the rest tasks of {public_name(data['tasks'])}{_symbols(data)}"
        )
        if loss.get("clm_tokens", "all") == "outputs":
            rows["loss"] = "cross-entropy of the outputs"
    rows["optimizer"] = (
        f"AdamW, {optimizer['learning_rate']:g} with linear decay, {train['batch_size']} sequences a step"
    )
    rows["seed"] = config["seed"]
    measured = _measured(workdir, meta["step"])
    text = f"{_TRAINING}\n" + _table(rows)
    return text + ("\n## Measured at this checkpoint\n\n" + _table(measured) if measured else "")


def _symbols(data: dict) -> str:
    """Runs of earlier versions of this program had the tasks' own labels alone."""
    return f", {share:.0%} of them with words for labels" if (share := data.get("symbols", 0.0)) else ""


def _objective(loss: dict, *also: str) -> str:
    """The settings of L_distill, `also` those of a stage, if it is not the paper's; runs of earlier versions of this program have the paper's."""
    if not loss["kd"]:
        return ""
    name, numbers = loss.get("objective", FORWARD_KL), {key: loss[key] for key in Numbers._fields if key in loss}
    paper = name == FORWARD_KL and numbers.get("temperature", 1.0) == 1.0
    told = {} if paper else {"objective": name} | numbers
    told |= {name: loss[name] for name in also if loss.get(name, "all") != "all"}
    return f" ({', '.join(f'loss.{key}={value}' for key, value in told.items())})" if told else ""


def _measured(workdir, step) -> dict[str, str]:
    """The measurements of a step in metrics.jsonl; a loss of exactly 0 was not computed."""
    values = {}
    for row in lines_until(Path(workdir).expanduser(), step):
        if row["step"] == step:
            values |= {name: f"{value:.4f}" for name, value in row.items() if value and name not in NOT_MEASURED}
    return values


def _table(rows) -> str:
    return markdown(["", ""], [[name, str(value)] for name, value in rows.items()]) + "\n"


def public_name(path: str) -> str:
    """A hub name unchanged, or only the last part of a path: a card is public, a home directory is not."""
    return path if path.count("/") < 2 and not path.startswith(("/", ".", "~")) else Path(path).name
