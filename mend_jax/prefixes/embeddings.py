"""Whose token embeddings a distiller's backbone reads with.

They are the largest part of a small distiller (SmolLM2's: 28 of 57 million parameters), and training changes few of them.
With prefix.train_embeddings=False they stay as they came: no part of the optimiser, of checkpoints or, where they are
the LLM's own, of an exported folder.
"""

import jax.numpy as jnp

from mend_jax.cli.errors import UserError
from mend_jax.models import int8

TRAINED = "trained"
OWN = "own"  # the backbone's, as they came
OF_LLM = "llm"  # the same, and the backbone is the LLM: an exported folder leaves them to it


def whose(config) -> str:
    """TRAINED, OWN or OF_LLM, by a run's config, which may be nested dicts."""
    prefix = config["prefix"]
    if prefix.get("train_embeddings", True):
        return TRAINED
    return OF_LLM if prefix["backbone"] == config["llm"]["path"] else OWN


def without_tokens(backbone) -> tuple[dict, jnp.ndarray]:
    """A backbone's parameters without its token embeddings, and these (V,D)."""
    embed = dict(backbone["embed"])
    tokens = embed.pop("tokens")
    rest = {name: part for name, part in backbone.items() if name != "embed"}
    return (rest | {"embed": embed} if embed else rest), tokens


def with_tokens(backbone, tokens) -> dict:
    """A backbone's parameters with these token embeddings (V,D)."""
    return {**backbone, "embed": {**backbone.get("embed", {}), "tokens": tokens}}


def has_tokens(backbone) -> bool:
    return "tokens" in backbone.get("embed", {})


def of_llm(llm, config):
    """The LLM's token embeddings (V,D) float32. Raises UserError if they are not of the size that `config`'s backbone has."""
    here, wanted = (llm.config.vocab_size, llm.config.width), (config.vocab_size, config.width)
    if here != wanted:
        raise UserError(
            f"This distiller reads with the LLM's token embeddings, {wanted[0]} of width {wanted[1]}, but the LLM has"
            f" {here[0]} of width {here[1]}: use the LLM that it was trained for."
        )
    found = int8.rows(int8.table(llm.params["embed"], "tokens"), jnp.arange(here[0]), jnp.float32)
    return found.astype(jnp.float32)
