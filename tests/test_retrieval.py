"""Demonstrations from a pool: which ones they are, that none is the test item itself, and what is kept."""

import json

import numpy as np
import pytest
from facts import says

from mend_jax.data import domains, retrieval
from mend_jax.data.metaicl import Example, read_file
from mend_jax.data.retrieval import cached_neighbours, drawn, neighbours, read_pool
from mend_jax.run.sealed import write_sealed

WORDS = [f"w{i}" for i in range(40)]


def example(*words, output="yes"):
    return Example("t", " ".join(words), output, ("yes", "no"))


@pytest.fixture
def pool():
    rng = np.random.default_rng(0)
    return [example(*rng.choice(WORDS, 4, replace=False)) for _ in range(60)]


def encode(texts):
    """Each word is an axis; the constant axis is what all texts share."""
    rows = np.zeros((len(texts), 41), np.float32)
    for row, text in zip(rows, texts, strict=True):
        row[[WORDS.index(word.lower()) for word in text.split()]] = 1
        row[40] = 30
    return rows


@pytest.mark.parametrize("how", retrieval.PER_ITEM)
def test_no_item_is_its_own_demonstration(pool, how):
    items = [example(*pool[3].input.upper().split()), example("", *pool[7].input.split(), ""), pool[9]]
    found = neighbours(pool, items, 8, how, 13, encode)
    assert found.shape == (3, 8) and all(len(set(row)) == 8 for row in found.tolist())
    for item, row in zip(items, found, strict=True):
        assert retrieval.same_text(item.input) not in {retrieval.same_text(pool[i].input) for i in row}
    with says("'t'", 59, "config.data.k = 60"):
        neighbours(pool, items, 60, how, 13, encode)


@pytest.mark.parametrize("how", ["bm25", "dense"])
def test_near_ones_share_words_and_come_nearest_first(pool, how):
    pool = [*pool, example("w0", "w1", "w2", "w5"), example("w0", "w1", "w8", "w9"), example("w0", "w1", "w2", "w3")]
    [row] = neighbours(pool, [example("w0", "w1", "w2", "w4")], 10, how, 0, encode)
    shared = [len({"w0", "w1", "w2", "w4"} & set(pool[i].input.split())) for i in row]
    assert {60, 62} == set(row[:2].tolist()) and shared[:2] == [3, 3] and min(shared) >= 1
    assert shared == sorted(shared, reverse=True) or how == "bm25"  # which weighs a word by its rarity
    assert np.array_equal(row, neighbours(pool, [example("w0", "w1", "w2", "w4")], 10, how, 1, encode)[0])


def test_bm25_prefers_the_rarer_word():
    pool = [*(example("often", f"w{i}") for i in range(9)), example("seldom", "w10")]
    [row] = neighbours(pool, [example("often", "seldom")], 1, "bm25", 0)
    assert row.tolist() == [9]
    neighbours(pool, [example("nothing", "known")], 2, "bm25", 0)  # shares no word: the pool's first
    neighbours([example("?"), example("!")], [example("...")], 2, "bm25", 0)  # no words at all


def test_drawn_ones_change_with_seed_and_item(pool):
    items = pool[:5]
    first, again, other = (neighbours(pool, items, 6, "random", seed) for seed in (13, 13, 21))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 5
    few, many = drawn(pool, items, 4, 13), drawn(pool, items, 16, 13)
    assert many[:4] == few and len({e.input for e in many}) == 16 and drawn(pool, items, 16, 21) != many
    assert not {e.input for e in many} & {e.input for e in items}
    with says("'t'", 55, "config.data.k = 56"):
        drawn(pool, items, 56, 13)
    begun = drawn(pool, items, 16, 13, [items[0], *pool[9:7:-1]])  # no item, and none of them twice
    assert begun[:2] == pool[9:7:-1] and len({e.input for e in begun}) == 16


def test_neighbours_are_kept_by_content(pool, tmp_path, monkeypatch):
    items, calls = pool[:3], []
    plain = retrieval.neighbours
    monkeypatch.setattr(retrieval, "neighbours", lambda *args: calls.append(args[3]) or plain(*args))
    kept = [cached_neighbours(tmp_path, "a", pool, items, 4, "dense", seed, encode) for seed in (13, 21)]
    assert calls == ["dense"] and np.array_equal(*kept)
    cached_neighbours(tmp_path, "another encoder", pool, items, 4, "dense", 13, encode)
    cached_neighbours(tmp_path, "a", pool[1:], items, 4, "dense", 13, encode)
    for seed in (13, 13, 21):
        cached_neighbours(tmp_path, "a", pool, items, 4, "random", seed, None)
    assert calls == ["dense", "dense", "dense", "random", "random"]
    for wrong in (len(pool), -1, 2**31):  # no examples of the pool
        for file in (tmp_path / "neighbours").iterdir():
            write_sealed(file, {"numbers": [[wrong, 0, 1, 2]] * 3})
        assert np.array_equal(cached_neighbours(tmp_path, "a", pool, items, 4, "dense", 13, encode), kept[0])


def test_the_pool_is_the_training_file_or_all_demonstrations(tmp_path):
    here = tmp_path / "data" / "t"
    here.mkdir(parents=True)
    line = lambda i: json.dumps({"task": "t", "input": f"w{i}", "output": "a", "options": ["a", "b"]}) + "\n"  # noqa: E731
    with says("'t'", "t_16384_100_train.jsonl"):
        read_pool(tmp_path, "t")
    for seed in (13, 21):
        (here / f"t_4_{seed}_train.jsonl").write_text("".join(line(i + (seed == 21)) for i in range(4)))
    assert sorted(e.input for e in read_pool(tmp_path, "t")) == ["w0", "w1", "w2", "w3", "w4"]
    (here / "t_16384_100_train.jsonl").write_text("".join(map(line, range(9))))
    assert len(read_pool(tmp_path, "t")) == 9
    (here / "t_16384_100_train.jsonl").write_text("".join(map(line, [3, 0, 3, 1])))
    assert [e.input for e in read_pool(tmp_path, "t")] == ["w3", "w0", "w3", "w1"]  # as many as the file has


@pytest.mark.parametrize("name", domains.SPELLINGS)
def test_domains_are_metaicls_files(tmp_path, name):
    folder = domains.written(name, tmp_path)
    assert domains.written(name, tmp_path) == folder == domains.written(str(folder), tmp_path)
    with says("experiment.domains", tmp_path / "nowhere", name):
        domains.written(str(tmp_path / "nowhere"), tmp_path)
    for task in domains.TASKS:
        test, demos = (read_file(folder / "data" / task / f"{task}_16_13_{split}.jsonl") for split in ("test", "train"))
        assert len(test) == 60 and len(demos) == 16
        assert not {e.input for e in test} & {e.input for e in read_pool(folder, task)}
        assert all(len(e.options) == 4 and e.output in e.options for e in test)
        places = [e.options.index(e.output) for e in test]
        assert max(map(places.count, range(4))) < 30  # the right one stands anywhere
    if name == domains.TEXT:
        solved = {e.input: e.output for task in ("arithmetic", "code") for e in read_pool(folder, f"domain-{task}")}
        assert solved and all(str(eval(x)) == y for x, y in solved.items())


def test_the_small_world_knows_every_word_of_its_domains(tmp_path):
    from mend_jax.data.small_world_language import World, vocabulary

    known = set(vocabulary(World()))
    for task in domains.TASKS:
        for lines in domains.rows(task, domains.SPELLINGS[domains.SMALL_WORLD]).values():
            assert {
                word for line in lines for text in (line["input"], *line["options"]) for word in text.split()
            } <= known
