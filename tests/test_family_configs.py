"""config.json of the decoder-only families: sizes, windows, and what is refused."""

import math

import family_sizes
import jax
import pytest
from facts import says
from family_rows import COMMON, LLAMA, OPT, ROWS, make_row

from mend_jax.models.decoder import init_params
from mend_jax.models.families import FAMILIES, from_hf_config, key_table, to_hf_config
from mend_jax.prefixes.demonstrations import demonstrations_prefix
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.scoring.options import score_options

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=ROWS)
def row(request, tmp_path_factory):
    return make_row(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", family_sizes.SIZES)
def test_published_sizes(name):
    fields, published = family_sizes.SIZES[name]
    config = from_hf_config(fields)
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == published
    table = key_table(config)
    assert sum(math.prod(entry.shape) for entry in table.values()) == published
    for path, leaf in jax.tree.leaves_with_path(shapes):  # every parameter has its key, with the shape of the tree
        keys = tuple(key.key for key in path)
        entries = [entry for entry in table.values() if entry.path == keys]
        stack = () if entries[0].layer is None else (len(entries),)
        assert {(*stack, *entry.our_shape) for entry in entries} == {leaf.shape}, keys


def test_an_unknown_model_type_is_told_the_known_ones():
    with says("model_type 'gemma3'", *FAMILIES):
        from_hf_config({"model_type": "gemma3"})
    assert {"gpt2", "opt", "llama", "mistral", "qwen2", "qwen3"} <= FAMILIES.keys()


@pytest.mark.parametrize(
    ("fields", "change", "facts"),
    [
        (OPT, {"activation_function": "gelu"}, ["activation_function='gelu'", "opt"]),
        (OPT, {"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine=False", "opt"]),
        (OPT, {"num_attention_heads": 5}, ["width 24", "5 heads"]),
        (LLAMA, {"hidden_act": "gelu"}, ["hidden_act='gelu'", "llama"]),
        (LLAMA, {"num_key_value_heads": 3}, ["4 heads", 3, "keys and values"]),
        (LLAMA, {"num_attention_heads": 8}, ["heads of width 3", "even"]),
        (LLAMA, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", 1.0]),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, ["RoPE", "'longrope'", "default, linear"]),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, ["RoPE", "'linear'", "factor"]),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "gptq"}},
            ["llama", "quantization_config", 'llm.weights="int8"'],
        ),
        (LLAMA, {"num_attention_heads": None}, ["llama", "wrong value", "NoneType"]),
        (LLAMA, {"num_attention_heads": 0}, ["llama", "wrong value", "zero"]),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(fields, change, facts):
    from_hf_config(COMMON | fields)
    with says(*facts):
        from_hf_config(COMMON | fields | change)
    with says("config.json", "'hidden_size'"):
        from_hf_config({name: value for name, value in (COMMON | fields).items() if name != "hidden_size"})


def test_a_position_beyond_the_window_is_refused(row):
    window = 48 if row.name == "mistral" else 64
    assert row.llm.window == window
    reads = [f"at most {window}", *(["sliding_window=48", "config.json"] if row.name == "mistral" else [])]
    with says(f"{window + 1} tokens", "LLM", *reads, "fewer"):
        demonstrations_prefix(row.llm, [1] * (window + 1))
    prefix = no_prefix(1, row.llm.config.width)
    with says(f"{window + 1} positions", *reads):
        score_options(row.llm, prefix, [1] * window, [[2, 3]])


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, 32768),
        ({"model_type": "llama", "sliding_window": 8}, 32768),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, 32768),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, 32768),
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, 8),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "full_attention"],
            },
            32768,
        ),
    ],
)
def test_a_sliding_window_bounds_the_window_where_it_is_active(fields, window):
    config = from_hf_config(COMMON | LLAMA | fields | {"max_position_embeddings": 32768})
    assert config.window == window
    assert from_hf_config(to_hf_config(config)) == config
