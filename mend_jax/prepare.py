"""Tokenise a config's text and tasks once, so that training only reads token ids.

    python -m mend_jax.prepare --config=configs/base.py --config.llm.path=gpt2 \\
        --config.data.text=c4/ --config.data.tasks=metaicl/

Files go to config.data.cache, keyed by the tokenizer and the source. `mend_jax.train` finds them there, or makes them itself
if this command was not run. An interrupted run resumes where it stopped. If prefix.backbone has another tokenizer than the
LLM, both tokenise each text. Test and dev examples are few, so evaluation tokenises them itself.
"""

from mend_jax.cli import command_line as cli
from mend_jax.cli.errors import UserError
from mend_jax.data import prepared
from mend_jax.data.batches import find_tasks
from mend_jax.data.tokenize import check_backbone, check_tokenizer, other_tokenizer
from mend_jax.models.families import from_hf_config
from mend_jax.models.folders import load_tokenizer, local_folder
from mend_jax.prefixes import kind_of


def prepare(config) -> dict:
    """Tokenises config.data.text and config.data.tasks, whichever are set; returns {"text": manifest, "tasks": manifest}.

    Raises:
        UserError: bad input, a tokenizer that does not fit the LLM, a full disk.
    """
    folder = local_folder(config.llm.path)
    settings, tokenizer = from_hf_config(folder), load_tokenizer(folder)
    check_tokenizer(tokenizer, settings.vocab_size, config.llm.path)
    if not config.data.text and not config.data.tasks:
        raise UserError("There is nothing to prepare: set config.data.text, config.data.tasks or both.")
    own, made = _distiller_tokenizer(config, tokenizer), {}
    if config.data.text:
        made["text"] = prepared.prepare_text(config, tokenizer, own)
    if config.data.tasks:
        tasks = find_tasks(config, "train")
        made["tasks"] = prepared.prepare_tasks(config, tokenizer, tasks, distiller_tokenizer=own)
    return made


def _distiller_tokenizer(config, tokenizer):
    """The tokenizer of the distiller's backbone if it gives texts other token ids than the LLM's does, else None."""
    backbone = "" if config.stage == "lm" else kind_of(config).backbone(config)
    if not backbone:
        return None
    folder = local_folder(backbone)
    own = load_tokenizer(folder)
    check_backbone(tokenizer, own, from_hf_config(folder).vocab_size, backbone)
    return other_tokenizer(tokenizer, own)


def main(config) -> None:
    for kind, manifest in prepare(config).items():
        shards = manifest["shards"]
        items, tokens = (sum(shard[count] for shard in shards) for count in ("items", "tokens"))
        what = "documents" if kind == "text" else "examples"
        print(f"{kind}: {items:,} {what}, {tokens:,} tokens, {len(shards)} files in {config.data.cache}")


if __name__ == "__main__":
    cli.run(main, keeps=True)
