"""A distiller with another tokenizer than the LLM: both read the same examples, in every stage, evaluation and export."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizer_files
from data_files import make_world, tiny_config, words, write_examples
from facts import says

import mend_jax
from mend_jax import evaluate, prepare, train
from mend_jax.data import prepared, tokenize
from mend_jax.data.batches import make_batches
from mend_jax.data.readers import Readers
from mend_jax.data.tokenize import other_tokenizer
from mend_jax.interchange.export import export
from mend_jax.prefixes import Demonstrations
from mend_jax.run import build, reporting
from mend_jax.run import layout as parallel
from mend_jax.scoring.tasks import make_context

pytestmark = pytest.mark.slow

PAIRS = [("word", "byte"), ("piece", "byte"), ("byte", "piece"), ("byte", "word")]  # the LLM's, the distiller's
WINDOWS = 110, 100


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """data_files.make_world, and in task a inputs so long that every tokenizer must cut them."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    pairs = [(words(i, 2 + i % 9), f"w{50 + i % 2}") for i in range(20)]
    path = folder / "metaicl" / "data" / "a" / "a_16384_100_train.jsonl"
    write_examples(path, "a", pairs, ["w50", "w51"])
    return folder


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request, tokenizers):
    return tuple(tokenizers[kind] for kind in request.param)


def batches(world, pair, stage, processes=(0, 1), **data):
    llm, own = pair
    config = tiny_config(world, stage, **data)
    return make_batches(config, Readers(llm, *WINDOWS, other_tokenizer(llm, own)), "train", processes or (0, 1))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.cache
def letters(tokenizer, tokens):
    """What the first of these tokens say, for each number of them: white space is not compared."""
    return ["".join(tokenizer.decode(tokens[:count]).split()) for count in range(len(tokens) + 1)]


def shared(pair, text, limits):
    """The longest beginning of a text that both can read, as each reads it: found by decoding every beginning."""
    read = [ids(tokenizer, text) for tokenizer in pair]
    if all(len(row) <= limit for row, limit in zip(read, limits, strict=True)):
        return read
    said = [
        letters(tokenizer, tuple(row))[: limit + 1] for tokenizer, row, limit in zip(pair, read, limits, strict=True)
    ]
    longest = max(set(said[0]) & set(said[1]), key=len)
    return [row[: beginnings.index(longest)] for row, beginnings in zip(read, said, strict=True)]


def contexts(batch, row):
    """What the LLM and what the distiller reads."""
    teacher = batch.teacher_demos[row, : batch.teacher_demos_length[row]].tolist()
    return teacher, batch.demos[row, : batch.demos_length[row]].tolist()


def test_both_read_the_same_examples(world, pair):
    """Example by example: no input is cut elsewhere for the one than for the other, and as many fit as both can read."""
    limit = 7
    made = batches(world, pair, "finetune", max_input_tokens=limit, max_demo_tokens=35)
    files = {t: world / "metaicl" / "data" / t / f"{t}_16384_100_train.jsonl" for t in "abc"}
    examples = {t: [json.loads(line) for line in file.read_text().splitlines()] for t, file in files.items()}
    counts, cuts = set(), 0
    for step in range(12):
        batch = made[step]
        assert batch.teacher_demos.shape == batch.demos.shape and batch.demos.shape[1] in made.rows.demo_buckets
        for row, number in enumerate(batch.ids):
            task, chosen, [query], *_ = made.rows.draw(int(number))
            rows = [examples["abc"[task]][i] for i in chosen]
            wanted = [], []
            for example in rows:
                x = shared(pair, " " + example["input"], (limit, limit))
                cuts += len(x[0]) < len(ids(pair[0], " " + example["input"]))
                for context, tokenizer, cut in zip(wanted, pair, x, strict=True):
                    context += cut + ids(tokenizer, " " + example["output"])
            assert contexts(batch, row) == wanted
            texts = [tokenizer.decode(context) for tokenizer, context in zip(pair, wanted, strict=True)]
            assert texts[0].split() == texts[1].split() and "w5" in texts[0]
            asked = examples["abc"[task]][query]
            y = ids(pair[0], " " + asked["output"])
            x = ids(pair[0], " " + asked["input"])[:limit]  # the LLM alone reads it
            length, start = batch.query.length[row], batch.query.target_start[row]
            assert batch.query.tokens[row, :length].tolist() == x + y and start == len(x)
            counts.add(len(chosen))
    assert cuts > 20 and len(counts) > 1


def test_both_read_the_same_text_and_the_llm_the_rest(world, pair):
    made = batches(world, pair, "pretrain", max_text_tokens=90, max_demo_tokens=64)
    longest = 0
    for step in range(12):
        batch = made[step]
        for row, number in enumerate(batch.ids):
            document = made.rows.document(int(number))
            read, _ = made.rows.store.readings(document)
            text = pair[0].decode(read[0])
            teacher, demos = contexts(batch, row)
            cut = min(len(read[0]), 90)
            share = int(0.8 * cut)
            budgets = min(share, 64, WINDOWS[0] - (cut - share)), min(64, WINDOWS[1] - 4)
            assert [teacher, demos] == shared(pair, text, budgets)
            rest = read[0][len(teacher) : len(teacher) + cut - share].tolist()
            assert batch.query.tokens[row, : batch.query.length[row]].tolist() == rest and rest
            longest = max(longest, len(teacher), len(demos))
    assert longest > 55


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_processes_have_one_shape_and_any_step_can_be_asked_for(world, tokenizers, stage):
    pair = tokenizers["word"], tokenizers["byte"]
    whole, parts = batches(world, pair, stage), [batches(world, pair, stage, (i, 2)) for i in range(2)]
    for step in (9, 0, 3):
        both = [jax.tree.leaves(part[step]) for part in parts]
        assert len(both[0]) == 8
        for together, *halves in zip(jax.tree.leaves(whole[step]), *both, strict=True):
            np.testing.assert_array_equal(together, np.concatenate(halves))
        real = whole[step].demos_length.sum() + whole[step].query.length.sum()
        size = whole[step].demos.size + whole[step].query.tokens.size
        assert whole.padding(step) == pytest.approx(1 - real / size)


@pytest.mark.parametrize("stage, digest", [("pretrain", "be2673dd89866002"), ("finetune", "85a108156a3fbd34")])
def test_one_tokenizer_for_both_changes_nothing(tmp_path, tokenizers, stage, digest, monkeypatch):
    """The very batches of the version before two tokenizers were possible; and no text is read twice."""
    again = tokenizer_files.load(tokenizer_files.save_word_tokenizer(tmp_path / "again"))
    calls, run_job = [], prepared.run_job
    monkeypatch.setattr(prepared, "run_job", lambda own, *rest: calls.append(len(own)) or run_job(own, *rest))
    llm = tokenizers["word"]
    made = make_batches(
        tiny_config(make_world(tmp_path), stage), Readers(llm, 96, 80, distiller_tokenizer=other_tokenizer(llm, again))
    )
    found = hashlib.sha256()
    for step in range(8):
        batch = made[step]
        assert batch.teacher_demos is None and batch.teacher_demos_length is None
        query = batch.query
        for a in (batch.demos, batch.demos_length, query.tokens, query.length, query.target_start, batch.ids):
            found.update(str((a.shape, a.dtype.str)).encode() + a.tobytes())
    assert found.hexdigest()[:16] == digest
    assert calls == [1, 1, 1]


def test_workers_write_both_readings(world, tmp_path, tokenizers, monkeypatch):
    pair = tokenizers["word"], tokenizers["byte"]
    alone = prepared.prepare_text(tiny_config(world, "pretrain", cache=str(tmp_path / "a")), *pair)
    monkeypatch.setattr(prepared, "IN_PROCESS", 0)
    together = prepared.prepare_text(tiny_config(world, "pretrain", cache=str(tmp_path / "b"), processes=2), *pair)
    for a, b in zip(alone["shards"], together["shards"], strict=True):
        assert Path(a["path"]).read_bytes() == Path(b["path"]).read_bytes() and a["path"] != b["path"]
    assert together["tokenizers"] == 2


# Training, evaluation and export: T5's LLM with its own kind of tokenizer, GPT-2's distiller with another


@pytest.fixture(scope="module")
def program(tmp_path_factory, world):
    """A config, and what two steps of each stage left in `pretrain` and `finetune`."""
    folder = tmp_path_factory.mktemp("program")
    llm = tokenizer_files.save_model_folder(folder / "llm", "piece", tokenizer_files.T5, seed=1)
    backbone = tokenizer_files.save_model_folder(folder / "backbone", "byte", tokenizer_files.GPT2, seed=2)
    c = tiny_config(world, "pretrain", cache=str(folder / "cache"), max_demo_tokens=48, max_input_tokens=7)
    c.data.demo_buckets, c.data.query_buckets = (48,), (16,)  # few shapes: each is compiled
    c.llm.path, c.prefix.backbone, c.loss.chunk = str(llm), str(backbone), 16
    c.train.batch_size, c.train.steps, c.train.eval_every = jax.device_count(), 1, 1
    assert train.train(c, folder / "pretrain") == 0
    c.stage, c.prefix.start_from = "finetune", str(folder / "pretrain")
    assert train.train(c, folder / "finetune") == 0
    return SimpleNamespace(config=c, folder=folder, llm=mend_jax.load_llm(llm))


def test_both_stages_train(program):
    for stage, score in (("pretrain", "validation_loss"), ("finetune", "dev_score")):
        lines = reporting.read_lines(program.folder / stage / "metrics.jsonl")
        [step], [evaluated] = ([line for line in lines if name in line] for name in ("kd", score))
        assert step["kd"] > 0 and np.isfinite(step["loss"]) and np.isfinite(evaluated[score])


def test_evaluation_and_export(program, tmp_path):
    """The distiller reads its own tokens of the examples that the LLM could read too; the exported one alike."""
    said = export(program.folder / "finetune", tmp_path / "exported")
    assert "Hugging Face folder" in said
    scores, c = {}, program.config.copy_and_resolve_references()
    c.data.max_input_tokens = 10  # nothing is cut
    for name, path in (("run", program.folder / "finetune"), ("exported", tmp_path / "exported")):
        c.evaluate.methods = ("icl", f"mend={path}")
        scores[name] = evaluate.evaluate(c, tmp_path / f"scores_{name}")["methods"]
        predictions = {
            p.name: p.read_text() for p in (tmp_path / f"scores_{name}" / "predictions").glob("mend*/*.jsonl")
        }
        scores[name] = scores[name]["mend"]["per_task"], predictions
    assert scores["run"] == scores["exported"] and len(scores["run"][1]) == 2
    distiller = mend_jax.load_distiller(tmp_path / "exported", program.llm)
    [task, _] = evaluate.load_tasks(c, program.llm, "test")[0]
    context = make_context(c, program.llm, distiller, task).tolist()
    examples = [[t.removeprefix(" ") for t in pair] for pair in task.texts]
    assert context == [i for x, y in examples for text in (x, y) for i in ids(distiller.tokenizer, " " + text)]
    order = np.array([2, 0, 3, 1])
    shuffled = make_context(c, program.llm, distiller, task, order).tolist()
    assert shuffled == [i for n in order for text in examples[n] for i in ids(distiller.tokenizer, " " + text)]
    pairs = [tuple(pair) for pair in examples]
    whole = dataclasses.replace(distiller, max_input_tokens=0)  # its training cut inputs, so it does
    np.testing.assert_array_equal(whole.distill(pairs).embeds, distiller.distill(context).embeds)
    assert not np.array_equal(distiller.distill(pairs).embeds, whole.distill(pairs).embeds)
    assert (
        make_context(c, program.llm, Demonstrations.beside(program.llm), task).max()
        < tokenizer_files.SIZES["piece"]
        <= max(context)
    )


def test_what_the_llm_cannot_read_the_distiller_does_not_read(program):
    """A short budget: the demonstrations left are as many as both can read, the first input cut to the same text."""
    c = program.config.copy_and_resolve_references()
    c.data.max_demo_tokens, c.data.max_input_tokens = 16, 5
    distiller = mend_jax.load_distiller(program.folder / "finetune", program.llm)
    pair = program.llm.tokenizer, distiller.tokenizer
    for task in evaluate.load_tasks(c, program.llm, "test")[0]:
        context = make_context(c, program.llm, distiller, task).tolist()
        wanted, sizes = [], np.zeros(2, int)
        for x, y in task.texts:
            read = [a + ids(t, y) for a, t in zip(shared(pair, x, (5, 5)), pair, strict=True)]
            sizes += [len(row) for row in read]
            if max(sizes) > 16:
                break
            wanted += read[1]
        assert context == wanted and 0 < len(wanted) <= 16 < max(sizes)


def test_losses_of_one_example_read_texts_twice(program):
    distiller = mend_jax.load_distiller(program.folder / "finetune", program.llm)
    losses = mend_jax.training_losses(program.llm, distiller, [("w1 w2", "w50")], [4, 7], [4])
    assert losses["kd"] > 0
    with says("tokenizers", "token ids", "texts"):
        mend_jax.training_losses(program.llm, distiller, [3, 4], [4], [5])


def test_mistakes(program, world, tmp_path, monkeypatch):
    c = program.config.copy_and_resolve_references()
    c.data.release_truncation, c.prefix.start_from = True, ""
    with says("data.release_truncation", "false"):
        train.train(c, tmp_path / "run")
    distiller = mend_jax.load_distiller(program.folder / "finetune", program.llm)
    [task, *_] = evaluate.load_tasks(c, program.llm, "test")[0]
    with says("data.release_truncation", "false"):
        make_context(c, program.llm, distiller, task)
    with says("ids up to 260", "backbone", "260 tokens"):
        tokenize.check_backbone(program.llm.tokenizer, distiller.tokenizer, 260, "small")


def test_prepare_reads_for_both_and_training_finds_it(program, tmp_path, monkeypatch, capsys):
    c = program.config.copy_and_resolve_references()
    c.data.cache = str(tmp_path / "cache")
    made = prepare.prepare(c)
    assert made["text"]["tokenizers"] == made["tasks"]["tokenizers"] == 2
    monkeypatch.setattr(prepared, "run_job", None)
    llm, distiller = program.llm, mend_jax.load_distiller(program.folder / "finetune", program.llm)
    for c.stage in ("pretrain", "finetune"):
        assert build.batches(c, llm, distiller, "train", parallel.make_layout("pmap"))[0].teacher_demos is not None
    monkeypatch.undo()
    c.prefix.kind = "soft_prompt"
    assert prepare.prepare(c)["tasks"]["tokenizers"] == 1
