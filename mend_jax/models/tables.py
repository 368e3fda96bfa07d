"""What key tables are made of: where each tensor of a Hugging Face file lives in our tree."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mend_jax.cli.errors import UserError


class Entry(NamedTuple):
    """Where a tensor lives in our tree, and its shape in the file."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False  # the file has (out, in), PyTorch's Linear; our kernels are (in, out)
    layer: int | None = None  # the index in the stack of layers; None: not stacked
    layers: int = 0  # of the stack

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Its shape in our tree, without the axis of layers."""
        return self.shape[::-1] if self.transposed else self.shape


Table = dict[str, Entry]  # their name -> our place, in the order of the model


def stacked(prefix: str, layers: int, rows: Table) -> Table:
    """The rows of one layer for all of them: `prefix`.0.NAME, `prefix`.1.NAME, ..."""
    return {
        f"{prefix}.{i}.{name}": entry._replace(path=("layers", *entry.path), layer=i, layers=layers)
        for i in range(layers)
        for name, entry in rows.items()
    }


def linear(name: str, path: str | tuple[str, ...], width_in: int, width_out: int, bias: bool) -> Table:
    """A PyTorch Linear: NAME.weight (out, in), and NAME.bias."""
    path = (path,) if isinstance(path, str) else path
    table = {f"{name}.weight": Entry((*path, "kernel"), (width_out, width_in), transposed=True)}
    return table | ({f"{name}.bias": Entry((*path, "bias"), (width_out,))} if bias else {})


def check(hf: Mapping, expected: Mapping[str, tuple]) -> None:
    """Raises UserError where a field is none of those expected; the first is what a missing field means.

    What would change the arithmetic must be what the decoder computes, else parity is lost without a word.
    """
    for field, allowed in expected.items():
        if hf.get(field, allowed[0]) not in allowed:
            raise UserError(
                f"config.json says {field}={hf[field]!r}, which is not supported for {hf['model_type']}: "
                f"only {allowed[0]!r}."
            )


SLIDING = {"sliding_attention": True, "full_attention": False}  # what `layer_types` of a config.json says of a layer


def read_sliding(hf: Mapping, kinds: Sequence[bool], usual: int = 4096) -> tuple[tuple[bool, ...], int]:
    """(of each layer whether it slides, tokens that a sliding one sees) of a config.json; ((), 0) where none does.

    `kinds` where it does not list them, `usual` where it does not say how many tokens. Raises UserError for another kind.
    """
    listed, span = hf.get("layer_types"), hf.get("sliding_window", usual)
    wrong = next((kind for kind in listed or () if kind not in SLIDING), None)
    if wrong is not None:
        raise UserError(
            f"config.json says layer_types with {wrong!r}, which is not supported: only {', '.join(SLIDING)}."
        )
    kinds = tuple(SLIDING[kind] for kind in listed) if listed else tuple(kinds)
    if len(kinds) != hf["num_hidden_layers"]:
        raise UserError(
            f"config.json says {hf['num_hidden_layers']} layers and {len(kinds)} of layer_types: take the model's own file."
        )
    return (kinds, span) if span and any(kinds) else ((), 0)


def write_sliding(config) -> dict:
    """The inverse of `read_sliding`."""
    names = {slides: name for name, slides in SLIDING.items()}
    kinds = config.sliding or (False,) * config.layers
    return {"sliding_window": config.attention_span or None, "layer_types": [names[kind] for kind in kinds]}
