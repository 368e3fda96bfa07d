"""The rules by which parameters are split over a mesh, and what is said where they cannot be."""

import math

import jax
import pytest
from facts import says
from family_sizes import SIZES

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
        ("opt_state/1/0/mu/placeholders", (100, 768), (None, None)),
        ("table", (50257, 12), (None, None)),  # of a prefix: no rule names it
    ],
)
def test_rules(path, shape, spec):
    assert tuple(sharding.spec_of(path, shape, EIGHT)) == spec


@pytest.mark.parametrize("path", ["layers/router/kernel", "backbone/router/kernel", "opt_state/1/0/mu/encoder/router"])
def test_a_models_path_without_a_rule_is_one_sentence(path):
    with says(path, "(2, 8, 8)", "mend_jax/run/sharding.py", "train.parallel=pmap"):
        sharding.spec_of(path, (2, 8, 8), EIGHT)


def test_a_mesh_that_does_not_divide_the_model_is_one_sentence():
    with says("mesh.tensor=4", 30, "axis 2", "layers/q/kernel", "(2, 32, 30)"):
        sharding.spec_of("layers/q/kernel", (2, 32, 30), EIGHT)
    with says("mesh.fsdp=2 x mesh.tensor=4", 12, "axis 1", "embed/tokens", "(50, 12)"):
        sharding.spec_of("embed/tokens", (50, 12), EIGHT)
    with says("mesh.tensor=8", "20 heads", "gpt2-large"):
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
    ("sizes", "facts"),
    [
        ((3, -1, 1), ["mesh.data=3 x mesh.fsdp=-1 x mesh.tensor=1", "8 devices", "product"]),
        ((2, 2, 1), ["mesh.data=2 x mesh.fsdp=2 x mesh.tensor=1", "8 devices", "product"]),
        ((16, -1, 1), ["mesh.data=16 x mesh.fsdp=-1 x mesh.tensor=1", "8 devices", "product"]),
        ((-1, -1, 1), ["mesh.data=-1 x mesh.fsdp=-1 x mesh.tensor=1", "number of devices", -1]),
        ((0, 8, 1), ["mesh.data=0 x mesh.fsdp=8 x mesh.tensor=1", "number of devices", -1]),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_one_sentence(sizes, facts):
    with says(*facts):
        sharding.mesh_sizes(dict(zip(sharding.AXES, sizes, strict=True)), 8)
