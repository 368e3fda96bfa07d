"""Demonstrations of any number, chunk by chunk: packing, vectors that do not depend on other chunks, training, evaluation."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_files
from data_files import make_world, tiny_config
from facts import says, states
from tiny_training import config, model_folder

from mend_jax.cli.errors import UserError
from mend_jax.data.batches import make_batches
from mend_jax.data.evaluation import EvalTask, Item
from mend_jax.data.readers import Readers
from mend_jax.data.sampling import EMPTY, Packing
from mend_jax.interchange.trained import load_distiller, load_prefix, read_trained
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes import KINDS, Chunked, Distiller, SoftPrompt, chunked
from mend_jax.run.checks import check_method_demos
from mend_jax.scoring import costs
from mend_jax.scoring.tasks import Method, demos_read, evaluate_task, make_context, prefix_maker
from mend_jax.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    return load_llm(str(folder))


@pytest.fixture(scope="module")
def distiller(folder, llm):
    return Distiller.init(config(folder), llm, seed=0)


@pytest.mark.parametrize("projection", ["identity", "linear", "tanh"])
def test_what_vectors_cost_is_what_is_computed(folder, llm, projection):
    """The backbone is as wide as the LLM: a projection between equal widths is one too."""
    model = Distiller.init(config(folder, **{"prefix.projection": projection, "prefix.rms": 0.0}), llm, 0)
    for kind in (model, Chunked.around(model, chunk_tokens=6)):
        context = np.arange(12, dtype=np.int32)  # in chunks: two, both full
        counted = costs.count_products(
            lambda *a, kind=kind: kind.apply(*a).embeds, kind.params, context[None], np.asarray([12])
        )
        assert kind.flops(llm.config, context) == counted


def demonstrations(count, seed=0, longest=5):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 40, rng.integers(2, longest + 1)).tolist() for _ in range(count)]


@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [9, 1, 9, 1, 1], [10], [], [1] * 40, [4, 11, 2]])
@pytest.mark.parametrize("demos, chunks", [(2, 3), (100, 100)])
def test_a_chunk_holds_whole_demonstrations_in_their_order(lengths, demos, chunks):
    packing = Packing(columns=10, demos=demos, chunks=chunks)
    pieces = [np.full(length, i, np.int32) for i, length in enumerate(lengths)]
    laid_out = packing.lay_out(pieces)
    rows = laid_out.reshape(-1, 10)
    assert packing.length(lengths) == laid_out.size and len(rows) <= chunks
    found = laid_out[laid_out != EMPTY]
    count = len(packing.chunk_of(lengths))
    assert found.tolist() == np.concatenate([*pieces[:count], np.zeros(0, int)]).tolist()
    for row in rows:
        inside = row[row != EMPTY]
        assert len(inside) and (row[len(inside) :] == EMPTY).all() and len(np.unique(inside)) <= demos
    assert 11 not in lengths[:count]
    if chunks == 100 and 11 not in lengths:
        assert count == len(lengths)


def test_one_chunk_is_the_distiller_itself(distiller):
    demos = demonstrations(4)
    own, alone = (
        Chunked.around(distiller).distill(demos),
        distiller.distill([token for demo in demos for token in demo]),
    )
    assert own.length.tolist() == alone.length.tolist()
    np.testing.assert_allclose(own.embeds, alone.embeds, atol=2e-6)


def test_around_one_of_chunks_takes_the_distiller_alone(distiller, llm, tmp_path):
    """As `load_prefix` reads it, and with parameters that were trained further."""
    params = jax.tree.map(lambda a: a * 1.5, distiller.params)
    first = dataclasses.replace(Chunked.around(distiller, "mean", 1, 8), params=params)
    demos = demonstrations(6)
    wanted = Chunked.around(dataclasses.replace(distiller, params=params), chunk_demos=3).distill(demos)
    first.write(tmp_path)
    for made in (first, load_prefix(tmp_path, llm)):
        np.testing.assert_array_equal(Chunked.around(made, chunk_demos=3).distill(demos).embeds, wanted.embeds)
    with says("a soft prompt", "load_prefix"):
        Chunked.around(SoftPrompt({"vectors": np.zeros((2, 16), np.float32)}))


def test_what_one_of_chunks_cannot_do_leads_on(distiller, llm, tmp_path):
    model = Chunked.around(distiller, chunk_demos=1)
    model.write(tmp_path)
    with says(tmp_path, "a distiller of chunks", "mend_jax.load_prefix"):
        load_distiller(tmp_path, llm)
    with pytest.raises(UserError) as error:  # no training of it has nested lengths
        model.first(3)
    states(str(error.value), "a distiller of chunks", 4, 3)
    assert "nested" not in str(error.value)
    with says(4, 3, "--config.prefix.nested"):
        distiller.first(3)


@pytest.mark.parametrize("join", ["concat", "mean"])
def test_adding_and_removing_a_chunk_leaves_the_others_bit_equal(distiller, join):
    model = Chunked.around(distiller, join, chunk_demos=3)
    chunks = model.chunks(demonstrations(18))
    assert len(chunks) == 6
    vectors = np.asarray(model.distill_chunks(chunks))
    for kept in ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [3], [5, 2]):
        np.testing.assert_array_equal(model.distill_chunks([chunks[i] for i in kept]), vectors[kept])
    assert not np.array_equal(vectors[0], vectors[1])
    without_one = model.join_chunks(vectors[1:])
    again = model.distill(demonstrations(18)[3:])
    np.testing.assert_array_equal(without_one.embeds, again.embeds)


def test_concat_keeps_all_vectors_and_mean_their_mean(distiller):
    demos = demonstrations(7)
    concat, mean = (Chunked.around(distiller, join, chunk_demos=3).distill(demos) for join in ("concat", "mean"))
    assert concat.embeds.shape[1] == 3 * 4 and concat.length.tolist() == [12]
    assert mean.embeds.shape[1] == 4 and mean.length.tolist() == [4]
    np.testing.assert_allclose(mean.embeds[0], concat.embeds[0].reshape(3, 4, -1).mean(0), atol=1e-6)


@pytest.mark.parametrize("join", ["concat", "mean"])
@pytest.mark.slow
def test_a_batch_is_what_its_rows_are_alone_and_padding_is_not_read(distiller, join):
    model = Chunked.around(distiller, join, chunk_demos=2, chunk_tokens=12)
    packing = Packing(model.width, 2, 9)
    contexts = [packing.lay_out([np.asarray(d, np.int32) for d in demonstrations(n, seed=n)]) for n in (1, 4, 6)]
    size = max(map(len, contexts)) + model.width
    rows = np.stack([np.pad(context, (0, size - len(context)), constant_values=7) for context in contexts])
    batch = model.apply(model.params, jnp.asarray(rows), jnp.asarray([len(context) for context in contexts]))
    for i, context in enumerate(contexts):
        alone = model.apply(model.params, jnp.asarray(context[None]), jnp.asarray([len(context)]))
        count = int(alone.length[0])
        assert int(batch.length[i]) == count
        np.testing.assert_allclose(batch.embeds[i, :count], alone.embeds[0, :count], atol=2e-6)


def task_of(count):
    pairs = [(np.asarray(demo[:-1], np.int32), np.asarray(demo[-1:], np.int32)) for demo in demonstrations(count)]
    items = [Item(np.asarray([5, 6]), [np.asarray([1]), np.asarray([2, 3])], ("a", "b"), 0)] * 2
    return EvalTask("tiny", 13, pairs, items, True)


@pytest.mark.parametrize("join, most", [("concat", 11), ("mean", 1000)])
@pytest.mark.parametrize("count", [16, 64, 256])
@pytest.mark.slow
def test_any_number_of_demonstrations_makes_a_prefix_that_fits(folder, llm, distiller, join, most, count):
    """The LLM's window of 48 holds 11 chunks of 4 vectors beside a query; a mean needs but 4 positions."""
    c, model, task = config(folder), Chunked.around(distiller, join, 8, 16), task_of(count)
    context = make_context(c, llm, model, task)
    chunks = len(context) // model.width
    shown = int((context != EMPTY).sum())
    assert shown == sum(len(x) + len(y) for x, y in task.demos) if join == "mean" else chunks <= most
    result = evaluate_task(llm, prefix_maker(c, llm, Method("chunked", model)), task, batch_size=4)
    assert result.cost["prefix_length"] == (4 if join == "mean" else 4 * chunks)
    one = distiller.flops(llm.config, np.zeros(1, np.int32))
    assert model.flops(llm.config, context) > chunks * one  # what each chunk costs is counted


def test_a_chunk_longer_than_the_distiller_reads(folder, llm):
    c = config(folder, **{"prefix.kind": "chunked", "data.max_demo_tokens": 2000})
    reads = llm.config.window - c.prefix.length
    with says("data.max_demo_tokens = 2000", reads, "prefix.chunk_tokens"):
        Chunked.check(c, llm.config, llm.config)
    c.prefix.chunk_tokens = reads
    Chunked.check(c, llm.config, llm.config)


def test_a_demonstration_longer_than_a_chunk_is_left_out_alone(distiller, caplog):
    model = Chunked.around(distiller, chunk_demos=1, chunk_tokens=16)
    vectors = model.distill([[1], [3] * 43, [2], [4] * 17]).embeds
    states(caplog.messages[0], "a chunk of 16", "number 2, 4")
    np.testing.assert_array_equal(vectors, model.distill([[1], [2]]).embeds)
    with says("Demonstration 1", "43 tokens", 16):
        model.distill([[3] * 43, [4] * 17])


@pytest.mark.parametrize("read", ["distill", "chunks"])
def test_texts_that_are_no_pairs_are_not_read_as_one(distiller, read):
    """Of a flat list of two texts the second would be the first's output."""
    for demos in (
        ["w1", "w2"],
        ("w1", "w2"),
        "w1 w2",
        [("w1", "w2"), "w3"],
        {"w1": "w2"},
        [{"input": "w1", "output": "w2"}],
    ):
        for model in (Chunked.around(distiller), distiller):
            with says(re.compile(r"\bpairs?\b|\(input, output\)")):
                getattr(model, read if model is not distiller else "distill")(demos)


def test_texts_are_cut_as_in_training_and_what_does_not_fit_is_left_out(llm, distiller, caplog):
    """Of packs, and where the distiller is asked itself: each x is cut, a y never, and only what is too long is missing."""
    pairs = [("w1 w2", "w3"), ("w4 " * 30, "w5"), ("w6", "w7 " * 20), ("w8", "w9")]
    cut = dataclasses.replace(distiller, max_input_tokens=6)
    model, whole = (Chunked.around(one, chunk_demos=1, chunk_tokens=8) for one in (cut, distiller))
    reading = model.read_pairs(pairs, llm)
    assert (reading.read, reading.dropped, reading.tokens) == ((0, 1, 3), (2,), 3 + 7 + 2)
    assert [chunk.tolist() for chunk in reading.context] == [[1, 2, 3], [4] * 6 + [5], [8, 9]]
    assert whole.read_pairs(pairs, llm).dropped == (1, 2)
    [vectors] = model.vectors_of([reading.context])
    np.testing.assert_array_equal(vectors, model.distill(pairs).embeds[0])
    np.testing.assert_array_equal(vectors, model.distill([[1, 2, 3], [4] * 6 + [5], [8, 9]]).embeds[0])
    alone = cut.distill([("w4 " * 30, "w5")])
    np.testing.assert_array_equal(alone.embeds, distiller.distill([("w4 " * 6, "w5")]).embeds)
    with says("w6", "21 tokens", 8):
        model.read_pairs(pairs[2:3], llm)
    with says("no demonstrations"):
        model.read_pairs([], llm)


def test_two_tokenizers_cut_an_input_where_both_end_a_token(llm, distiller, tmp_path):
    own = tokenizer_files.load(tokenizer_files.save_word_tokenizer(tmp_path / "tokenizer"))
    read = dataclasses.replace(distiller, tokenizer=own, max_input_tokens=3)
    reading = read.read_pairs([("w1 w2 w3 w4 w5", "w6")], llm)
    assert reading.context.tolist() == own("w1 w2 w3 w6", add_special_tokens=False)["input_ids"]


def test_where_inputs_are_cut_is_kept_in_the_exported_folder(distiller, tmp_path):
    for count in (7, 0):
        made = dataclasses.replace(distiller, max_input_tokens=count)
        Chunked.around(made).write(tmp_path)
        kept = json.loads((tmp_path / "distiller_config.json").read_text())
        assert kept.get("max_input_tokens", 0) == count == Chunked.from_folder(tmp_path).max_input_tokens
        assert ("max_input_tokens" in kept) == (count > 0)  # older folders have none
    for wrong in (-1, "7", True):
        (tmp_path / "distiller_config.json").write_text(json.dumps(kept | {"max_input_tokens": wrong}))
        with says("max_input_tokens", "export the distiller again"):
            Chunked.from_folder(tmp_path)


def test_a_chunk_is_padded_to_its_own_bucket(llm, distiller, monkeypatch):
    """Not to its width, which has no end with a T5 backbone, and whatever the number of chunks: one program is enough."""
    pairs = [(f"w{i}", f"w{i + 1}") for i in range(5)]
    usual, shapes = Chunked.around(distiller, chunk_demos=1).distill(pairs).embeds, set()
    monkeypatch.setattr(Chunked, "width", property(lambda _: 2**30))
    row = chunked._distill_row
    monkeypatch.setattr(chunked, "_distill_row", lambda *of: shapes.add(of[2].shape) or row(*of))
    for join in ("concat", "mean"):
        model = Chunked.around(distiller, join, chunk_demos=1)
        contexts = [model.read_pairs(pairs[:count], llm).context for count in (1, 3, 5)]
        found = model.vectors_of(contexts)
        assert [len(vectors) for vectors in found] == ([4, 12, 20] if join == "concat" else [4] * 3)
        wanted = usual[0] if join == "concat" else usual[0].reshape(5, 4, -1).mean(0)
        np.testing.assert_allclose(found[2], wanted, atol=1e-6)
    assert shapes == {(1, 16)}


def test_an_unknown_join_is_one_sentence(distiller):
    with says("concat", "mean", '"sum"'):
        Chunked.around(distiller, "sum")


def test_an_evaluation_says_which_demonstrations_are_left_out(folder, llm, distiller, caplog):
    c, task = config(folder), task_of(8)
    lengths = [len(x) + len(y) for x, y in task.demos]
    fitting = sum(length < 5 for length in lengths)  # those behind one that is too long are read
    assert lengths.index(5) < fitting < 8
    whole, short = Chunked.around(distiller, "mean", 1, 5), Chunked.around(distiller, "mean", 1, 4)
    assert demos_read(c, llm, whole, task) == (8, 8)
    assert demos_read(c, llm, short, task) == (fitting, 8)
    assert (make_context(c, llm, short, task) != EMPTY).sum() == sum(length for length in lengths if length < 5)
    check_method_demos(c, llm, Method("whole", whole), [task], None)
    assert not caplog.messages
    check_method_demos(c, llm, Method("short", short), [task, task], None)
    states(
        caplog.messages[0],
        "short",
        "2 of 2 pairs",
        "tiny",
        "seed 13",
        f"{fitting} of 8",
        "a chunk of 4",
        "data.max_demo_tokens",
    )


def test_texts_are_read_pair_by_pair(distiller):
    pairs = [(f"w{i}", f"w{i + 1}") for i in range(5)]
    model = Chunked.around(distiller, "concat", chunk_demos=2)
    ids = [[i, i + 1] for i in range(5)]
    np.testing.assert_array_equal(model.distill(pairs).embeds, model.distill(ids).embeds)


@pytest.mark.slow
def test_it_starts_from_a_distillers_workdir_and_is_read_back(folder, llm, tmp_path, monkeypatch):
    from tiny_training import RandomBatches

    from mend_jax.run import build

    monkeypatch.setattr(build, "make_batches", RandomBatches)
    first = config(folder, **{"train.steps": 2})
    assert train(first, tmp_path / "distiller") == 0
    fields = {"prefix.kind": "chunked", "prefix.join": "mean", "prefix.chunk_demos": 4, "data.max_demo_tokens": 8}
    second = config(folder, **{"train.steps": 2, "prefix.start_from": str(tmp_path / "distiller"), **fields})
    assert train(second, tmp_path / "chunked") == 0
    before, after = (read_trained(tmp_path / name) for name in ("distiller", "chunked"))
    assert isinstance(after, Chunked) and (after.join, after.chunk_demos, after.width) == ("mean", 4, 8)
    assert not np.array_equal(before.params["placeholders"], after.params["placeholders"])
    out = mend_jax_export(tmp_path / "chunked", tmp_path / "out")
    again = read_trained(out)
    assert isinstance(again, Chunked) and (again.join, again.chunk_demos, again.width) == ("mean", 4, 8)
    demos = demonstrations(9)
    np.testing.assert_array_equal(again.distill(demos).embeds, after.distill(demos).embeds)
    assert KINDS["chunked"].is_in(out) and not KINDS["distiller"].is_in(out)


def mend_jax_export(workdir, out):
    from mend_jax.interchange.export import export

    assert "chunks" in export(workdir, out)
    return out


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_training_data_are_laid_out_in_chunks_and_whole_for_the_teacher(tmp_path, stage):
    tokenizer = tokenizer_files.load(tokenizer_files.save_word_tokenizer(tmp_path / "tokenizer"))
    packing = Packing(columns=16, demos=2, chunks=3)
    c = tiny_config(make_world(tmp_path / "world"), stage)
    plain, chunked = (
        make_batches(c, Readers(tokenizer, 96, window, vectors=4, packing=how))
        for window, how in ((80, None), (None, packing))
    )
    for step in range(3):
        one, batch = plain[step], chunked[step]
        real = int((batch.demos >= 0).sum() - sum(batch.demos.shape[1] - n for n in batch.demos_length))
        assert chunked.tokens(step) == real + batch.query.length.sum()
        assert chunked.padding(step) == pytest.approx(
            1 - chunked.tokens(step) / (batch.demos.size + batch.query.tokens.size)
        )
        assert batch.demos.shape[1] % 16 == 0 and batch.teacher_demos.shape[1] in chunked.rows.teacher_buckets
        assert batch.teacher_demos.shape[1] <= 80  # the LLM's window is not padded beyond what a context may have
        whole = {int(i): row[:n].tolist() for i, row, n in zip(one.ids, one.demos, one.demos_length, strict=True)}
        for i, row, n, teacher, m in zip(
            batch.ids, batch.demos, batch.demos_length, batch.teacher_demos, batch.teacher_demos_length, strict=True
        ):
            shown, told = row[:n][row[:n] != EMPTY].tolist(), teacher[:m].tolist()
            assert n % 16 == 0 and told == shown and len(shown) > 0
            assert int(i) not in whole or whole[int(i)][: len(told)] == told


def test_what_fits_no_chunk_is_no_demonstration_in_training(tmp_path, caplog):
    """The others fill its place, and it is said once how many there are."""
    tokenizer = tokenizer_files.load(tokenizer_files.save_word_tokenizer(tmp_path / "tokenizer"))
    c = tiny_config(make_world(tmp_path / "world"), "finetune", max_demo_tokens=200)
    sizes = {}
    for columns in (200, 6):
        packing = Packing(columns, demos=1, chunks=4)
        batches = make_batches(c, Readers(tokenizer, 256, None, vectors=4, packing=packing))
        sizes[columns] = [int(n) // columns for step in range(4) for n in batches[step].demos_length]
        longest = max((row != EMPTY).sum() for step in range(4) for row in batches[step].demos.reshape(-1, columns))
        assert (longest > 6) == (columns == 200)
    assert sizes[200] == sizes[6] == [c.data.k] * 16
    [said] = [message for message in caplog.messages if "no chunk" in message]
    states(said, "chunk of 6", "prefix.chunk_tokens")


def test_truncation_of_the_release_is_refused_beside_chunks(folder, distiller):
    c = config(folder, **{"data.release_truncation": True})
    with says("data.release_truncation", "chunks"):
        Chunked.around(distiller).check_use(c)


@pytest.mark.slow
def test_gradients_reach_every_chunk(distiller):
    model = Chunked.around(distiller, "concat", chunk_demos=2, chunk_tokens=12)
    context = Packing(model.width, 2, 9).lay_out([np.asarray(d, np.int32) for d in demonstrations(6)])
    rows, length = jnp.asarray(context[None]), jnp.asarray([len(context)])

    def last_chunk(params):
        return (model.apply(params, rows, length).embeds[:, -4:] ** 2).sum()

    gradient = jax.grad(last_chunk)(model.params)
    assert np.abs(gradient["placeholders"]).max() > 0
    moved = dataclasses.replace(model, params=jax.tree.map(lambda a, g: a - 0.1 * g, model.params, gradient))
    assert last_chunk(moved.params) != last_chunk(model.params)
