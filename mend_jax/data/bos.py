"""What stands before every prefix: the LLM's BOS (beginning of sequence), or nothing. It is decided here alone.

The LLM itself puts it there (llm/frozen.py), before vectors, demonstrations and nothing alike; so training, the teacher,
scoring and stage "lm" read the same. Texts are tokenised without it. What was trained carries the setting with it.
"""

from typing import Any

from mend_jax.cli.errors import UserError

NONE = "false"  # config.data.bos of every run that began before the field was there
TEXT = "a"  # any


def bos_token(setting: str, tokenizer: Any, where: str) -> int | None:
    """The id that stands before every prefix, or None.

    Args:
        setting: config.data.bos: "true", "false", or "auto": where the tokenizer puts its BOS before a text.
        tokenizer: the LLM's, of transformers; None where its folder has none.
        where: the LLM's folder.
    Raises:
        UserError: "true" where there is no tokenizer, or one without a BOS.
    """
    token = getattr(tokenizer, "bos_token_id", None)
    if setting == "true" and token is None:
        raise UserError(f'data.bos="true", but {where} has no tokenizer with a BOS token: set --config.data.bos=false.')
    if setting == NONE or token is None:
        return None
    return token if setting == "true" or tokenizer(TEXT)["input_ids"][:1] == [token] else None


def first_lines(setting: str) -> dict[str, str]:
    """What a card's snippet puts before vectors: {"first": a line that makes its ids, "before": their embeddings}; "" for nothing."""
    if setting == NONE:
        return {"first": "", "before": ""}
    line = (
        f"first_ids = torch.tensor([{in_python(setting)}], dtype=torch.long, device=llm.device)"
        "  # stood before everything in training\n"
    )
    return {"first": line, "before": "llm.get_input_embeddings()(first_ids), "}


def in_python(setting: str) -> str:
    """The same in a model card's words: an expression for the list of ids that stand in front; `tokenizer` is the LLM's."""
    always = "[tokenizer.bos_token_id]"
    choices = {NONE: "[]", "true": always, "auto": f'{always} if tokenizer("{TEXT}").input_ids[:1] == {always} else []'}
    return choices[setting]


def argument(bos: str) -> str:
    """What `load_llm` must be given besides a folder for an LLM that reads with this `bos`: "" or ', bos="auto"'."""
    return "" if bos == NONE else f', bos="{bos}"'
