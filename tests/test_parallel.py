"""pmap and mesh give, on 8 devices, the update that one device computes for the same global batch."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from tiny_training import RandomBatches, config, model_folder

from mend_jax.cli.errors import UserError
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes.distiller import Distiller
from mend_jax.run import layout as parallel
from mend_jax.step import init_state, make_loss_fn, make_optimizer, make_train_step

pytestmark = pytest.mark.slow

ROWS = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, llm, distiller, batch, the update of one device)."""
    folder = model_folder(tmp_path_factory.mktemp("tiny") / "model", heads=4)
    c = config(folder, **{"train.batch_size": ROWS, "loss.clm": 0.5})
    llm = load_llm(folder)
    model = Distiller.init(c, llm, 0)
    batch = RandomBatches(c, None)[0].replace(ids=None)
    step = make_train_step(c, make_loss_fn(c, llm, model), optax.sgd(1.0))
    expected = jax.device_get(jax.jit(step)(init_state(model.params, optax.sgd(1.0)), llm.params, batch))
    return c, llm, model, batch, expected


def layout_of(data=1, fsdp=1, tensor=1):
    return parallel.make_layout("mesh", {"data": data, "fsdp": fsdp, "tensor": tensor})


LAYOUTS = {"pmap": lambda: parallel.make_layout("pmap"), "all axes": lambda: layout_of(2, 2, 2)}


def one_step(run, layout, accumulate):
    c, llm, model, batch, _ = run
    c, optimizer = c.copy_and_resolve_references(), optax.sgd(1.0)
    c.train.accumulate = accumulate
    step = make_train_step(c, make_loss_fn(c, llm, model, layout.mesh), optimizer, layout.average)
    state = layout.init(partial(init_state, optimizer=optimizer), model.params)
    frozen = layout.place_frozen(llm.params)
    state, metrics = layout.compile_step(step, state)(state, frozen, layout.split(batch))
    return layout.fetch(state), layout.fetch(metrics)


@pytest.mark.parametrize("name", LAYOUTS)
def test_update_is_that_of_one_device(name, run):
    """With plain gradient descent and a rate of 1 the update is the gradient itself."""
    assert jax.device_count() == 8
    state, metrics = one_step(run, LAYOUTS[name](), accumulate=2)
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


def ten_steps(run, layout):
    """The params after ten steps of training and each step's metrics."""
    c, llm, model, _, _ = run
    optimizer, batches = make_optimizer(c), RandomBatches(c, None)
    step = make_train_step(c, make_loss_fn(c, llm, model, layout.mesh), optimizer, layout.average)
    state, frozen = (
        layout.init(partial(init_state, optimizer=optimizer), model.params),
        layout.place_frozen(llm.params),
    )
    compiled, lines = layout.compile_step(step, state), []
    for i in range(10):
        state, metrics = compiled(state, frozen, layout.split(batches[i].replace(ids=None)))
        lines.append(layout.fetch(metrics))
    return layout.fetch(state.params), lines, (state, frozen)


@pytest.fixture(scope="module")
def by_pmap(run):
    return ten_steps(run, parallel.make_layout("pmap"))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 1, 4)])
def test_ten_steps_of_every_mesh_are_those_of_pmap(sizes, run, by_pmap):
    params, lines, placed = ten_steps(run, layout_of(*sizes))
    start = jax.tree.map(lambda a, b: np.abs(a - b).max(), run[2].params, params)
    assert min(jax.tree.leaves(start)) > 1e-3  # every parameter moved a hundred times more than runs may differ
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params, by_pmap[0])
    for line, expected in zip(lines, by_pmap[1], strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(line[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    parts = sizes[1] * sizes[2]
    for tree in (placed[0].params["backbone"], placed[0].opt_state[1][0].mu["backbone"], placed[1]):
        kernels = [tree["layers"][name]["kernel"] for name in ("qkv", "out", "up", "down")] + [tree["embed"]["tokens"]]
        for weight in kernels:
            assert weight.addressable_shards[0].data.size * parts == weight.size


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_is_donated_and_what_is_kept_is_a_copy(name, run):
    batch, layout = run[3], LAYOUTS[name]()
    state = layout.place_state({"vectors": np.ones((128, 128), np.float32)})
    step = layout.compile_step(lambda state, frozen, batch: (jax.tree.map(lambda x: x + 1.0, state), 0.0), state)
    before, fetched = layout.kept(state), layout.fetch(state)
    state, _ = step(state, {}, layout.split(batch))
    np.testing.assert_array_equal(before["vectors"], 1)
    np.testing.assert_array_equal(fetched["vectors"], 1)
    np.testing.assert_array_equal(layout.fetch(state)["vectors"], 2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_validation_loss_is_the_mean_of_all_rows(name, run):
    c, llm, model, batch, (_, metrics) = run
    layout = LAYOUTS[name]()
    loss_fn = make_loss_fn(c, llm, model, layout.mesh)
    loss = layout.compile_loss(lambda *args: loss_fn(*args)[0])
    value = loss(layout.place_state(model.params), layout.place_frozen(llm.params), layout.split(batch))
    np.testing.assert_allclose(layout.fetch(value), metrics["loss"], rtol=1e-5)


@pytest.mark.parametrize("size, accumulate, multiple", [(9, 1, 8), (8, 2, 16), (4, 1, 8), (0, 1, 8), (24, 2, 16)])
def test_batch_that_does_not_divide_is_one_sentence(size, accumulate, multiple):
    message = f"train.batch_size={size} cannot be divided by 8 devices x train.accumulate={accumulate}: use a multiple of {multiple}."
    with pytest.raises(UserError, match=message):
        parallel.check_batch_size(settings(size, accumulate))


def settings(size, accumulate=1, **mesh):
    c = config("unused", **{"train.batch_size": size, "train.accumulate": accumulate})
    c.train.parallel = "mesh" if mesh else "pmap"
    c.mesh.update(mesh)
    return c


def test_batch_of_a_mesh_divides_over_its_rows():
    parallel.check_batch_size(settings(4, data=2, fsdp=2, tensor=2))
    message = (
        "train.batch_size=4 cannot be divided by mesh.data=2 x mesh.fsdp=4 x train.accumulate=1: use a multiple of 8."
    )
    with pytest.raises(UserError, match=message):
        parallel.check_batch_size(settings(4, data=2, fsdp=4))


def test_batch_that_divides_and_unknown_mode():
    parallel.check_batch_size(settings(32, 4))
    with pytest.raises(UserError, match='train.parallel is "pmpa": it must be one of pmap, mesh'):
        parallel.make_layout("pmpa")
