"""Option scores against implementations that re-read everything, and against PyTorch; bad input."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import says

from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import LLM
from mend_jax.models.decoder import init_params
from mend_jax.models.families import DecoderConfig
from mend_jax.prefixes.context import bucket
from mend_jax.prefixes.demonstrations import demonstrations_prefix
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.prefix import Prefix
from mend_jax.scoring import options as scoring
from mend_jax.scoring.options import cache_prefix, lay_out, score_items, score_options

CONFIG = DecoderConfig("gpt2", vocab_size=61, width=16, layers=2, heads=2, mlp_width=32, max_positions=96)


@pytest.fixture(scope="module")
def llm():
    params = jax.tree.map(lambda a: a * 4, init_params(CONFIG, 0))  # larger weights: scores that differ clearly
    return LLM(CONFIG, params, None, "a tiny LLM", "float32")


def random_items(count, seed=0, options=(1, 5), longest=20):
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(0, CONFIG.vocab_size, n).tolist()  # noqa: E731
    return [
        SimpleNamespace(
            x_tokens=ids(rng.integers(1, longest)),
            options_tokens=[ids(rng.integers(1, 6)) for _ in range(rng.integers(*options))],
        )
        for _ in range(count)
    ]


@partial(jax.jit, static_argnums=0)
def reread(llm, prefix, query):
    return jax.nn.log_softmax(llm.logits(llm.params, llm.states(llm.params, prefix, query))[0])


def naive_scores(llm, prefix, item):
    """Every option re-reads the prefix and the input: no cache, no batch, no segments, no chunks."""
    scores = []
    for option in item.options_tokens:
        length = len(item.x_tokens) + len(option)
        tokens = jnp.asarray([item.x_tokens + option + [0] * (-length % 32)], jnp.int32)
        query = Query(tokens, jnp.asarray([length]), jnp.asarray([len(item.x_tokens)]))
        log_probs, start = np.asarray(reread(llm, prefix, query)), len(item.x_tokens) - 1
        scores.append(np.mean([log_probs[start + i, token] for i, token in enumerate(option)]))
    return scores


def prefixes(llm):
    vectors = jax.random.normal(jax.random.key(1), (1, 7, CONFIG.width))
    padded = jnp.concatenate([vectors, 9.0 * jnp.ones((1, 5, CONFIG.width))], 1)
    return {
        "nothing": no_prefix(1, CONFIG.width),
        "demonstrations": demonstrations_prefix(llm, list(range(1, 30))),
        "vectors": Prefix(vectors, jnp.asarray([7])),
        "padded vectors": Prefix(padded, jnp.asarray([7])),
    }


@pytest.mark.parametrize("name", ["nothing", "demonstrations", "vectors", "padded vectors"])
@pytest.mark.slow
def test_scores_equal_rereading_everything(llm, name):
    prefix, items = prefixes(llm)[name], random_items(7)
    scores = score_items(llm, cache_prefix(llm, prefix), items, batch_size=4)
    for got, item in zip(scores, items, strict=True):
        np.testing.assert_allclose(got, naive_scores(llm, prefix, item), atol=2e-5)


def test_padding_of_the_prefix_changes_nothing(llm):
    items, all_prefixes = random_items(5), prefixes(llm)
    caches = [cache_prefix(llm, all_prefixes[name]) for name in ("vectors", "padded vectors")]
    for a, b in zip(*(score_items(llm, cache, items, 4) for cache in caches), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("batch_size, chunk", [(1, 512), (3, 7), (32, 512)])
def test_batch_size_order_and_chunk_change_nothing(llm, batch_size, chunk):
    items = random_items(9, seed=3)
    cache = cache_prefix(llm, prefixes(llm)["vectors"])
    expected = score_items(llm, cache, items, batch_size=4)
    done = []
    got = score_items(llm, cache, items[::-1], batch_size, chunk=chunk, progress=done.append)
    assert sum(done) == len(items)
    for a, b in zip(got[::-1], expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_memory_limit_makes_smaller_batches_not_other_scores(llm, monkeypatch):
    items, cache = random_items(16), cache_prefix(llm, prefixes(llm)["vectors"])  # more than fit into one row
    expected = score_items(llm, cache, items, batch_size=8)
    monkeypatch.setattr(scoring, "ATTENTION_BYTES", 20_000)
    done = []
    got = score_items(llm, cache, items, batch_size=8, progress=done.append)
    assert max(done) < 16
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_option_scores_the_same_whatever_stands_beside_it(llm):
    prefix = no_prefix(1, CONFIG.width)
    x, options = [3, 4, 5], [[7, 8, 9], [10], [7, 8, 9, 11, 12]]
    together = score_options(llm, prefix, x, options)
    alone = [score_options(llm, prefix, x, [option])[0] for option in options]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(set(np.round(together, 4))) == 3


def test_few_shapes_are_compiled(llm):
    cache = cache_prefix(llm, prefixes(llm)["vectors"])
    items = random_items(32, seed=5, options=(4, 5))
    score_items(llm, cache, items, batch_size=8)
    compiled = scoring._states._cache_size() + scoring._log_probs._cache_size()
    score_items(llm, cache, items[::-1], batch_size=8)
    other = jax.tree.map(lambda a: a + 0.01, llm.params)
    score_items(llm, cache._replace(length=cache.length - 1), items, batch_size=8, params=other)
    assert scoring._states._cache_size() + scoring._log_probs._cache_size() == compiled


def test_equal_to_pytorch(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=96, initializer_range=0.3)
    ).eval()
    hf.save_pretrained(tmp_path)
    from mend_jax.llm.decoder_only import load_llm

    llm, demos = load_llm(tmp_path), list(range(20, 60))
    for item in random_items(4, seed=9):
        expected = []
        for option in item.options_tokens:
            ids = torch.tensor([demos + item.x_tokens + option])
            with torch.no_grad():
                log_probs = torch.log_softmax(hf(ids).logits[0, :-1].double(), -1)
            picked = log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            expected.append(picked[-len(option) :].mean().item())
        got = score_options(llm, demonstrations_prefix(llm, demos), item.x_tokens, item.options_tokens)
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_layout():
    row = lay_out([5, 6], [[1, 2, 3], [4]])
    assert row.tokens.tolist() == [5, 6, 1, 2]
    assert row.positions.tolist() == [0, 1, 2, 3]
    assert row.segments.tolist() == [0, 0, 1, 1]
    assert row.sources.tolist() == [1, 2, 3]
    assert row.targets.tolist() == [[1, 4], [2, 0], [3, 0]]
    assert row.options.tolist() == [[0, 1], [0, -1], [0, -1]]


def test_what_all_options_begin_with_is_read_once():
    row = lay_out([5, 6], [[1, 2, 3], [1, 2], [1, 2, 4, 7]])
    assert row.tokens.tolist() == [5, 6, 1, 2, 4]
    assert row.positions.tolist() == [0, 1, 2, 3, 4]
    assert row.segments.tolist() == [0, 0, 0, 0, 3]
    assert row.sources.tolist() == [1, 2, 3, 4]
    assert row.targets.tolist() == [[1, 1, 1], [2, 2, 2], [3, 0, 4], [7, 0, 0]]
    assert row.options.tolist() == [[0, 1, 2], [0, 1, 2], [0, -1, 2], [2, -1, -1]]


def options_that_begin_alike(count):
    """Items of options that share their first tokens; one is the beginning of another."""
    items = random_items(count, seed=7, options=(2, 4))
    for i, item in enumerate(items):
        shared = [3, 4, 5][: i % 4]
        item.options_tokens = [shared + option for option in item.options_tokens]
        item.options_tokens += [shared] if shared else []
    return items


def test_options_that_begin_alike_score_as_rereading_everything(llm):
    prefix, items = prefixes(llm)["vectors"], options_that_begin_alike(8)
    for got, item in zip(score_items(llm, cache_prefix(llm, prefix), items, 4), items, strict=True):
        np.testing.assert_allclose(got, naive_scores(llm, prefix, item), atol=2e-5)


def test_items_of_one_row_score_as_each_in_a_row_of_its_own(llm, monkeypatch):
    items, cache = random_items(14, seed=2), cache_prefix(llm, prefixes(llm)["padded vectors"])
    rows = [lay_out(item.x_tokens, item.options_tokens) for item in items]
    packed = score_items(llm, cache, items, batch_size=8)
    assert max(len(row) for batch in scoring.plan(llm, cache, rows, 8) for row in batch.rows) > 2
    monkeypatch.setattr(scoring, "fill", lambda lengths, columns: [[i] for i in range(len(lengths))])
    for a, b in zip(packed, score_items(llm, cache, items, batch_size=8), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rows_hold_every_item_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(5, 300, 200).tolist()
    columns = scoring.row_columns(max(lengths), sum(lengths))[0]
    rows = scoring.fill(lengths, columns)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= columns for row in rows)
    assert sum(lengths) > 0.9 * columns * len(rows)
    for longest in range(1, 2000):
        assert longest <= scoring.row_columns(longest, longest)[0] <= max(longest * 33 / 32 + 8, bucket(longest))
    assert scoring.row_count(28, 3, 1) == 2 and scoring.row_count(5, 9, 1) == 5 and scoring.row_count(9, 8, 4) % 4 == 0


def test_passes_of_a_task_have_one_shape(llm):
    cache = cache_prefix(llm, prefixes(llm)["vectors"])
    rows = [lay_out(item.x_tokens, item.options_tokens) for item in random_items(60, seed=4)]
    passes = scoring.plan(llm, cache, rows, 3)
    assert len(passes) > 2 and len({(p.count, p.columns) for p in passes}) == 1
    assert all(len(p.rows) <= p.count <= 3 for p in passes)


def test_buckets_waste_at_most_a_third():
    for length in range(17, 1025):
        assert length <= bucket(length) <= 1.5 * length
    assert len({bucket(n) for n in range(1, 1025)}) == 13


class _Spelling:
    """A tokenizer of letters: a space is token 0, a line break token 11."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [" abcdefghij\n".index(c) for c in text]}


@pytest.mark.parametrize("arguments, before", [((), 0), ((" ",), 0), (("\n",), 11)])
def test_texts_are_read_behind_the_separator_and_as_they_are(llm, arguments, before):
    with_tokenizer = dataclasses.replace(llm, tokenizer=_Spelling())
    prefix = no_prefix(1, CONFIG.width)
    texts = score_options(with_tokenizer, prefix, " ab", ["c", "de "], *arguments)
    ids = score_options(llm, prefix, [before, 0, 1, 2], [[before, 3], [before, 4, 5, 0]])
    np.testing.assert_allclose(texts, ids, atol=1e-6)
    with says("input is empty"):
        score_options(with_tokenizer, prefix, "", ["c"], *arguments)


@pytest.mark.parametrize(
    "query, options, facts",
    [
        ([], [[1]], ["input is empty"]),
        ([1], [], ["no options"]),
        ([1], [[2], []], ["option", "at least one token"]),
        ("a text", [[1]], ["tokenizer", "token ids"]),
        ([1] * 90, [[1] * 8], ["97 positions", "at most 96"]),
        ([1, 61], [[1]], ["token 61", CONFIG.vocab_size]),
    ],
)
def test_bad_input_is_one_sentence(llm, query, options, facts):
    with says(*facts):
        score_options(llm, no_prefix(1, CONFIG.width), query, options)


def test_bad_prefixes_are_refused(llm):
    with says("prefix", "2 rows"):
        score_options(llm, no_prefix(2, CONFIG.width), [1], [[2]])
    with says("prefix", "width 8", CONFIG.width):
        score_options(llm, no_prefix(1, 8), [1], [[2]])
    with says("prefix", "97 positions", 96):
        score_options(llm, Prefix(jnp.zeros((1, 97, CONFIG.width)), jnp.asarray([97])), [1], [[2]])


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_several_queries_score_as_one_by_one(llm, batch_size):
    queries, options = [item.x_tokens for item in random_items(9, seed=4)], [[7, 8, 9], [10], [7, 3]]
    prefix = prefixes(llm)["vectors"]
    wanted = [score_options(llm, prefix, query, options) for query in queries]
    for given in (queries, tuple(map(np.asarray, queries))):
        found = score_options(llm, prefix, given, options, batch_size=batch_size)
        assert isinstance(found[0], list) and isinstance(found[0][0], float)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert len(set(np.round(np.asarray(wanted)[:, 0], 4))) > 5  # the queries differ
    assert np.shape(score_options(llm, prefix, queries[:1], options, batch_size=batch_size)) == (1, 3)


@pytest.mark.parametrize(
    ("query", "facts"),
    [([], ["empty"]), ([1] * 96, ["positions", 96]), ([61], ["token 61"]), ("w", ["tokenizer"]), (None, ["query"])],
)
def test_the_wrong_one_of_several_queries_is_named_by_its_place(llm, query, facts):
    with says("Query 2", *facts):
        score_options(llm, no_prefix(1, CONFIG.width), [[1, 2], query, [3]], [[1, 2]])


def test_the_window_can_be_filled_to_the_last_position(llm):
    # 95 tokens are read and the 96th is predicted from the last of them; one more would still be read at position 95.
    x, option = [1] * 90, [2] * 6
    item = SimpleNamespace(x_tokens=x, options_tokens=[option])
    got = score_options(llm, no_prefix(1, CONFIG.width), x, [option])
    np.testing.assert_allclose(got, naive_scores(llm, no_prefix(1, CONFIG.width), item), atol=2e-5)
