"""What one decoder-only transformer is: its sizes and choices. A family (families.py) reads them from a config.json."""

import dataclasses
from typing import ClassVar

from mend_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of one decoder-only transformer; hashable, so that it may be a static argument.

    The defaults are GPT-2's. A size of 0 stands for its usual value and is replaced by it.
    """

    family: str  # Hugging Face's `model_type`
    vocab_size: int
    width: int  # D: of the embeddings that it reads, and of the states that it gives
    layers: int
    heads: int
    mlp_width: int
    max_positions: int  # of config.json; `window` is what can be read at once
    norm_eps: float = 1e-5
    hidden_width: int = 0  # inside the layers; another than D in opt-350m alone, which projects at both ends
    kv_heads: int = 0  # heads of keys and values; fewer than `heads`: grouped-query attention (Ainslie et al., 2023)
    head_width: int = 0
    activation: str = "gelu_tanh"  # or "relu", "silu"
    gated: bool = False  # the MLP is down(activation(gate(x)) * up(x)) (Shazeer, 2020)
    rms_norm: bool = False  # instead of LayerNorm
    norm_adds_one: bool = False  # a norm scales by 1 + what its file holds (Gemma)
    norm_first: bool = True  # before attention and MLP; else after their residuals (opt-350m)
    post_norms: bool = False  # also after attention and MLP, before their residuals (Gemma)
    final_norm: bool = True
    fused_qkv: bool = True  # one kernel for queries, keys and values
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False  # RMSNorm of every head's queries and keys
    position_offset: int = 0  # rows of the position table before that of position 0
    rope: Rope | None = None  # rotary positions instead of a position table
    sliding: tuple[bool, ...] = ()  # of each layer, whether it slides; (): none does
    attention_span: int = 0  # tokens that a token of a sliding layer sees, itself included
    sliding_rope: Rope | None = None  # rotary positions of the sliding layers; None: `rope`
    score_width: int = 0  # scores are divided by its root; its usual value is `head_width`
    embed_scale: float = 1.0  # what reads a token is its row of the table times this
    tied_head: bool = True  # the head is the token table

    def __post_init__(self):
        usual = {"hidden_width": self.width, "kv_heads": self.heads}
        usual["head_width"] = (self.hidden_width or self.width) // self.heads
        usual["score_width"] = self.head_width or usual["head_width"]
        for name, value in usual.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        # So a model with fewer layers, or more, is this one with another number of `layers`.
        object.__setattr__(self, "sliding", _continued(self.sliding, self.layers))

    @property
    def window(self) -> int:
        """Tokens and vectors the model can read at once."""
        return self.max_positions

    @property
    def headless(self) -> "DecoderConfig":
        """The same model without a head of its own: what a distiller's backbone is."""
        return dataclasses.replace(self, tied_head=True)


def _continued(kinds: tuple[bool, ...], count: int) -> tuple[bool, ...]:
    """The first `count` of the layers' kinds; where there are fewer, they go on as they repeat."""
    if not any(kinds):
        return ()
    period = next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i - n] for i in range(n, len(kinds))))
    found = tuple(kinds[i] if i < len(kinds) else kinds[i % period] for i in range(count))
    return found if any(found) else ()


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes and choices of one encoder–decoder (T5's family); hashable. The defaults are T5's of 2019 (v1.0)."""

    family: str  # Hugging Face's `model_type`
    vocab_size: int
    width: int  # D
    layers: int  # of the encoder
    decoder_layers: int  # 0: the encoder alone, which a distiller's backbone is
    heads: int
    head_width: int  # does not follow from the others
    mlp_width: int
    norm_eps: float = 1e-6
    activation: str = "relu"  # or "gelu_tanh"
    gated: bool = False  # as in `DecoderConfig`
    buckets: int = 32  # of distances between tokens, each with a bias per head
    max_distance: int = 128  # farther tokens share a bucket
    tied_head: bool = True  # the head is the token table
    scaled_head: bool = True  # the head reads states scaled by D^-0.5
    start_token: int = 0  # what the decoder reads first
    embed_scale: ClassVar[float] = 1.0  # as in `DecoderConfig`

    @property
    def window(self) -> int:
        """Tokens the model can read at once: distances have no end, so the budgets of `config.data` alone bind."""
        return 2**30

    @property
    def headless(self) -> "EncoderDecoderConfig":
        """The encoder alone: what a distiller's backbone is."""
        return dataclasses.replace(self, decoder_layers=0, tied_head=True, scaled_head=True)
