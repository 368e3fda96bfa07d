"""Which values the numbers of a model's config.json may have: held against these before anything is made of so many.

A field that a family does not read may have any value.
"""

import math
from collections.abc import Mapping

from mend_jax.cli.errors import UserError
from mend_jax.run.reading import described

LAYERS, HEADS, WIDTH, TABLE, POSITIONS = 2**12, 2**14, 2**20, 2**26, 2**31 - 1  # the most, far beyond any model
SIZES = {  # whole numbers: (least, most); by the names of all families
    **dict.fromkeys(("n_layer", "num_hidden_layers", "num_layers"), (1, LAYERS)),
    "num_decoder_layers": (0, LAYERS),
    **dict.fromkeys(("n_head", "num_attention_heads", "num_heads", "num_key_value_heads"), (1, HEADS)),
    **dict.fromkeys(("n_embd", "hidden_size", "d_model", "word_embed_proj_dim"), (1, WIDTH)),
    **dict.fromkeys(("n_inner", "intermediate_size", "ffn_dim", "d_ff"), (1, WIDTH)),
    **dict.fromkeys(("head_dim", "d_kv", "query_pre_attn_scalar"), (1, WIDTH)),
    "vocab_size": (1, TABLE),
    **dict.fromkeys(("n_positions", "n_ctx", "max_position_embeddings"), (1, POSITIONS)),
    **dict.fromkeys(("sliding_window", "max_window_layers"), (0, POSITIONS)),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), (1, LAYERS)),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), (1, POSITIONS)),
    "decoder_start_token_id": (0, TABLE),
}
NUMBERS = (  # more than 0
    *("layer_norm_epsilon", "rms_norm_eps", "rope_theta", "rope_local_base_freq"),
    *("partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
TRUTHS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "do_layer_norm_before", "enable_bias"),
    *("_remove_final_layer_norm", "scale_decoder_outputs"),
)
TEXTS = ("rope_type", "type", "feed_forward_proj")
PARTS = ("text_config", "rope_scaling", "rope_parameters", "full_attention", "sliding_attention")  # objects within it


def require_fields(hf: Mapping, model: str) -> None:
    """Raises UserError, which names the field, for a value that no model has; null stands for a field's usual value.

    `model` is its `model_type`.
    """
    for name, value in hf.items():
        if value is None:
            continue
        if name in SIZES:
            least, most = SIZES[name]
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise _wrong(model, name, value, f"a whole number from {least} to {most:,}")
        elif name in NUMBERS:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
            if not fits or not math.isfinite(value) or value <= 0:
                raise _wrong(model, name, value, "a number above 0")
        elif name in TRUTHS and not isinstance(value, bool):
            raise _wrong(model, name, value, "true or false")
        elif name in TEXTS and not isinstance(value, str):
            raise _wrong(model, name, value, "a text")
        elif name in PARTS:
            if not isinstance(value, dict):
                raise _wrong(model, name, value, "an object")
            require_fields(value, model)


def _wrong(model: str, name: str, value, wanted: str) -> UserError:
    return UserError(
        f"config.json of a {model} model says {name} is {described(value)}, not {wanted}: take the model's own file."
    )
