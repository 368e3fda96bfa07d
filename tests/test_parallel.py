"""pmap and mesh give, on 8 devices, the update that one device computes for the same global batch."""

import jax
import numpy as np
import optax
import pytest
from tiny_training import RandomBatches, config, model_folder

from mend_jax import parallel
from mend_jax.errors import UserError
from mend_jax.llm import load_llm
from mend_jax.prefix import init_distiller
from mend_jax.step import init_state, make_loss_fn, make_train_step

ROWS = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, llm, distiller, batch, the update of one device)."""
    folder = model_folder(tmp_path_factory.mktemp("tiny") / "model")
    c = config(folder, **{"train.batch_size": ROWS, "loss.clm": 0.5})
    llm = load_llm(folder)
    model = init_distiller(c.prefix, llm, 0)
    batch = RandomBatches(c, None, "train", 0, 0, 0, 1)[0].replace(ids=None)
    step = make_train_step(c, make_loss_fn(c, llm, model), optax.sgd(1.0))
    expected = jax.device_get(jax.jit(step)(init_state(model.params, optax.sgd(1.0)), llm.params, batch))
    return c, llm, model, batch, expected


def one_step(run, mode, accumulate, optimizer):
    c, llm, model, batch, _ = run
    c = c.copy_and_resolve_references()
    c.train.accumulate = accumulate
    layout = parallel.make_layout(mode)
    step = make_train_step(c, make_loss_fn(c, llm, model, layout.mesh), optimizer, layout.axis)
    state = layout.replicate(init_state(model.params, optimizer))
    frozen = layout.place_frozen(llm.params)
    state, metrics = layout.compile_step(step)(state, frozen, layout.split(batch))
    return layout.fetch(state), layout.fetch(metrics), frozen


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", parallel.MODES)
def test_update_is_that_of_one_device(mode, accumulate, run):
    """With plain gradient descent and a rate of 1 the update is the gradient itself."""
    assert jax.device_count() == 8
    state, metrics, _ = one_step(run, mode, accumulate, optax.sgd(1.0))
    expected, expected_metrics = run[-1]
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    start = run[2].params
    moved = jax.tree.map(lambda after, before: np.asarray(after) - np.asarray(before), state.params, start)
    wanted = jax.tree.map(lambda after, before: np.asarray(after) - np.asarray(before), expected.params, start)
    assert optax.global_norm(wanted) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-7), moved, wanted)
    assert state.step == 1


def test_large_frozen_weights_are_split_over_the_mesh(run, monkeypatch):
    """And the update stays the same."""
    monkeypatch.setattr(parallel, "SHARD_FROM", 100)
    state, _, frozen = one_step(run, "mesh", 1, optax.sgd(1.0))
    split = [x for x in jax.tree.leaves(frozen) if not x.sharding.is_fully_replicated]
    assert split
    for weight in split:
        assert weight.addressable_shards[0].data.size * 8 == weight.size
    assert frozen["layers"]["up"]["kernel"].sharding.spec[0] is None  # the axis of the layers is scanned over
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, run[-1][0].params)


@pytest.mark.parametrize("mode", parallel.MODES)
def test_state_is_donated_and_what_is_fetched_is_a_copy(mode, run):
    _, llm, model, batch, _ = run
    layout = parallel.make_layout(mode)
    step = layout.compile_step(lambda state, frozen, batch: (state + 1.0, frozen.sum()))
    state = layout.replicate(np.ones((128, 128), np.float32))
    before = layout.fetch(state)
    state, _ = step(state, layout.place_frozen(np.ones((2, 2), np.float32)), layout.split(batch))
    np.testing.assert_array_equal(before, 1)
    np.testing.assert_array_equal(layout.fetch(state), 2)


@pytest.mark.parametrize("mode", parallel.MODES)
def test_validation_loss_is_the_mean_of_all_rows(mode, run):
    c, llm, model, batch, (_, metrics) = run
    layout = parallel.make_layout(mode)
    loss_fn = make_loss_fn(c, llm, model, layout.mesh)
    loss = layout.compile_loss(lambda *args: loss_fn(*args)[0])
    value = loss(layout.replicate(model.params), layout.place_frozen(llm.params), layout.split(batch))
    np.testing.assert_allclose(layout.fetch(value), metrics["loss"], rtol=1e-5)


@pytest.mark.parametrize("size, accumulate, multiple", [(9, 1, 8), (8, 2, 16), (4, 1, 8), (0, 1, 8), (24, 2, 16)])
def test_batch_that_does_not_divide_is_one_sentence(size, accumulate, multiple):
    message = f"train.batch_size={size} does not divide over 8 devices x train.accumulate={accumulate}: use a multiple of {multiple}."
    with pytest.raises(UserError, match=message):
        parallel.check_batch_size(size, accumulate)


def test_batch_that_divides_and_unknown_mode():
    parallel.check_batch_size(32, 4)
    with pytest.raises(UserError, match='train.parallel is "pmpa": it must be one of pmap, mesh'):
        parallel.make_layout("pmpa")
