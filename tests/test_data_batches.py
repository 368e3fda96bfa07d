"""Batches: a pure function of (seed, step), sharded by process, one shape for all, and what stands in them."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import save_tokenizer
from data_files import make_world, tiny_config, words, write_examples, write_text
from facts import says, states

from mend_jax.data import sampling
from mend_jax.data.batches import Batch, make_batches
from mend_jax.data.readers import Readers
from mend_jax.data.rows import windows

STAGES = ("pretrain", "finetune", "lm")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def batches(world, tokenizer, stage, split="train", processes=(0, 1), **data):
    return make_batches(tiny_config(world, stage, **data), Readers(tokenizer, 96, 80), split, processes or (0, 1))


def arrays(batch: Batch):
    query = batch.query
    return [batch.demos, batch.demos_length, query.tokens, query.length, query.target_start, batch.ids]


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_a_function_of_seed_and_step(world, tokenizer, stage):
    one, two = batches(world, tokenizer, stage), batches(world, tokenizer, stage)
    backwards = {step: two[step] for step in reversed(range(12))}
    for step in range(12):
        assert same(one[step], backwards[step])
    assert not same(one[0], one[1])
    other = tiny_config(world, stage)
    other.seed = 1
    assert not same(make_batches(other, Readers(tokenizer, 96, 80))[0], one[0])


@pytest.mark.parametrize("stage", STAGES)
def test_the_iterator_goes_on_from_any_step(world, tokenizer, stage):
    made = batches(world, tokenizer, stage)
    iterator = made.iterator(7)
    for step in range(7, 15):
        assert same(next(iterator), made[step])


def test_rows_draw_the_number_of_their_vectors(world, tokenizer):
    config, readers = tiny_config(world, "finetune"), Readers(tokenizer, 96, 80)
    assert make_batches(config, readers)[0].vectors is None
    config.prefix.nested = (1, 2)
    whole, again = make_batches(config, readers), make_batches(config, readers)
    parts = [make_batches(config, readers, share=(i, 2)) for i in (0, 1)]
    drawn = {step: whole[step].vectors for step in range(12)}
    for step, vectors in reversed(drawn.items()):
        np.testing.assert_array_equal(again[step].vectors, vectors)
        np.testing.assert_array_equal(np.concatenate([part[step].vectors for part in parts]), vectors)
    assert set(np.concatenate(list(drawn.values())).tolist()) == {1, 2, config.prefix.length}
    assert make_batches(config, readers, "validation").lengths == ()


@pytest.mark.parametrize("stage", STAGES)
def test_processes_share_one_batch_of_one_shape(world, tokenizer, stage):
    whole = batches(world, tokenizer, stage)
    parts = [batches(world, tokenizer, stage, processes=(i, 2)) for i in range(2)]
    for step in range(8):
        both = [part[step] for part in parts]
        for together, first, second in zip(arrays(whole[step]), *map(arrays, both), strict=True):
            assert first.shape == second.shape and len(first) == 2
            assert np.array_equal(together, np.concatenate([first, second]))


@pytest.mark.parametrize("stage", STAGES)
def test_every_row_of_a_window_comes_once_and_padding_is_right(world, tokenizer, stage):
    made = batches(world, tokenizer, stage)
    seen = []
    for step in range(8):
        batch = made[step]
        assert all(array.dtype == np.int32 for array in arrays(batch)[:-1]) and batch.ids.dtype == np.int64
        for tokens, lengths in ((batch.demos, batch.demos_length), (batch.query.tokens, batch.query.length)):
            for row, length in zip(tokens, lengths, strict=True):
                assert not row[length:].any()
        real = batch.demos_length.sum() + batch.query.length.sum()
        assert made.padding(step) == pytest.approx(1 - real / (batch.demos.size + batch.query.tokens.size))
        seen += batch.ids.tolist()
    assert sorted(seen) == list(range(32))


def test_finetuning_rows_are_examples_of_one_task(world, tokenizer):
    made, options = batches(world, tokenizer, "finetune"), {"w50", "w51"}
    files = {t: world / "metaicl" / "data" / t / f"{t}_16384_100_train.jsonl" for t in "abc"}
    texts = {}
    for task, file in files.items():
        for i, line in enumerate(file.read_text().splitlines()):
            row = json.loads(line)
            x = tokenizer(row["input"])["input_ids"][:6]
            texts[task, i] = x, tokenizer(row["output"])["input_ids"]
    tasks = set()
    for step in range(8):
        batch = made[step]
        for row in range(4):
            task, chosen, (query,), budget, _ = made.rows.draw(int(batch.ids[row]))
            name = "abc"[task]
            tasks.add(name)
            assert query not in chosen and len(set(chosen)) == len(chosen) == 4
            demos = [token for i in chosen for part in texts[name, i] for token in part]
            assert batch.demos[row, : batch.demos_length[row]].tolist() == demos
            x, y = texts[name, query]
            length, start = batch.query.length[row], batch.query.target_start[row]
            assert batch.query.tokens[row, :length].tolist() == x + y and start == len(x)
            assert tokenizer.decode(batch.query.tokens[row, start:length]) in options
            assert batch.demos_length[row] <= budget
            assert made.describe(batch.ids[row]).startswith(f"task {name}: query {query}")
    assert tasks == set("abc")


def test_what_does_not_fit_is_left_out(world, tokenizer):
    made = batches(world, tokenizer, "finetune", max_demo_tokens=15)
    whole = [made.rows.cut[task][chosen] for task, chosen, *_ in map(made.rows.draw, range(60))]
    assert {len(lengths) for lengths in whole} >= {2, 3, 4} and max(map(sum, whole)) <= 15
    assert made[0].demos.shape[1] <= 15
    narrow = make_batches(tiny_config(world, "finetune"), Readers(tokenizer, 30, 80))  # the LLM's window: 30 tokens
    for step in range(8):
        batch = narrow[step]
        assert (batch.demos_length + batch.query.length).max() <= 30


def test_not_even_one_demonstration_fits(world, tokenizer):
    with says(re.compile("'[abc]'"), 2, "config.data.max_demo_tokens"):
        batches(world, tokenizer, "finetune", max_demo_tokens=2)[0]


def test_a_query_that_no_bucket_holds_is_never_drawn(world, tokenizer):
    made = batches(world, tokenizer, "finetune", query_buckets=(4, 5))
    assert max(made[step].query.length.max() for step in range(8)) <= 5
    with says("'a'", 2, "config.data.query_buckets"):
        batches(world, tokenizer, "finetune", query_buckets=(2,))


def test_release_truncation(tmp_path, tokenizer):
    pairs = [(words(i, 100), "w50") for i in range(20)]
    write_examples(tmp_path / "metaicl" / "data" / "a" / "a_16384_100_train.jsonl", "a", pairs, [])
    (tmp_path / "metaicl" / "partitions.json").write_text(json.dumps({"tiny": {"train": ["a"], "test": ["a"]}}))
    data = {
        "max_input_tokens": 99,
        "max_demo_tokens": 900,
        "k": 10,
        "demo_buckets": (512, 900),
        "query_buckets": (100,),
    }
    config = tiny_config(tmp_path, "finetune", release_truncation=True, **data)
    made = make_batches(config, Readers(tokenizer, 1024, 1024))
    batch = made[0]
    assert batch.demos.shape == (4, 642) and batch.teacher_demos.shape == (4, 766)
    assert (batch.demos_length == 642).all() and (batch.teacher_demos_length == 766).all()
    assert (batch.teacher_demos[:, :642] == batch.demos).all()
    assert made.padding(0) == 0
    config.data.release_truncation = False
    whole = make_batches(config, Readers(tokenizer, 1024, 1024))[0]
    assert (whole.demos_length == 900).all() and whole.teacher_demos is None


def test_a_soft_prompt_reads_no_demonstrations(world, tokenizer):
    config = tiny_config(world, "finetune")
    config.loss.kd, readers = 0.0, Readers(tokenizer, 96, reads_demos=False)
    batch = make_batches(config, readers)[0]
    assert batch.demos.shape == (4, 0) and not batch.demos_length.any() and batch.query.length.all()
    config.loss.kd = 1.0  # a teacher does
    assert make_batches(config, readers)[0].demos.shape[1] > 0


def test_pretraining_continues_the_context(world, tokenizer):
    made = batches(world, tokenizer, "pretrain")
    for step in range(8):
        batch = made[step]
        for row in range(4):
            demos = batch.demos[row, : batch.demos_length[row]]
            query = batch.query.tokens[row, : batch.query.length[row]]
            text = made.rows.store[made.rows.document(int(batch.ids[row]))][:64]
            assert np.array_equal(np.concatenate([demos, query]), text)
            assert len(text) >= 32 and len(demos) == int(0.8 * len(text)) and batch.query.target_start[row] == 0


def test_short_texts_are_skipped_and_an_epoch_has_every_other(world, tokenizer):
    made = batches(world, tokenizer, "pretrain")
    drawn = [made.rows.document(row) for row in range(60)]
    short = {i for i in range(60) if made.rows.store.lengths[i] < 32}
    assert short and not short & set(drawn)
    assert set(drawn) == set(range(60)) - short
    assert drawn != [made.rows.document(row) for row in range(60, 120)]  # another order in the next epoch


def test_texts_too_short(tmp_path, tokenizer):
    write_text(tmp_path / "c4", "c4-train.json.gz", [words(i, 20) for i in range(30)])
    config = tiny_config(tmp_path, "pretrain")
    with says(tmp_path / "c4", 20, "config.data.max_text_tokens", 32):
        make_batches(config, Readers(tokenizer, 96, 80))


def test_a_continuation_beyond_the_window(world, tokenizer):
    with says(58, 60, "config.data.max_text_tokens", "config.data.beta"):
        make_batches(tiny_config(world, "pretrain", beta=0.1), Readers(tokenizer, 60, 80))
    wide = batches(world, tokenizer, "pretrain", beta=0.1)[0]  # longer than any of config.data.query_buckets
    assert wide.query.tokens.shape[1] >= 0.9 * 32


def test_vectors_that_leave_no_room(world, tokenizer):
    with says("distiller", "4 tokens", "config.prefix.length = 4"):
        make_batches(tiny_config(world, "finetune"), Readers(tokenizer, 96, 4))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("length, vectors", [(60, 1), (4, 40)])
def test_a_prefix_of_other_than_length_vectors(world, tokenizer, stage, length, vectors):
    """The LLM has room for `vectors`, the distiller for its prefix.length placeholders."""
    config = tiny_config(world, stage)
    config.prefix.length = length
    made, usual = (make_batches(config, Readers(tokenizer, 160, 80, vectors=count)) for count in (vectors, length))
    for step in range(8):
        assert made[step].demos_length.max() <= 80 - length
        assert same(made[step], usual[step])  # the LLM's window is wide enough for both
    narrow = Readers(tokenizer, 44, 2**30, vectors=vectors)
    if (stage, vectors) == ("pretrain", 40):
        with says("LLM", 44, 40, "config.prefix.length = 4", "config.data.beta"):
            make_batches(config, narrow)
    elif vectors == 40:
        assert make_batches(config, narrow).rows.query_buckets[-1] == 4


def test_language_model_rows(world, tokenizer):
    made = batches(world, tokenizer, "lm", text_share=0.25)
    counts, kinds = set(), []
    for step in range(16):
        batch = made[step]
        assert (
            batch.demos.shape == (4, 0) and batch.query.tokens.shape == (4, 32) and not batch.query.target_start.any()
        )
        for row, number in enumerate(batch.ids):
            kinds.append(made.rows.text_number(int(number)))
            if kinds[-1] is not None:
                assert batch.query.length[row] == 32
                continue
            task, chosen, _ = made.rows.draw(int(number))
            counts.add(len(chosen))
            examples = [made.rows.stores[task].example(i, 6) for i in chosen]
            flat = [token for example in examples for part in example for token in part]
            assert batch.query.tokens[row, : batch.query.length[row]].tolist() == flat
    assert counts == {1, 2, 3, 4, 5}  # up to K + 1
    assert [k for k in kinds if k is not None] == list(range(16))  # a quarter of each batch, no text twice in an epoch


def test_short_texts_are_packed_with_an_end_between(tmp_path, tokenizer):
    write_text(tmp_path / "c4", "c4-train.json.gz", [words(i, 10) for i in range(30)])
    config = tiny_config(tmp_path, "lm", text_share=1.0, validation_items=4)
    batch = make_batches(config, Readers(tokenizer, 96))[0]
    assert (batch.query.length == 32).all()
    assert (batch.query.tokens[:, 10] == 1).all() and (batch.query.tokens[:, 21] == 1).all()  # <eos>
    assert (batch.query.tokens == 1).sum() == 8


def test_long_texts_are_cut_anywhere(world, tokenizer):
    made = batches(world, tokenizer, "lm", text_share=1.0)
    rows = [batch.query.tokens[i] for batch in map(made.__getitem__, range(8)) for i in range(4)]
    assert len({int(row[0]) for row in rows}) > 10


def test_lm_sequence_and_window(world, tokenizer):
    with says("config.data.sequence_length", 200, "LLM", 96):
        batches(world, tokenizer, "lm", sequence_length=200)
    with says(re.compile("'[abc]'"), "config.data.sequence_length = 2"):
        batches(world, tokenizer, "lm", sequence_length=2, text_share=0.0)[0]


def test_validation_is_held_out_and_fixed(world, tokenizer):
    made = batches(world, tokenizer, "pretrain", "validation")
    assert made.steps == 2
    rows = [made.rows.document(int(row)) for batch in made.iterator() for row in batch.ids]
    assert rows == list(range(8))
    starts = [made.rows.store[i][0] for i in range(8)]
    assert starts == [2 + 3 * i for i in range(8)]  # the validation file's words
    tasks = batches(world, tokenizer, "lm", "validation", text_share=0.0)
    assert {store.task for store in tasks.rows.stores} == {"t"} and len(tasks.rows.stores[0]) == 8


def test_missing_tasks_are_named_once(world, tokenizer, caplog):
    config = tiny_config(world, "finetune")
    tasks = world / "metaicl" / "partitions.json"
    tasks.write_text(json.dumps(json.loads(tasks.read_text()) | {"more": {"train": ["a", "q", "r"], "test": ["t"]}}))
    config.data.partition = "more"
    assert [store.task for store in make_batches(config, Readers(tokenizer, 96, 80)).rows.stores] == ["a"]
    [said] = [r.getMessage() for r in caplog.records if "missing" in r.getMessage()]
    states(said, "2 of 3", "meta-train", world / "metaicl", "q, r")
    config.data.partition = "qa_to_qa"
    with says(world / "metaicl", 37, "meta-train", "'qa_to_qa'", "config.data.tasks", "config.data.partition"):
        make_batches(config, Readers(tokenizer, 96, 80))
    own = {"more": {"train": ["aa"], "test": ["t"]}, "none": {"train": [], "test": ["t"]}}
    tasks.write_text(json.dumps(json.loads(tasks.read_text()) | own))
    config.data.partition = "more"
    with says(world / "metaicl/data/aa/aa_16384_100_train.jsonl", "'a'", "'aa'"):
        make_batches(config, Readers(tokenizer, 96, 80))
    config.data.partition = "none"
    with says("'none'", "no meta-train tasks"):
        make_batches(config, Readers(tokenizer, 96, 80))


def test_seeds_without_files_are_named(world, tokenizer):
    config = tiny_config(world, "lm")
    config.evaluate.seeds = (13, 42, 87)
    with says(world / "metaicl", "'tiny'", "seed 13", "42, 87", "--config.evaluate.seeds=13"):
        make_batches(config, Readers(tokenizer), "validation")


def test_more_demonstrations_than_examples(world, tokenizer):
    with says("'a'", "20 examples", "config.data.k = 20", 21):
        batches(world, tokenizer, "finetune", k=20, max_demo_tokens=800)
    made = batches(world, tokenizer, "lm", k=20, text_share=0.0)  # a sequence has what there is
    drawn = [made.rows.draw(row)[1] for row in range(50)]
    assert all(len(set(examples)) == len(examples) <= 20 for examples in drawn)


def test_batches_that_do_not_divide(world, tokenizer):
    with says("config.train.batch_size = 4", "3 processes"):
        batches(world, tokenizer, "finetune", processes=(0, 3))


def test_missing_paths(world, tokenizer):
    for stage, name in (("pretrain", "text"), ("finetune", "tasks"), ("lm", "text"), ("lm", "tasks")):
        with says(f"config.data.{name}"):
            batches(world, tokenizer, stage, **{name: ""})
        with says(world / {"text": "no", "tasks": "no/data"}[name], f"config.data.{name}"):
            batches(world, tokenizer, stage, **{name: str(world / "no")})


def test_chunks_have_few_sizes_which_hold_every_context():
    packing = sampling.Packing(columns=64, demos=1, chunks=16)
    assert packing.buckets((288, 512, 900), 16, 16) == (320, 512, 960, 1024)
    assert packing.buckets((288, 512, 900), 5) == (320,)
    assert packing.buckets((4096,), 4, 30) == (256, 1024)  # no more than there are chunks


def test_buckets_hold_every_length():
    assert windows.buckets((128, 256, 900), 900) == (128, 256, 900)
    assert windows.buckets((128, 256, 900), 300) == (128, 256, 300)
    assert windows.buckets((900, 128), 1000) == (128, 900, 1000)


@pytest.mark.parametrize("stage", STAGES)
def test_contents_change_with_the_data_alone(tmp_path, world, tokenizer, stage):
    shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("cache"))
    contents = [batches(folder, tokenizer, stage).contents for folder in (world, tmp_path / "world")]
    assert contents[0] == contents[1] and contents[0].keys() == {
        "pretrain": {"data.text"}, "finetune": {"data.tasks"}, "lm": {"data.text", "data.tasks"},
    }[stage]  # fmt: skip
    texts = [words(i, 30 + 7 * (i % 9)) for i in range(40)]
    write_text(tmp_path / "world" / "c4", "c4-train.00000-of-00002.json.gz", [texts[1], texts[0], *texts[2:]])
    examples = tmp_path / "world/metaicl/data/a/a_16384_100_train.jsonl"
    examples.write_text(examples.read_text().replace("w50", "w51"))
    changed = batches(tmp_path / "world", tokenizer, stage).contents
    assert all(changed[name] != contents[0][name] for name in changed)


def test_sorting_saves_padding(world, tokenizer):
    sorted_, drawn = batches(world, tokenizer, "finetune"), batches(world, tokenizer, "finetune", bucket_window=1)
    mean = lambda made: np.mean([made.padding(step) for step in range(32)])  # noqa: E731
    assert mean(sorted_) < mean(drawn)


@pytest.mark.parametrize("partition", ["class_to_class", "qa_to_qa"])
def test_real_tasks(shared, tmp_path, partition):
    from transformers import AutoTokenizer

    config = tiny_config(tmp_path, "finetune", tasks=str(shared / "metaicl"), partition=partition, k=16)
    config.data.max_demo_tokens, config.data.max_input_tokens = 900, 256
    config.data.demo_buckets, config.data.query_buckets = (256, 512, 900), (64, 128, 512)
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    made = make_batches(config, Readers(gpt2, 1024, 1024))
    for step in range(8):
        batch = made[step]
        assert (batch.demos_length + batch.query.length).max() <= 1024 and batch.demos_length.min() > 0
