"""MEND of the other families on a mesh: update and scores are those of one device, as for GPT-2 in tests/test_parallel.py
and tests/test_evaluate.py."""

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
from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes.demonstrations import demonstrations_prefix
from mend_jax.prefixes.distiller import Distiller
from mend_jax.scoring.options import cache_prefix, lay_out, score_rows
from mend_jax.step import init_state, make_loss_fn, make_train_step

T5 = test_t5.COMMON | {"model_type": "t5", "num_heads": 4} | test_t5.V11
LLAMA = COMMON | ROWS["llama-3"]
GEMMA = COMMON | ROWS["gemma3"]  # windows of 7 tokens in two of three layers
ONE_GROUP = smaller(LLAMA) | {"num_key_value_heads": 1}
CASES = {  # stage, mesh (data, fsdp, tensor), config.json's fields of LLM and backbone
    # Heads of keys and values: 2 of the LLM, 1 of the backbone; where tensor is more, a head lies on several devices.
    "llama-3": ("pretrain", (1, 2, 4), (LLAMA, ONE_GROUP)),
    "gemma3": ("finetune", (2, 2, 2), (GEMMA, smaller(GEMMA))),
    "t5": ("finetune", (2, 2, 2), (T5, T5 | {"d_model": 16})),
}
B, N, Q = 8, 12, 10
pytestmark = pytest.mark.slow


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
    c = config(folder, **fields)
    wanted, expected = one_step(c, None)
    assert expected["kd"] > 0 and min(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted)) > 1e-6
    found, metrics = one_step(c, layout_of(*sizes), parts=sizes[1] * sizes[2])
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    # Sums of a few hundred terms in another order: rounding is as large as the terms, not as their sum.
    off = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), found, wanted)
    assert max(jax.tree.leaves(off)) < 1e-4, off


def one_step(c, layout, parts=1):
    """(the gradient, metrics): on a mesh that splits every kernel into so many parts, or without one on one device."""
    place, mesh = (layout.place, layout.mesh) if layout else (None, None)
    llm = load_llm(c.llm.path, place=place)
    model = Distiller.init(c, llm, 0, place)
    optimizer, before = optax.sgd(1.0), jax.device_get(model.params)
    start = partial(init_state, optimizer=optimizer)
    step = make_train_step(c, make_loss_fn(c, llm, model, mesh), optimizer)
    if layout:
        state, frozen = layout.init(start, model.params), layout.place_frozen(llm.params)
        assert is_split(frozen, parts) and is_split(state.params["backbone"], parts)
        state, metrics = layout.compile_step(step, state)(state, frozen, layout.split(rows(c.stage)))
    else:
        state, metrics = jax.jit(step)(start(model.params), llm.params, rows(c.stage))
    return jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before), jax.device_get(metrics)


def is_split(params, parts):
    """Whether a device holds its part alone of every kernel in the layers."""
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel" and leaf.ndim == 3]
    return kernels and all(k.addressable_shards[0].data.size * parts == k.size for k in kernels)


@pytest.mark.parametrize(("name", "items"), [*((name, 8) for name in CASES), ("llama-3", 3)])  # 3 rows do not divide
def test_scores_are_those_of_one_device(name, items, tmp_path):
    _, sizes, (fields, _) = CASES[name]
    folder, rng = save_random(tmp_path / "llm", fields, 0), np.random.default_rng(0)
    tokens = lambda count: rng.integers(1, 60, count)  # noqa: E731
    rows = [(tokens(rng.integers(2, 6)), [tokens(1), tokens(2), tokens(3)]) for _ in range(items)]
    prefix = tokens(7).tolist()
    scores = []
    for place in (None, layout_of(*sizes).place):
        llm = load_llm(folder, place=place)
        cache = cache_prefix(llm, demonstrations_prefix(llm, prefix))
        laid_out = [lay_out(x, options, llm.start_token) for x, options in rows]
        scores.append(score_rows(llm, cache, laid_out, items))
    np.testing.assert_allclose(*scores, atol=2e-5)
    assert np.std(scores[0]) > 1e-3
