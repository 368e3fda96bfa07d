"""The rules by which parameters are split over a mesh, and what is said where they cannot be."""

import math

import jax
import pytest
from family_sizes import SIZES

from mend_jax.cli.errors import UserError
from mend_jax.models.families import from_hf_config
from mend_jax.models.folders import init_params
from mend_jax.run import sharding

T5 = {"model_type": "t5", "vocab_size": 32128, "d_model": 2048, "num_layers": 24, "num_heads": 32, "d_kv": 64}
T5 |= {"d_ff": 5120, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 1280, "n_layer": 36, "n_head": 20}
MODELS = {
    "gpt2-large": GPT2,
    "flan-t5-xl": T5,
    **{name: SIZES[name][0] for name in ("opt-350m", "opt-6.7b", "Llama-2-7b", "Qwen2.5-7B", "Qwen3-8B")},
}
EIGHT = {"data": 1, "fsdp": 2, "tensor": 4}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_rule_and_almost_all_bytes_are_split(name):
    shapes = jax.eval_shape(lambda: init_params(from_hf_config(MODELS[name]), 0))
    placed = sharding.shardings(shapes, sharding.make_mesh(EIGHT))
    leaves = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True))
    held = sum(math.prod(place.shard_shape(leaf.shape)) for leaf, place in leaves)
    assert held < 1.02 / 8 * sum(leaf.size for leaf, _ in leaves)
    assert all(place.spec[0] is None for leaf, place in leaves if leaf.ndim == 3)  # the layers are scanned over


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("opt_state/1/0/mu/backbone/layers/up/kernel", (12, 768, 3072), (None, "fsdp", "tensor")),
        ("layers/down/kernel", (12, 3072, 768), (None, "tensor", "fsdp")),
        ("layers/up/kernel_scale", (12, 3072), (None, "tensor")),
        ("encoder/layers/self/q/kernel", (12, 768, 768), (None, "fsdp", "tensor")),
        ("embed/tokens_scale", (50257,), (None,)),
        ("step", (), ()),
    ],
)
def test_rules(path, shape, spec):
    assert tuple(sharding.spec_of(path, shape, EIGHT)) == spec


def test_a_path_without_a_rule_is_one_sentence():
    message = r"No rule says how to shard the parameter layers/router/kernel \(2, 8, 8\): add one to .*sharding.py"
    with pytest.raises(UserError, match=message):
        sharding.spec_of("layers/router/kernel", (2, 8, 8), EIGHT)


def test_a_mesh_that_does_not_divide_the_model_is_one_sentence():
    message = (
        r"mesh.tensor=4 does not divide the 30 numbers along axis 2 of layers/q/kernel \(2, 32, 30\): use a divisor"
    )
    with pytest.raises(UserError, match=message):
        sharding.spec_of("layers/q/kernel", (2, 32, 30), EIGHT)
    with pytest.raises(UserError, match="mesh.fsdp=2 x mesh.tensor=4 does not divide the 12 numbers along axis 1"):
        sharding.spec_of("embed/tokens", (50, 12), EIGHT)
    with pytest.raises(UserError, match="mesh.tensor=8 does not divide the 20 heads of gpt2-large: use a divisor"):
        sharding.check_heads(from_hf_config(GPT2), 8, "gpt2-large")
    sharding.check_heads(from_hf_config(GPT2), 4, "gpt2-large")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 1), (2, 4, 1)), ((2, 2, 2), (2, 2, 2)), ((1, 8, -1), (1, 8, 1))],
)
def test_sizes_of_the_mesh(wanted, found):
    wanted, found = (dict(zip(sharding.AXES, sizes, strict=True)) for sizes in (wanted, found))
    assert sharding.mesh_sizes(wanted, 8) == found


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, -1, 1), "mesh.data=3 x mesh.fsdp=-1 x mesh.tensor=1 does not fit 8 devices: their product must be 8"),
        ((2, 2, 1), "does not fit 8 devices"),
        ((16, -1, 1), "does not fit 8 devices"),
        ((-1, -1, 1), "may be -1"),
        ((0, 8, 1), "each size must be a number of devices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_one_sentence(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.mesh_sizes(dict(zip(sharding.AXES, sizes, strict=True)), 8)
