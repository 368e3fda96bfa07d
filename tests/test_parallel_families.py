"""MEND of the other families on a mesh: the update is that of one device, as tests/test_parallel.py has it for GPT-2."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
import test_t5
from family_rows import COMMON, ROWS, save_random, smaller
from test_parallel import layout_of
from tiny_training import config

from mend_jax.data.batches import Batch
from mend_jax.llm import load_llm
from mend_jax.prefix import init_distiller
from mend_jax.query import Query
from mend_jax.step import init_state, make_loss_fn, make_train_step

T5 = test_t5.COMMON | {"model_type": "t5", "num_heads": 4} | test_t5.V11
LLAMA = COMMON | ROWS["llama-3"]
CASES = {  # stage, mesh (data, fsdp, tensor), config.json's fields of LLM and backbone, whose heads divide by 2
    "llama-3": ("pretrain", (1, 4, 2), (LLAMA, smaller(LLAMA))),
    "t5": ("finetune", (2, 2, 2), (T5, T5 | {"d_model": 16})),
}
B, N, Q = 8, 12, 10
pytestmark = pytest.mark.usefixtures("compiled_quickly")


def rows(stage):
    """A batch of rows of different lengths; in finetuning each query has an x and a y."""
    rng = np.random.default_rng(0)
    start = rng.integers(1, 5, B, np.int32) if stage == "finetune" else np.zeros(B, np.int32)
    query = Query(rng.integers(1, 60, (B, Q), np.int32), rng.integers(6, Q + 1, B, np.int32), start)
    return Batch(rng.integers(1, 60, (B, N), np.int32), rng.integers(3, N + 1, B, np.int32), query, None)


@pytest.mark.parametrize("name", CASES)
def test_update_is_that_of_one_device(name, tmp_path):
    """With plain gradient descent and a rate of 1 the update is the gradient itself; the weights are read in parts."""
    stage, sizes, models = CASES[name]
    folder, backbone = (save_random(tmp_path / str(i), fields, i) for i, fields in enumerate(models))
    fields = {"stage": stage, "prefix.backbone": backbone, "train.batch_size": B, "loss.clm": 0.5, "loss.chunk": 16}
    c, optimizer, layout = config(folder, **fields), optax.sgd(1.0), layout_of(*sizes)
    results = []
    for place, mesh in ((None, None), (layout.place, layout.mesh)):
        llm = load_llm(folder, place=place)
        model = init_distiller(c.prefix, llm, 0, place)
        step = make_train_step(c, make_loss_fn(c, llm, model, mesh), optimizer)
        if mesh is None:
            state, frozen, batch = init_state(model.params, optimizer), llm.params, rows(stage)
            step = jax.jit(step)
        else:
            state = layout.init(partial(init_state, optimizer=optimizer), model.params)
            frozen, batch = layout.place_frozen(llm.params), layout.split(rows(stage))
            assert is_split(frozen, sizes) and is_split(state.params["backbone"], sizes)
            step = layout.compile_step(step, state)
        before = jax.device_get(model.params)
        state, metrics = step(state, frozen, batch)
        gradient = jax.tree.map(lambda a, b: np.asarray(a) - b, layout.fetch(state.params), before)
        results.append((gradient, jax.device_get(metrics)))
    (wanted, expected), (found, metrics) = results
    assert metrics.keys() == expected.keys() and expected["kd"] > 0
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted)) > 1e-6
    # Sums of a few hundred terms in another order: rounding is as large as the terms, not as their sum.
    off = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), found, wanted)
    assert max(jax.tree.leaves(off)) < 1e-4, off


def is_split(params, sizes):
    """Whether a device holds its part alone of every kernel in the layers."""
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel" and leaf.ndim == 3]
    parts = sizes[1] * sizes[2]
    return kernels and all(k.addressable_shards[0].data.size * parts == k.size for k in kernels)
