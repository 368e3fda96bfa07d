"""Symbol tuning: words in the place of labels, alike within a context, others in the next, and only where they can be read."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from data_files import make_world, tiny_config, words, write_examples
from facts import says, states

from mend_jax.data.batches import make_batches
from mend_jax.data.readers import Readers
from mend_jax.data.symbols import MOST_LABELS, vocabulary_words
from mend_jax.losses import token_weights

LABELS = {"w50", "w51"}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["word"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """data_files.make_world, where every output of task c is another one, and task b has three labels."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    path = folder / "metaicl" / "data"
    write_examples(path / "c" / "c_16384_100_train.jsonl", "c", [(words(i, 3), f"w{i}") for i in range(30)], [])
    pairs = [(words(i, 2 + i % 5), f"w{50 + i % 3}") for i in range(20)]
    write_examples(path / "b" / "b_16384_100_train.jsonl", "b", pairs, ["w50", "w51", "w52"])
    return folder


def batches(world, tokenizer, stage, share, split="train", readers=None, **data):
    config = tiny_config(world, stage, symbols=share, **data)
    return make_batches(config, readers or Readers(tokenizer, 96, 80), split)


def examples_of(world, task):
    lines = (world / "metaicl" / "data" / task / f"{task}_16384_100_train.jsonl").read_text().splitlines()
    return [(row["input"], row["output"]) for row in map(json.loads, lines)]


def replaced(pairs, shown):
    """{label: word} of examples and what a context shows of them; fails if a label has two words or a word two labels."""
    pairs = [(y, other) for (x, y), (said, other) in zip(pairs, shown, strict=True)]
    found = dict(pairs)
    assert all(found[y] == other for y, other in pairs) and len(set(found.values())) == len(found)
    return found


def row_of(made, number, task, read):
    """The examples of a finetuning row, and what stands there in their place: demonstrations, then queries."""
    drawn = made.rows.draw(number)
    demos, asked, teacher = made.rows.tokens(number)
    texts = [(" ".join(words.split()[:6]), y) for words, y in (task[i] for i in [*drawn.demos, *drawn.queries])]
    said = read(demos if teacher is None else teacher).split() + [w for ids, _ in asked for w in read(ids).split()]
    shown = []
    for x, _ in texts:
        count = len(x.split())
        shown.append((" ".join(said[:count]), said[count]))
        said = said[count + 1 :]
    assert not said
    return drawn, texts, shown


def test_a_context_has_its_own_word_for_each_label(world, tokenizer):
    made = batches(world, tokenizer, "finetune", 1.0, queries=2)
    rows = {name: examples_of(world, name) for name in "abc"}
    seen = {name: [] for name in "abc"}
    for number in range(60):
        name = "abc"[made.rows.draw(number).task]
        drawn, texts, shown = row_of(made, number, rows[name], tokenizer.decode)
        assert [x for x, _ in texts] == [x for x, _ in shown]
        if drawn.symbols is None:  # of task c, or the label of a query is not among the demonstrations
            assert texts == shown
            labels = {y for _, y in texts[: len(drawn.demos)]}
            assert name == "c" or not {y for _, y in texts[len(drawn.demos) :]} <= labels
            continue
        seen[name].append(replaced(texts, shown))
        assert {y for _, y in shown[len(drawn.demos) :]} <= {y for _, y in shown[: len(drawn.demos)]}
        states(made.describe(number), f"task {name}", "labels")
    assert not seen["c"] and len(seen["a"]) > 10 and len(seen["b"]) > 3
    assert len({found[y] for found in seen["a"] for y in found}) > 15  # others in every context
    assert any(set(found.values()) - LABELS for found in seen["b"])


def test_batches_are_as_long_as_planned(world, tokenizers):
    """Words may have more tokens than labels, for either model."""
    pair = tokenizers["word"], tokenizers["byte"]
    for queries in (1, 2):
        readers, data = Readers(pair[0], 96, 80, pair[1]), {"max_demo_tokens": 50, "max_input_tokens": 40}
        made = batches(world, None, "finetune", 1.0, readers=readers, queries=queries, **data)
        rows = {name: examples_of(world, name) for name in "abc"}
        for number in range(40):
            demos, asked, teacher = made.rows.tokens(number)
            assert made.rows.lengths(number) == (len(demos), *(len(ids) for ids, _ in asked))
            assert made.rows.teacher_length(number) == len(teacher) <= 50 and len(demos) <= 50
            assert made.rows.target_length(number) == max(len(ids) - start for ids, start in asked)
            drawn, _, shown = row_of(made, number, rows["abc"[made.rows.draw(number).task]], pair[0].decode)
            assert pair[1].decode(demos).split() == " ".join(" ".join(p) for p in shown[: len(drawn.demos)]).split()


def test_a_share_of_the_rows(world, tokenizer):
    """The others are the rows without symbols; a row draws alike whatever the share, and with whatever batch it comes."""
    none, half, all_ = (batches(world, tokenizer, "finetune", share) for share in (0.0, 0.5, 1.0))
    changed = 0
    for number in reversed(range(80)):
        one, two, three = (made.rows.tokens(number) for made in (none, half, all_))
        same = half.rows.draw(number).symbols is None
        changed += not same
        for a, b in zip((one if same else three)[0], two[0], strict=True):
            assert a == b
        assert same or three[0].tolist() != one[0].tolist()
    renamed = sum(all_.rows.draw(number).symbols is not None for number in range(80))
    assert 0.3 * renamed < changed < 0.7 * renamed


@pytest.mark.parametrize("stage", ["finetune", "lm"])
def test_validation_has_the_labels_of_its_files(world, tokenizer, stage):
    made, plain = (batches(world, tokenizer, stage, share, "validation", text_share=0.0) for share in (1.0, 0.0))
    for number in range(8):
        assert made.rows.tokens(number)[1][0][0].tolist() == plain.rows.tokens(number)[1][0][0].tolist()


def test_who_reads_no_demonstrations_keeps_the_labels(world, tokenizer):
    config, readers = tiny_config(world, "finetune", symbols=1.0), Readers(tokenizer, 96, reads_demos=False)
    config.loss.kd = 0.0
    made = make_batches(config, readers)
    assert all(made.rows.draw(number).symbols is None for number in range(40))


def test_sequences_and_the_outputs_that_are_predicted(world, tokenizer):
    """All outputs, but of words in the place of labels only those that have stood there before."""
    config = tiny_config(world, "lm", symbols=0.5, text_share=0.0)
    config.loss.clm_tokens = "outputs"
    made = make_batches(config, Readers(tokenizer, 96))
    rows, kinds = {name: examples_of(world, name) for name in "abc"}, set()
    for step in range(12):
        batch = made[step]
        counted = np.asarray(batch.query.counted)
        assert counted.shape == batch.query.tokens.shape and counted.dtype == bool
        weights = np.asarray(token_weights(batch.query)[1].clm)
        assert weights.sum() == pytest.approx(1) and (np.roll(weights, 1, 1) > 0).tolist() == counted.tolist()
        for row, number in enumerate(batch.ids):
            task, shown, symbols = made.rows.draw(int(number))
            name = "abc"[task]
            tokens = tokenizer.convert_ids_to_tokens(batch.query.tokens[row, : batch.query.length[row]])
            at, known, met = 0, set(), []
            for i in shown:
                x, y = rows[name][i]
                at += len(x.split()[:6])
                word = tokens[at]
                assert symbols is not None or word == y
                assert counted[row, at] == (symbols is None or word in known)
                known.add(word)
                met.append(at)
                at += 1
            assert at == len(tokens) and not set(np.flatnonzero(counted[row])) - set(met) and counted[row].any()
            kinds.add((name, symbols is None))
    assert kinds == {("a", True), ("a", False), ("b", True), ("b", False), ("c", True)}


def test_text_among_sequences_is_predicted_whole(world, tokenizer):
    config = tiny_config(world, "lm", text_share=0.5)
    config.loss.clm_tokens = "outputs"
    made = make_batches(config, Readers(tokenizer, 96))
    batch = made[0]
    texts = [made.rows.text_number(int(number)) is not None for number in batch.ids]
    assert sum(texts) == 2 and batch.query.counted[np.asarray(texts)].all()
    assert not batch.query.counted[~np.asarray(texts)].all(1).any()


def test_sequences_without_text_are_sorted_by_length(world, tokenizer):
    """Into the padded sizes of queries, every row of a window once."""
    made = batches(world, tokenizer, "lm", 0.0, text_share=0.0)
    batch = [made[step] for step in range(8)]
    assert {b.query.tokens.shape[1] for b in batch} == {8, 16, 32}
    assert sorted(number for b in batch for number in b.ids.tolist()) == list(range(32))


def test_words_of_a_vocabulary():
    def of(*tokens):
        return vocabulary_words(SimpleNamespace(get_vocab=lambda: {token: i for i, token in enumerate(tokens)}))

    assert of("Ġhouse", "Ġat", "ing", "ĠThe", "ĠØ§", "Ġx86", "Ġ", "", "Ġcan't") == ["house", "x86"]
    assert of("▁tree", "tree", "ly") == ["tree"]
    assert of("baba", "Kim", "<eos>", "dodo") == ["baba", "dodo"]


def test_a_vocabulary_of_too_few_words(world, tokenizers):
    with says("config.data.symbols", "vocabulary", MOST_LABELS, 0):
        batches(world, tokenizers["byte"], "finetune", 1.0)
