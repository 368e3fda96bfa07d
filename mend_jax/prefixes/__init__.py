"""What precedes a query: `Prefix`, and one file for each kind of prefix. `KINDS` lists the kinds."""

from mend_jax.prefixes.chunked import Chunked
from mend_jax.prefixes.demonstrations import Demonstrations
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.kind import Kind
from mend_jax.prefixes.nothing import Nothing
from mend_jax.prefixes.soft_prompt import SoftPrompt

KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (Nothing, Demonstrations, SoftPrompt, Distiller, Chunked)}


def kind_of(config) -> type[Kind]:
    """The kind of prefix that a run's config trains (prefix.kind)."""
    return KINDS[config.prefix.kind]
