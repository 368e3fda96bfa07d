"""T5 (Raffel et al., 2020): v1.0 (ReLU, tied and scaled head), v1.1, its LM-adapted and Flan versions (gated GELU, a
head of its own, or where the file has none the token table, not scaled: what transformers 5 makes).
"""

from mend_jax.cli.errors import UserError
from mend_jax.models.config import EncoderDecoderConfig
from mend_jax.models.tables import Entry, Table, linear, stacked

ACTIVATIONS = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True)}  # feed_forward_proj: activation, gated
# Copies of the token table under other names, and a bias that v1.0's files hold though nothing reads it.
DERIVED = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def read(hf: dict) -> EncoderDecoderConfig:
    """The settings of a `config.json`."""
    inside = hf.get("feed_forward_proj", "relu")
    if inside not in ACTIVATIONS:
        raise UserError(
            f"config.json says feed_forward_proj={inside!r}, which is not supported for t5: only {', '.join(ACTIVATIONS)}."
        )
    activation, gated = ACTIVATIONS[inside]
    decoder_layers = hf.get("num_decoder_layers")
    # As transformers 5 reads them: it writes tie_word_embeddings=true for every T5, and v1.1's false meant "not scaled".
    tied = hf.get("tie_word_embeddings") is not False
    return EncoderDecoderConfig(
        family="t5",
        vocab_size=hf["vocab_size"],
        width=hf["d_model"],
        layers=hf["num_layers"],
        decoder_layers=hf["num_layers"] if decoder_layers is None else decoder_layers,
        heads=hf["num_heads"],
        head_width=hf["d_kv"],
        mlp_width=hf["d_ff"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        activation=activation,
        gated=gated,
        buckets=hf.get("relative_attention_num_buckets", 32),
        max_distance=hf.get("relative_attention_max_distance", 128),
        tied_head=tied,
        scaled_head=bool(hf.get("scale_decoder_outputs", tied)),
        start_token=hf.get("decoder_start_token_id") or 0,
    )


def write(config: EncoderDecoderConfig) -> dict:
    """The inverse of `read`."""
    names = {value: name for name, value in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "num_layers": config.layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": names[config.activation, config.gated],
        "scale_decoder_outputs": config.scaled_head,
        "decoder_start_token_id": config.start_token,
        "is_encoder_decoder": config.decoder_layers > 0,
        "dropout_rate": 0.0,
    }


def table(config: EncoderDecoderConfig) -> Table:
    """The names of T5ForConditionalGeneration, or of T5EncoderModel where there is no decoder."""
    names = {"shared.weight": Entry(("embed", "tokens"), (config.vocab_size, config.width))}
    names |= _stack(config, "encoder", config.layers)
    return names | (_stack(config, "decoder", config.decoder_layers) if config.decoder_layers else {})


def derived(name: str) -> bool:
    """Whether a file's tensor is a copy of another, or is never read."""
    return name in DERIVED


def _stack(config, side: str, layers: int) -> Table:
    D, M, mlp = config.width, config.mlp_width, 1 if side == "encoder" else 2
    rows = _attention(config, "layer.0.SelfAttention", "self") | _norm("layer.0.layer_norm", "norm1", D)
    if side == "decoder":
        rows |= _attention(config, "layer.1.EncDecAttention", "cross") | _norm("layer.1.layer_norm", "cross_norm", D)
    inside = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
    for theirs, ours in inside.items():
        rows |= linear(f"layer.{mlp}.DenseReluDense.{theirs}", ours, D, M, bias=False)
    rows |= linear(f"layer.{mlp}.DenseReluDense.wo", "down", M, D, bias=False)
    rows |= _norm(f"layer.{mlp}.layer_norm", "norm2", D)
    names = stacked("block", layers, rows)
    # One table of biases for all layers of a stack, kept with the first.
    names["block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = Entry(
        ("distance_bias",), (config.buckets, config.heads)
    )
    names |= _norm("final_layer_norm", "final_norm", D)
    return {f"{side}.{name}": entry._replace(path=(side, *entry.path)) for name, entry in names.items()}


def _attention(config, name: str, path: str) -> Table:
    D, W = config.width, config.heads * config.head_width
    rows = {}
    for part in "qkv":
        rows |= linear(f"{name}.{part}", (path, part), D, W, bias=False)
    return rows | linear(f"{name}.o", (path, "out"), W, D, bias=False)


def _norm(name: str, path: str, width: int) -> Table:
    return {f"{name}.weight": Entry((path, "scale"), (width,))}
