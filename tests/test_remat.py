"""Rematerialisation (llm.remat, prefix.remat) of a real step on a mesh: the same gradient, in less memory."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from family_rows import save_random, smaller
from test_parallel import layout_of
from test_parallel_families import LLAMA, T5
from tiny_training import config

from mend_jax.data.batches import Batch
from mend_jax.data.query import Query
from mend_jax.run import build
from mend_jax.step import init_state, make_loss_fn, make_train_step

B, N, Q, LAYERS = 8, 44, 16, 12  # scanned: their number costs no time to compile
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
LLAMA = LLAMA | {"num_hidden_layers": LAYERS}
T5 = T5 | {"num_layers": LAYERS, "num_decoder_layers": LAYERS}
MODELS = {"llama": (LLAMA, smaller(LLAMA)), "t5": (T5, T5 | {"d_model": 16})}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MODELS)
def steps(request, tmp_path_factory):
    """{remat: (the gradient, metrics, bytes of what the compiled step keeps on a device while it runs)}."""
    folder = tmp_path_factory.mktemp(request.param)
    llm, backbone = (save_random(folder / str(i), fields, i) for i, fields in enumerate(MODELS[request.param]))
    return {remat: one_step(llm, backbone, remat) for remat in (False, True)}


def one_step(folder, backbone, remat):
    fields = {"llm.remat": remat, "prefix.remat": remat, "prefix.backbone": backbone}
    fields |= {"train.batch_size": B, "loss.kd": 0.0}  # the teacher has no way back, and nothing to keep for it
    c, layout = config(folder, stage="finetune", **fields), layout_of(**SIZES)
    llm = build.load(c, layout.place)
    model, optimizer = build.build(c, llm, place=layout.place), optax.sgd(1.0)  # the update is the gradient
    before = jax.device_get(model.params)
    state = layout.init(partial(init_state, optimizer=optimizer), model.params)
    arguments = state, layout.place_frozen(llm.params), layout.split(batch())
    step = layout.compile_step(make_train_step(c, make_loss_fn(c, llm, model, layout.mesh), optimizer), state)
    compiled = step.lower(*arguments).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    state, metrics = compiled(*arguments)
    return jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before), jax.device_get(metrics), held


def batch():
    rng = np.random.default_rng(0)
    query = Query(rng.integers(1, 60, (B, Q), np.int32), rng.integers(8, Q + 1, B, np.int32), np.full(B, 4, np.int32))
    return Batch(rng.integers(1, 60, (B, N), np.int32), rng.integers(20, N + 1, B, np.int32), query, None)


def test_the_gradient_is_the_same(steps):
    """What is computed again is the same operations of the same numbers; XLA may fuse them otherwise, and so round
    otherwise: by 6e-8 (float32) each, which the layers and sums of some hundred terms behind them let grow."""
    (wanted, expected, _), (found, metrics, _) = steps[False], steps[True]
    assert metrics.keys() == expected.keys() and expected["pred"] > 0
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted)) > 1e-6
    off = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), found, wanted)
    assert max(jax.tree.leaves(off)) < 1e-5, off


def test_it_takes_less_memory(steps):
    (_, _, plain), (_, _, less) = steps[False], steps[True]
    assert less < plain / 2, (less, plain)
