"""config.json of the decoder-only families: sizes, windows, and what is refused."""

import dataclasses
import math

import family_sizes
import jax
import pytest
from facts import says
from family_rows import COMMON, LLAMA, OPT, ROWS, make_row

from mend_jax.models.decoder import init_params
from mend_jax.models.families import FAMILIES, from_hf_config, key_table, to_hf_config
from mend_jax.models.rope import Rope
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
    with says("model_type 'gemma2'", *FAMILIES):
        from_hf_config({"model_type": "gemma2"})
    assert {"gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma3_text"} <= FAMILIES.keys()


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
        (LLAMA, {"num_attention_heads": 0}, ["llama", "num_attention_heads", 0]),
        (ROWS["gemma3"], {"hidden_activation": "gelu"}, ["hidden_activation='gelu'"]),
        (ROWS["gemma3"], {"final_logit_softcapping": 30.0}, ["final_logit_softcapping=30.0"]),
        (ROWS["gemma3"], {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
        (ROWS["gemma3"], {"layer_types": 6 * ["chunked_attention"]}, ["'chunked_attention'"]),
        (ROWS["gemma3"], {"layer_types": ["full_attention"]}, ["6 layers", "layer_types"]),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(fields, change, facts):
    from_hf_config(COMMON | fields)
    with says(*facts):
        from_hf_config(COMMON | fields | change)
    with says("config.json", "'hidden_size'"):
        from_hf_config({name: value for name, value in (COMMON | fields).items() if name != "hidden_size"})


def test_a_position_beyond_the_window_is_refused(row):
    """A sliding window is no limit: only what its layers see is short."""
    assert row.llm.window == 64
    with says("65 tokens", "LLM", "at most 64", "fewer"):
        demonstrations_prefix(row.llm, [1] * 65)
    prefix = no_prefix(1, row.llm.config.width)
    with says("65 positions", "at most 64"):
        score_options(row.llm, prefix, [1] * 64, [[2, 3]])


GEMMA = ROWS["gemma3"]
PATTERN = {name: value for name, value in GEMMA.items() if name != "layer_types"}


@pytest.mark.parametrize(
    ("fields", "sliding", "span"),
    [
        ({"model_type": "mistral"}, (True, True), 4096),
        ({"model_type": "mistral", "sliding_window": None}, (), 0),
        ({"model_type": "llama", "sliding_window": 8}, (), 0),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, (), 0),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, (), 0),
        (
            {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            (False, True),
            8,
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "full_attention"],
            },
            (),
            0,
        ),
        (GEMMA, (True, True, False) * 2, 7),
        (PATTERN | {"num_hidden_layers": 8}, (True,) * 5 + (False, True, True), 7),
        (PATTERN | {"sliding_window_pattern": 3}, (True, True, False) * 2, 7),
    ],
)
def test_which_layers_slide(fields, sliding, span):
    config = from_hf_config(COMMON | LLAMA | fields | {"max_position_embeddings": 32768})
    assert (config.sliding, config.attention_span, config.window) == (sliding, span, 32768)
    assert from_hf_config(to_hf_config(config)) == config


def test_another_number_of_layers_goes_on_with_the_pattern():
    """As in a model of 26 layers, of which every sixth is full: the last is none of these."""
    whole = from_hf_config(COMMON | PATTERN | {"num_hidden_layers": 26})
    for layers in (3, 6, 25, 30, 40):
        wanted = from_hf_config(COMMON | PATTERN | {"num_hidden_layers": layers})
        assert dataclasses.replace(whole, layers=layers) == wanted


def test_the_text_part_of_gemma_3():
    """The hub's files of larger models name what differs from transformers' usual values alone."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "model_type": "gemma3_text"}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = from_hf_config({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}})
    assert (config.family, config.heads, config.kv_heads, config.head_width, config.vocab_size) == (
        "gemma3_text",
        8,
        4,
        256,
        262208,
    )
    assert (config.attention_span, sum(config.sliding), config.tied_head) == (1024, 29, True)
    assert config.rope == Rope(1e6, "linear", (("factor", 8.0),)) and config.sliding_rope == Rope(1e4)
    assert from_hf_config(to_hf_config(config)) == config
