"""Weights read and made in parts on a mesh are those read and made whole."""

import math
from functools import partial

import jax
import numpy as np
import optax
import pytest
from facts import says, states
from jax.sharding import PartitionSpec
from test_int8 import ROWS, WORDS
from tiny_training import RandomBatches, config

from mend_jax.cli.errors import UserError
from mend_jax.llm.decoder_only import load_llm
from mend_jax.models import weights
from mend_jax.models.families import FAMILIES, from_hf_config
from mend_jax.models.folders import init_model, init_params, load_model, save_model
from mend_jax.models.split_weights import read_split
from mend_jax.prefixes.distiller import Distiller
from mend_jax.run import layout as parallel
from mend_jax.run import sharding
from mend_jax.step import init_state, make_loss_fn, make_train_step

pytestmark = pytest.mark.slow

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module", params=ROWS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = from_hf_config({"model_type": request.param, "vocab_size": WORDS} | ROWS[request.param])
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), init_params(model, 0))
    save_model(folder, model, params, folder)
    return folder


@pytest.mark.parametrize(("dtype", "int8"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_what_is_read_in_parts_is_what_is_read_whole(folder, dtype, int8, monkeypatch):
    shares, getitem = {}, weights._SafeTensor.__getitem__

    def recorded(tensor, index):
        part, size = getitem(tensor, index), math.prod(tensor.shape)
        if len(tensor.shape) == 2 and size >= 1000:  # smaller ones are whole on each device
            shares.setdefault(tensor, []).append(part.size / size)
        return part

    monkeypatch.setattr(weights._SafeTensor, "__getitem__", recorded)
    mesh, config = sharding.make_mesh(SIZES), from_hf_config(folder)
    split = read_split(folder, config, dtype, int8, sharding.placer(mesh))
    monkeypatch.undo()
    whole = weights.read_params(folder, config, dtype, int8)
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    assert jax.tree.map(lambda a: a.dtype, split) == jax.tree.map(lambda a: a.dtype, whole)
    placed = sharding.shardings(split, mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), split, placed)))
    # By 4 of the 8 devices, which differ; in 8 bits whole channels are read for the scales first.
    assert max(max(parts) for parts in shares.values()) <= (1 if int8 else 0.25)
    assert max(sum(parts) for parts in shares.values()) <= (2 if int8 else 1)


def test_what_is_made_in_parts_is_what_is_made_whole(folder):
    place = sharding.placer(sharding.make_mesh(SIZES))
    split, whole = init_model(folder, 3, place=place).params, init_model(folder, 3).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), split, whole)
    assert split["embed"]["tokens"].sharding.spec == PartitionSpec(None, ("fsdp", "tensor"))


@pytest.mark.parametrize("folder", ["opt", "t5"], indirect=True)
@pytest.mark.parametrize("archive", [True, False])
def test_what_is_read_of_pytorch_in_parts_is_the_same(tmp_path, folder, archive, monkeypatch):
    """The hub has opt-6.7b and the T5s as .bin alone. An archive is mapped; a file of before PyTorch 1.6 is read whole."""
    torch = pytest.importorskip("torch")
    model = from_hf_config(folder)
    whole = weights.read_params(folder, model)
    tensors = weights.to_tensors(model, whole).items()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    file = tmp_path / "pytorch_model.bin"
    state = {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors}
    torch.save(state, file, _use_new_zipfile_serialization=archive)
    load, mapped = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **how: mapped.append(how["mmap"]) or load(*args, **how))
    split = load_model(tmp_path, place=sharding.placer(sharding.make_mesh(SIZES))).params
    assert set(mapped) == {archive}
    assert len(mapped) == 1 or archive  # which is opened for each parameter: its pages are given back
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    assert split["embed"]["tokens"].addressable_shards[0].data.size * 4 == whole["embed"]["tokens"].size


def test_mistakes_in_the_files_are_those_of_reading_whole(tmp_path, folder):
    config = from_hf_config(folder)
    tensors = dict(weights.to_tensors(config, weights.read_params(folder, config)))
    name = next(name for name in tensors if tensors[name].ndim == 2)
    del tensors[name]
    weights.write_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / "model.safetensors"
    )
    place = sharding.placer(sharding.make_mesh(SIZES))
    messages = []
    for read in (
        lambda: weights.read_params(tmp_path, config),
        lambda: read_split(tmp_path, config, "float32", False, place),
    ):
        with pytest.raises(UserError) as error:
            read()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    states(messages[0], tmp_path, FAMILIES[config.family].bare(name), "1 keys missing")


@pytest.mark.parametrize("folder", ["qwen3", "t5"], indirect=True)
def test_a_step_with_weights_read_in_parts_in_8_bits_is_that_with_weights_read_whole(folder):
    c = config(folder, stage="finetune", **{"llm.weights": "int8", "train.batch_size": 8})
    batch = RandomBatches(c, None)[0].replace(ids=None)
    (moved, metrics), (expected, expected_metrics) = (
        one_step(c, batch, layout) for layout in (parallel.make_layout("mesh", SIZES), None)
    )
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert optax.global_norm(expected) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), moved, expected)


def one_step(c, batch, layout):
    """(how far plain gradient descent moves each parameter, metrics): on a mesh, or without a layout on one device."""
    place, mesh = (layout.place, layout.mesh) if layout else (None, None)
    llm = load_llm(c.llm.path, weights=c.llm.weights, place=place)
    assert llm.params["embed"]["tokens"].dtype == np.int8
    model, optimizer = Distiller.init(c, llm, 0, place), optax.sgd(1.0)
    step = make_train_step(c, make_loss_fn(c, llm, model, mesh), optimizer)
    start, before = partial(init_state, optimizer=optimizer), jax.tree.map(np.array, model.params)
    if layout:
        state, batch = layout.init(start, model.params), layout.split(batch)
        state, metrics = layout.compile_step(step, state)(state, layout.place_frozen(llm.params), batch)
    else:
        state, metrics = jax.jit(step)(start(model.params), llm.params, batch)
    return jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before), jax.device_get(metrics)


@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
def test_numbers_that_are_not_finite_are_named(tmp_path, folder):
    config = from_hf_config(folder)
    tensors = weights.to_tensors(config, weights.read_params(folder, config))
    tensors["transformer.h.1.mlp.c_fc.weight"] = np.full_like(tensors["transformer.h.1.mlp.c_fc.weight"], np.nan)
    arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    weights.write_file(arrays, tmp_path / "model.safetensors")
    with says("layers/up/kernel", "not finite"):
        read_split(tmp_path, config, "float32", True, sharding.placer(sharding.make_mesh(SIZES)))
