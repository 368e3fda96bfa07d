"""Odd and hostile input, a case for each kind of fault that was found once: one sentence, or the right value."""

import contextlib
import gzip
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from answer_files import write_evaluation, write_experiment
from conftest import ROOT, save_tokenizer
from data_files import make_world, tiny_config, write_text
from facts import says, states
from tiny_training import model_folder

from mend_jax.cli import command_line as cli
from mend_jax.cli.text import in_markdown, markdown, shown
from mend_jax.data import c4, metaicl, prepared
from mend_jax.data.evaluation import load_tasks
from mend_jax.data.retrieval import cached_neighbours
from mend_jax.data.stores import TextStore
from mend_jax.interchange.trained import read_trained
from mend_jax.models import weights
from mend_jax.models.families import from_hf_config
from mend_jax.models.folders import fingerprint, load_model, load_tokenizer
from mend_jax.packs.demonstrations import read_demonstrations
from mend_jax.packs.queries import options_of
from mend_jax.prefixes.distiller_folder import read_settings
from mend_jax.report.results import read_results
from mend_jax.run import reading
from mend_jax.run.files import temporary_for
from mend_jax.run.lock import alone_in
from mend_jax.run.reporting import Reporter, read_lines
from mend_jax.scoring import results
from mend_jax.scoring.answers import Source, read_answers, read_scores

LINE = {"task": "t", "input": "a film", "output": "good", "options": ["good", "bad"]}
ROW = json.dumps(LINE)


@pytest.fixture
def task(tmp_path):
    """task(bytes or lines): the file of a task's examples."""

    def write(content):
        path = tmp_path / "t.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else "\n".join(content).encode() + b"\n")
        return path

    return write


# Texts and lines


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        (ROW.replace("a film", "\\ud800 x"), ["half of a character", "\\ud800"]),
        ("[" * 100_000, ["nested too deep", 64]),
        ('{"a":' * 80 + "1" + "}" * 80, ["nested too deep", 64]),
        (ROW[:-1] + ', "n": ' + "9" * 5000 + "}", ["too long, of 5000 digits"]),
        (json.dumps(LINE | {"output": 1, "options": [1, 2]}), ["'output'", "a whole number (1)", '"1"']),
        (json.dumps(LINE | {"output": True, "options": [True, False]}), ["'output'", "a truth value (true)", '"true"']),
        (json.dumps(LINE | {"options": ["good", 2.5]}), ["'options'", "a number (2.5)", '"2.5"']),
        (json.dumps(LINE | {"options": {"good": 1}}), ["'options'", "an object"]),
        ("null", ["JSON object", "null"]),
        (ROW.replace("film", "fi\x00lm"), ["JSON", "control character"]),
    ],
)
def test_lines_that_are_refused(line, facts, task):
    path = task([ROW, line])
    with says(f"{path}, line 2", *facts):
        metaicl.read_file(path)


@pytest.mark.parametrize("read", [metaicl.read_file, read_demonstrations], ids=["task", "demonstrations"])
def test_a_file_in_latin_1_is_refused_with_its_place(read, task):
    path = task(f"{ROW}\n{ROW.replace('film', 'café')}\n".encode("latin-1"))
    with says(path, "UTF-8", "line 2", f"column {ROW.index('film') + 4}", "0xe9"):
        read(path)


def test_a_byte_order_mark_and_other_ends_of_lines_are_read(tmp_path, task):
    plain = metaicl.read_file(task([ROW, ROW]))
    assert metaicl.read_file(task(b"\xef\xbb\xbf" + f"{ROW}\n{ROW}\n".encode())) == plain
    assert metaicl.read_file(task(f"{ROW}\r\n{ROW}\r{' '}".encode())) == plain
    path = task(b"\xef\xbb\xbf" + ROW.encode())
    assert read_demonstrations(path) == [("a film", "good")]
    (tmp_path / "c4-train.json.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "one"}\n'))
    assert [row["text"] for row in c4.read_documents(tmp_path / "c4-train.json.gz")] == ["one"]
    (tmp_path / "data").mkdir()
    (tmp_path / "partitions.json").write_bytes(b'\xef\xbb\xbf{"p": {"train": [], "test": ["t"]}}')
    assert metaicl.load_partition(tmp_path, "p")["test"] == ["t"]


def test_a_line_has_an_end(task, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_LINE", 2000)
    path = task([ROW, ROW.replace("film", "film" * 1000)])
    with says(f"{path}, line 2", "longer"):
        metaicl.read_file(path)


def test_an_archive_of_one_endless_line_takes_no_memory(tmp_path, monkeypatch):
    """A gzip bomb: a thousandth of what it unpacks to."""
    monkeypatch.setattr(reading, "LONGEST_LINE", 1 << 16)
    path = tmp_path / "c4-train.json.gz"
    path.write_bytes(gzip.compress(b" " * (1 << 24)))
    with says(f"{path}, line 1", "longer"):
        list(c4.read_documents(path))


def test_an_empty_archive_is_damage(tmp_path):
    path = write_text(tmp_path, "c4-train.1.json.gz", ["one"])
    (tmp_path / "c4-train.2.json.gz").write_bytes(b"")
    with says(tmp_path / "c4-train.2.json.gz", "empty"):
        c4.text_files(tmp_path)
    (tmp_path / "c4-train.2.json.gz").unlink()
    (tmp_path / "c4-train.2.json.gz").symlink_to(tmp_path / "gone")
    with says(tmp_path / "c4-train.2.json.gz", "link"):
        c4.text_files(tmp_path)
    assert path.exists()


def test_options_that_stand_twice_are_said_once_per_task(tmp_path, caplog):
    world = make_world(tmp_path)
    for seed in (13, 21):
        path = world / "metaicl" / "data" / "t" / f"t_4_{seed}_test.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps(row | {"options": [*row["options"], row["options"][0]]}) + "\n" for row in rows)
        )
    folder = model_folder(tmp_path / "llm")
    save_tokenizer(folder)
    llm = type(
        "LLM", (), {"tokenizer": load_tokenizer(folder), "config": type("C", (), {"vocab_size": 64}), "path": ""}
    )
    tasks, _ = load_tasks(tiny_config(world, "finetune"), llm, "test")
    [said] = [message for message in caplog.messages if "more than once" in message]
    states(said, "t: ", "items list", "'w50'", "first")
    assert all(item.options == ("w50", "w51") for task in tasks for item in task.items)
    caplog.clear()
    assert options_of("q, line 1", {"options": ["a", "b", "a"]}, "") == ["a", "b"]
    states(caplog.messages[0], "q, line 1", "once")


# What is shown to people


def test_what_a_terminal_obeys_is_shown():
    evil = "\x1b[2J\x07good\u202e\u2028\n|<b>`x`\ud800\x9b31m"
    assert shown(evil) == "\\x1b[2J\\x07good\\u202e\\u2028\\n|<b>`x`\\ud800\\x9b31m"
    assert shown("Ünïcode, 漢字, 👩‍👧, a\nb", keep="\n") == "Ünïcode, 漢字, 👩‍👧, a\nb"
    table = markdown(["task"], [[in_markdown(evil)], ["plain | bar"]])
    assert [line.replace("\\|", "").count("|") for line in table.splitlines()] == [2, 2, 2, 2]
    assert "\\<b\\>" in table and "\x1b" not in table


def test_messages_and_warnings_are_shown(capsys):
    def main(workdir="") -> None:
        logging.getLogger().warning("a task \x1b[31mred")
        raise cli.UserError("The task 'a\x1b[0m\nb' is not there.")

    with pytest.raises(SystemExit) as left:
        cli.run(main, ["x"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "\x1b" not in said
    states(said.splitlines()[-1], "error: The task 'a\\x1b[0m\\nb'")


# Names that would lead elsewhere


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..", "", "a//b", "x\0y"])
def test_names_of_tasks_that_lead_out_are_refused(name, tmp_path):
    (tmp_path / "data").mkdir()
    for side in ("train", "test"):
        content = {"p": {"train": ["a"], "test": ["t"]} | {side: ["b", name]}}
        (tmp_path / "partitions.json").write_text(json.dumps(content))
        with says("'p'", repr(name), "out of the folder"):
            metaicl.load_partition(tmp_path, "p")


def test_a_name_longer_than_a_files_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "partitions.json").write_text(json.dumps({"p": {"train": ["a" * 5000], "test": []}}))
    with says("'p'", "5,000 bytes", 120):
        metaicl.load_partition(tmp_path, "p")


@pytest.mark.parametrize("name", ["../m.safetensors", "/tmp/m.safetensors", "sub/m.safetensors", ".."])
def test_an_index_that_names_another_place_is_refused(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with says(tmp_path / "model.safetensors.index.json", repr(name), "beside it"):
        weights.weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with says(tmp_path / "model.safetensors.index.json", "weight_map"):
        weights.weight_files(tmp_path)


def test_an_archive_of_an_exported_folder_is_named(tmp_path):
    (tmp_path / "mend.zip").write_bytes(b"PK")
    with says(tmp_path / "mend.zip", "unpack"):
        read_trained(tmp_path / "mend.zip")


# Models


SPY = """
import pathlib
pathlib.Path({mark!r}).write_text("it ran")
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("model_type", ["evil", "gpt2"])
def test_code_in_a_models_folder_is_not_run(model_type, tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "llm")
    (folder / "evil.py").write_text(SPY.format(mark=str(tmp_path / "mark")))
    fields = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": model_type, "auto_map": auto}))
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    with says("model_type 'evil'") if model_type == "evil" else contextlib.nullcontext():
        load_tokenizer(folder)  # of a model that is known, transformers' own tokenizer reads the files
    assert not (tmp_path / "mark").exists()


def test_classes_that_a_prepared_dataset_names_are_not_imported(tmp_path):
    names = ("evil.Feature", "tensorflow_datasets.scripts.cli.main.X", "os.path")
    for name in names:
        text = {"pythonClassName": name}
        (tmp_path / "features.json").write_text(json.dumps({"featuresDict": {"features": {"text": text}}}))
        with says(tmp_path / "features.json", name):
            c4.open_tfds(tmp_path)
    (tmp_path / "features.json").write_text(
        json.dumps({"type": "x", "content": json.dumps({"pythonClassName": "a.b"})})
    )
    with says(tmp_path / "features.json"):
        c4.open_tfds(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 1_000_000_000),
        ("n_layer", [2]),
        ("n_head", -2),
        ("n_embd", 32.0),
        ("n_embd", True),
        ("vocab_size", 2**40),
        ("vocab_size", "64"),
        ("n_positions", 0),
        ("layer_norm_epsilon", float("inf")),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", "1e-5"),
        ("tie_word_embeddings", "no"),
    ],
)
def test_numbers_that_no_model_has(field, value, tmp_path):
    fields = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields | {field: value}))
    with says(tmp_path, field):
        from_hf_config(tmp_path)


@pytest.mark.parametrize(
    "change", [{"llm_width": float("inf")}, {"llm_width": 32.0}, {"separator": 5}, {"bos": 3}, {"projection": ["tanh"]}]
)
def test_settings_of_an_exported_distiller(change, tmp_path):
    folder = model_folder(tmp_path / "mend")
    settings = {"projection": "tanh", "llm_width": 16, "separator": " ", "bos": "false"} | change
    (folder / "distiller_config.json").write_text(json.dumps(settings))
    (folder / "distiller.safetensors").write_bytes(b"")
    with says(folder / "distiller_config.json"):
        read_trained(folder)
    (folder / "distiller_config.json").write_text("[" * 5000)
    with says(folder / "distiller_config.json", "nested"):
        read_settings(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    folder = model_folder(tmp_path / "llm")
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for read in (load_model, fingerprint):
        with says(folder / name, "a pipe"):
            read(folder)


def test_a_pipe_as_data_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "c4-train.json.gz")
    with says(tmp_path / "c4-train.json.gz", "a pipe"):
        c4.text_files(tmp_path)
    with says(tmp_path / "c4-train.json.gz", "a pipe"):
        metaicl.read_file(tmp_path / "c4-train.json.gz")


def test_a_pattern_that_cannot_be_used_is_one_sentence(tmp_path):
    folder = model_folder(tmp_path / "llm")
    fields = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$(?<!"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(fields | {"pre_tokenizer": split}))
    with says(folder, "tokenizer"):
        load_tokenizer(folder)


# Manifests


def test_a_manifest_is_not_believed(tmp_path):
    world = make_world(tmp_path)
    save_tokenizer(tmp_path / "tokenizer")
    config, tokenizer = tiny_config(world, "pretrain"), load_tokenizer(tmp_path / "tokenizer")
    made = prepared.prepare_text(config, tokenizer)
    [path] = (world / "cache").glob("text-*.json")
    whole = path.read_text()
    for old, new in (('"uint16"', '"uint8"'), ('"items": 40', '"items": 39'), ("[", "[["), (whole, "{}")):
        path.write_text(whole.replace(old, new, 1))
        assert prepared.prepare_text(config, tokenizer) == made
        assert path.read_text() == whole
    older = {name: value for name, value in json.loads(whole).items() if name != "checksum"}
    older["shards"][0]["items"] = 39
    path.write_text(json.dumps(older))  # as an older version wrote it, or someone who took the checksum out
    assert prepared.prepare_text(config, tokenizer) == made


def test_a_dataset_that_was_edited_in_its_middle_is_another(tmp_path):
    """Files of tfds are told by their beginnings and ends, and in full where those do not differ."""
    file, cache = tmp_path / "c4-train.array_record", tmp_path / "cache"
    file.write_bytes(bytes(300_000))
    first = prepared._tfds_key([file], cache)
    os.utime(file, (1, 1))  # copied
    assert prepared._tfds_key([file], cache) == first == prepared._tfds_key([file], tmp_path / "elsewhere")
    file.write_bytes(bytes(150_000) + b"1" + bytes(149_999))
    other = prepared._tfds_key([file], cache)
    assert other != first and prepared._tfds_key([file], cache) == other
    file.write_bytes(bytes(300_000))
    assert prepared._tfds_key([file], cache) == first


# Predictions


def test_changed_predictions_are_scored_again(tmp_path, caplog):
    """`prediction` set to `gold` once took zero-shot from 41.67 to 100."""
    store = results.Store(tmp_path, "zero_shot", {})
    lines = [
        {"item": i, "scores": [-1.0, -2.0], "options": ["a", "b\u2028"], "prediction": "a", "gold": "b\u2028"}
        for i in range(3)
    ]
    cost = {"content": "c", "prefix_length": 0.0, "compiled": True}
    store.write("t", 13, lines, cost)
    assert store.read("t", 13, "c", 3) == (lines, cost) and not caplog.messages
    [path], [beside] = tmp_path.glob("predictions/*/t_13.jsonl"), tmp_path.glob("predictions/*/t_13.cost.json")
    whole, sealed = path.read_text(), beside.read_text()
    path.write_text(whole.replace('"prediction": "a"', '"prediction": "b\u2028"'))
    assert store.read("t", 13, "c", 3) is None
    states(caplog.messages[0], path, "changed", "scored again")
    old = {name: value for name, value in json.loads(sealed).items() if name not in ("checksum", "predictions")}
    beside.write_text(json.dumps(old))  # as an older version wrote it: held against its scores
    assert store.read("t", 13, "c", 3) is None
    path.write_text(whole)
    assert store.read("t", 13, "c", 3) == (lines, cost)
    for content in ("[]", "null", "{", '{"content": "c", "item_seconds": "5"}', "\xff"):
        beside.write_text(content, encoding="latin-1")
        assert store.read("t", 13, "c", 3) is None


SCORES = {
    "methods": {"mend": {"path": "", "per_task": {"t": {"primary": "accuracy", "score": {"per_seed": {"13": 1}}}}}}
}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("scores.json", "[]"),
        ("scores.json", "[" * 5000),
        ("scores.json", '{"methods": [], "seeds": []}'),
        ("scores.json", '{"methods": {"mend": 3}, "seeds": [13]}'),
        ("scores.json", json.dumps(SCORES | {"seeds": 13})),
        ("scores.json", json.dumps(SCORES | {"seeds": [13, 21]})),
        ("predictions/mend-*/made_of.json", "null"),
        ("predictions/mend-*/colour_13.jsonl", "null\n"),
        ("predictions/mend-*/colour_13.jsonl", "{}\n"),
        ("predictions/mend-*/colour_13.cost.json", "[]"),
    ],
)
def test_an_evaluation_of_another_shape_is_one_sentence(file, content, tmp_path):
    write_evaluation(tmp_path, {"mend": 0.5}, items=4)
    next(tmp_path.glob(file)).write_text(content)
    with says(re.compile(re.escape(str(tmp_path))), "run the evaluation again"):
        read_answers(Source(tmp_path, "mend"))


def test_answers_that_were_changed_are_not_compared(tmp_path, caplog):
    """Right ones in the place of wrong ones, in the predictions and in the scores."""
    write_evaluation(tmp_path, {"mend": 0.5}, items=12)
    [path], scores = tmp_path.glob("predictions/*/colour_13.jsonl"), tmp_path / "scores.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"prediction": line["gold"]}) + "\n" for line in lines))
    with says(tmp_path, "run the evaluation again"):
        read_answers(Source(tmp_path, "mend"))
    states(caplog.messages[0], path, "changed")
    scores.write_text(scores.read_text().replace('"mean": 0.', '"mean": 1.', 1))
    with says(scores, "changed", "run the evaluation again"):
        read_scores(tmp_path)


def test_a_line_separator_in_an_answer_parts_no_line(tmp_path):
    store, line = (
        results.Store(tmp_path, "mend", {"method": "mend"}),
        {"scores": [-1.0, -2.0], "options": ["a\u2028", "b"]},
    )
    store.write("t", 13, [line | {"item": 0, "prediction": "a\u2028", "gold": "a\u2028"}], {"content": "c"})
    (tmp_path / "scores.json").write_text(json.dumps(SCORES | {"seeds": [13]}))
    [[row]] = [of_seed.values() for of_seed in read_answers(Source(tmp_path, "mend")).lines.values()]
    assert row[0]["gold"] == "a\u2028"


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [{"labels": {"a": []}, "training_seed": 0, "evaluation": "e", "method": "mend"}]},
        {"rows": [{"labels": {}, "training_seed": 0, "evaluation": "../e", "method": "mend"}]},
        {"rows": [{"labels": {}, "training_seed": 0, "evaluation": "/e", "method": "mend"}]},
        {"rows": {}, "varied": [3]},
        {"x": "K"},
        {"x": "method"},
        {"config": "x"},
        {"experiment": []},
    ],
)
def test_an_experiment_of_another_shape_or_place_is_one_sentence(change, tmp_path):
    path = write_experiment(tmp_path, "order", [({"method": "mend"}, 0, "e", "mend")]) / "experiment.json"
    content = json.loads(path.read_text())
    for text in (json.dumps(content | change), "[" * 5000, "[]"):
        path.write_text(text)
        with says(path, "remove it"):
            read_results(tmp_path)


def test_neighbours_that_were_changed_are_sought_again(tmp_path, caplog):
    caplog.set_level("WARNING")
    pool = [metaicl.Example("t", f"w{i} w{i % 3}", "a", ()) for i in range(6)]
    ask = lambda: cached_neighbours(tmp_path, "", pool, pool[:2], 2, "bm25", 13, None).tolist()  # noqa: E731
    found = ask()
    assert ask() == found and not caplog.messages
    [path] = tmp_path.glob("neighbours/*")
    whole = path.read_text()
    for content in (
        whole.replace("[[", "[[1", 1),
        "[]",
        '{"numbers": [[1]]}',
        '{"numbers": [["a", 1], [1, 2]]}',
        whole[:9],
    ):
        caplog.clear()
        path.write_text(content)
        assert ask() == found and path.read_text() == whole
        states(caplog.messages[0], path, "made again")


# Data that change while they are read


def test_a_source_that_changes_while_it_is_tokenised(tmp_path, monkeypatch):
    """Its tokens would be kept under the name of other data, and be found again with those."""
    world = make_world(tmp_path)
    save_tokenizer(tmp_path / "tokenizer")
    config, tokenizer = tiny_config(world, "pretrain"), load_tokenizer(tmp_path / "tokenizer")
    path, read = world / "c4" / "c4-train.00001-of-00002.json.gz", c4.read_documents
    monkeypatch.setattr(
        c4, "read_documents", lambda file, *more: [write_text(world / "c4", path.name, ["w1"]), *read(file)][1:]
    )
    with says(path, "changed", "again"):
        prepared.prepare_text(config, tokenizer)
    monkeypatch.undo()
    assert not list((world / "cache").rglob("*00001-of*")) and not list((world / "cache").rglob("*.tmp"))
    assert [shard["items"] for shard in prepared.prepare_text(config, tokenizer)["shards"]] == [40, 1, 10]


@pytest.mark.parametrize("change", ["another", "cut", "gone"])
def test_tokens_that_change_while_they_are_read(change, tmp_path):
    """Of a store that knows its texts' lengths and has not opened their file yet; one that is open reads what it opened."""
    world = make_world(tmp_path)
    save_tokenizer(tmp_path / "tokenizer")
    config, tokenizer = tiny_config(world, "pretrain"), load_tokenizer(tmp_path / "tokenizer")
    manifest = prepared.prepare_text(config, tokenizer)
    store, first, second = (
        TextStore(manifest, manifest["shards"][:2]),
        *(shard["path"] for shard in manifest["shards"][:2]),
    )
    known = store[0].tolist()
    if change == "cut":
        os.truncate(second, 3)
    elif change == "gone":
        os.unlink(second)
    else:
        shutil.copy(manifest["shards"][2]["path"], second)
        with says(second, "20"):
            TextStore(manifest, manifest["shards"][:2])
    os.unlink(first)
    assert store[0].tolist() == known
    with says(second, "delete it"):
        store[41]


# Clocks that jump


def test_a_wrong_clock_of_this_machine_removes_nobodys_files(tmp_path, monkeypatch):
    """A year ahead of the one that stamps the disk's files."""
    other = tmp_path / ".a.json.another-machine.7.0123abcd.tmp"
    other.write_text("of a process that lives")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 366 * 86400)
    assert temporary_for(tmp_path / "a.json") and other.exists()
    os.utime(other, (now - 2 * 86400, now - 2 * 86400))
    assert temporary_for(tmp_path / "a.json") and not other.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_was_set_back_changes_no_report(tmp_path, monkeypatch):
    """A run that goes on in an earlier year: its lines are the same, and TensorBoard reads its events behind the first ones."""
    for start, year in ((0, 60), (4, 1), (4, 30)):
        monkeypatch.setattr(time, "time", lambda year=year: year * 366 * 86400.0)
        kept = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["step"] <= start]
        report = Reporter(tmp_path, start, 8, kept)
        for step in range(start + 1, start + 5):
            report.write({"step": step, "loss": 1.0})
            report.progress({"step": step, "loss": 1.0, "padding": 0.0})
        report.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["seconds_per_step"] >= 0 for line in read_lines(tmp_path / "speed.jsonl"))
    names = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert [name.partition(".out")[0] for name in names] == ["events.step-000000000", "events.step-000000004"]


# The machine


def test_two_commands_in_one_workdir(tmp_path):
    with (
        alone_in(tmp_path, ".lock", "training"),
        says(tmp_path, "Another run is evaluating"),
        alone_in(tmp_path, ".lock", "evaluating"),
    ):
        pass
    with alone_in(tmp_path, ".lock", "training"):
        pass


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (OSError(24, "Too many open files", "a"), ["too many files", "ulimit"]),
        (RuntimeError("Could not determine home directory."), ["HOME"]),
        (PermissionError(13, "Permission denied", "/data/a b.json"), ["/data/a b.json", "Permission denied"]),
        (type("PanicException", (BaseException,), {})("called `unwrap()` on a value"), ["tokenizer.json", "pattern"]),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(error, facts, capsys):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        cli.run(main, ["x"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in said
    states(said.strip(), *facts)


def test_alarms_for_the_developers_of_xla_are_not_printed():
    """ "Very slow compile? If you want to file a bug ..." is one of its errors (2). As `python -m` begins; a user's own level stays."""
    script = "import os, sys; sys.argv = ['-m']; import mend_jax; print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    for given, level in (({}, "3"), ({"TF_CPP_MIN_LOG_LEVEL": "0"}, "0")):
        env = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"} | given
        ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
        assert ended.stdout.strip() == level, ended.stderr


def _heeds_interrupts():
    """What a shell starts in the background ignores SIGINT, and so do all that it starts, these tests too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_while_it_imports_ends_without_a_trace(tmp_path):
    """As `python -m` begins: our package is imported first, then a module of ours, which is interrupted."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    script = f"import sys; sys.argv = ['-m']; import mend_jax; {code}; import time; time.sleep(60)"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, preexec_fn=_heeds_interrupts
    )
    assert (ended.returncode, ended.stderr.strip()) == (130, "Stopped before it began.")
    assert signal.getsignal(signal.SIGINT) is not None
