"""Several queries behind one context (data.queries): the same numbers as a context for each, and the right rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import save_tokenizer
from data_files import make_world, tiny_config
from facts import says
from tiny_training import config, model_folder

from mend_jax.data.batches import Batch, make_batches
from mend_jax.data.query import Query
from mend_jax.data.readers import Readers
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run import layout as parallel
from mend_jax.step import init_state, make_loss_fn, make_train_step

ROWS, QUERIES = 8, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    save_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(world):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world / "tokenizer")


def random_batch(queries=QUERIES) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (ROWS, queries, 7), np.int32)
    length = rng.integers(4, 8, (ROWS, queries), np.int32)
    query = Query(tokens, length, np.full((ROWS, queries), 2, np.int32))
    demos = rng.integers(0, 40, (ROWS, 12), np.int32)
    return Batch(demos, rng.integers(5, 13, ROWS, np.int32), query, None)


@pytest.mark.slow
def test_states_are_those_of_a_prefix_for_each_query(folder):
    llm, batch = load_llm(folder), random_batch()
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch.query)
    real = jnp.arange(7) < flat.length[:, None]

    def states(embeds, repeat):
        prefix = jax.tree.map(lambda a: jnp.repeat(a, repeat, 0), Prefix(embeds, jnp.asarray(batch.demos_length)))
        return jnp.where(real[..., None], llm.states(llm.params, prefix, flat), 0)

    embeds, weight = llm.embed(llm.params, batch.demos), jax.random.normal(jax.random.key(0), (*flat.tokens.shape, 16))
    np.testing.assert_allclose(states(embeds, 1), states(embeds, QUERIES), atol=1e-5)
    ours, wanted = (jax.grad(lambda e, n=n: (states(e, n) * weight).sum())(embeds) for n in (1, QUERIES))
    assert float(jnp.abs(wanted).max()) > 0.1
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


def update(folder, batch, mode=None, accumulate=1):
    c = config(folder, stage="finetune", **{"train.accumulate": accumulate})
    llm = load_llm(folder)
    model = Distiller.init(c, llm, 0)
    optimizer = optax.sgd(1.0)
    layout = parallel.make_layout(mode, c.mesh) if mode else None
    average = (layout.average,) if mode else ()
    step = make_train_step(c, make_loss_fn(c, llm, model, mode and layout.mesh), optimizer, *average)
    state = init_state(model.params, optimizer)
    if mode is None:
        return jax.device_get(jax.jit(step)(state, llm.params, batch))
    frozen = layout.place_frozen(llm.params)
    state = layout.place_state(state)
    return tuple(map(layout.fetch, layout.compile_step(step, state)(state, frozen, layout.split(batch))))


@pytest.fixture(scope="module")
def expected(folder):
    """The update where each query has a row of its own."""
    batch = random_batch()
    query = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch.query)
    demos, length = (np.repeat(a, QUERIES, 0) for a in (batch.demos, batch.demos_length))
    return update(folder, Batch(demos, length, query, None))


@pytest.mark.parametrize("mode, accumulate", [(None, 1), (None, 2), *((mode, 1) for mode in parallel.MODES)])
@pytest.mark.slow
def test_the_update_is_that_of_a_row_for_each_query(folder, expected, mode, accumulate):
    state, metrics = update(folder, random_batch(), mode, accumulate)
    for name, value in expected[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, expected[0].params)


def test_rows_hold_other_examples_of_the_task(world, tokenizer):
    one, three = (
        make_batches(tiny_config(world, "finetune", queries=n), Readers(tokenizer, 96, 80)) for n in (1, QUERIES)
    )
    for row in range(60):
        task, chosen, queries, *_ = three.rows.draw(row)
        assert len({*chosen, *queries}) == len(chosen) + QUERIES  # none twice
        same_task, same_chosen, (first,), *_ = one.rows.draw(row)
        assert (task, *chosen, queries[0]) == (same_task, *same_chosen, first)
    for step in range(8):
        batch = three[step]
        assert batch.query.tokens.shape[:2] == batch.query.length.shape == batch.query.target_start.shape == (4, 3)
        real = batch.demos_length.sum() + batch.query.length.sum()
        assert three.padding(step) == pytest.approx(1 - real / (batch.demos.size + batch.query.tokens.size))
        for place, row in enumerate(batch.ids):
            task, _, queries, *_ = three.rows.draw(int(row))
            for i, query in enumerate(queries):
                x, y = three.rows.stores[task].example(query, 6)
                length = batch.query.length[place, i]
                assert batch.query.tokens[place, i, :length].tolist() == [*x, *y]
                assert batch.query.target_start[place, i] == len(x)


def test_too_few_examples_for_so_many_queries(world, tokenizer):
    with says("20 examples", "config.data.k = 4", "config.data.queries = 30", 34):
        make_batches(tiny_config(world, "finetune", queries=30), Readers(tokenizer, 96, 80))
