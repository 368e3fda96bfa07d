"""Packs: what a file of vectors holds, that it is made once, that only its LLM reads it, and what the commands print and write."""

import dataclasses
import json
import os
import pickle
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_files
from facts import says, states
from safetensors.numpy import load_file, save_file
from test_export import make_workdir

import mend_jax
from mend_jax import distill, fidelity, generate, inspect, predict
from mend_jax.cli import command_line
from mend_jax.cli.text import shown
from mend_jax.data.templates import TEMPLATES
from mend_jax.interchange.export import export
from mend_jax.packs import make, measure
from mend_jax.packs.pack import load_pack
from mend_jax.prefixes import Chunked

DEMOS = [("w1 w2", "w50"), ("w3", "w51"), ("w5 w6 w7", "w50"), ("w9", "w51")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of an LLM and of a backbone, both with the byte tokenizer."""
    root, model = tmp_path_factory.mktemp("models"), tokenizer_files.GPT2 | {"n_positions": 256}
    return [
        tokenizer_files.save_model_folder(root / name, "byte", model | {"n_embd": width}, seed=width)
        for name, width in {"llm": 32, "backbone": 16}.items()
    ]


@pytest.fixture(scope="module")
def llm(folders):
    return mend_jax.load_llm(folders[0])


@pytest.fixture(scope="module")
def workdir(folders, llm, tmp_path_factory):
    """Of a distiller of 4 vectors, or fewer, with the template "qa"."""
    fields = {"data.template": "qa", "prefix.length": 4, "prefix.nested": (1, 2)}
    return make_workdir(tmp_path_factory.mktemp("run"), llm, *folders, **fields)


@pytest.fixture(scope="module")
def distiller(workdir, llm):
    return mend_jax.load_distiller(workdir, llm)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_demos(path, demos=DEMOS):
    return write_lines(path, [{"task": "t", "input": x, "output": y, "options": ["w50", "w51"]} for x, y in demos])


@pytest.fixture
def made(tmp_path, workdir, monkeypatch):
    """distill(*flags): runs the command on DEMOS, with a cache of the test's own; returns the pack's path."""
    write_demos(tmp_path / "demos.jsonl")

    def run(*flags):
        out = tmp_path / "a.pack.safetensors"
        given = [
            f"--distiller={workdir}",
            f"--demos={tmp_path / 'demos.jsonl'}",
            f"--out={out}",
            f"--cache={tmp_path / 'cache'}",
        ]
        assert command(distill.distill, *given, *flags) == 0
        return out

    return run


def command(main, *flags):
    """The exit code of a command with flags."""
    with pytest.raises(SystemExit) as ended:
        command_line.run(main, ["command", *flags])
    return ended.value.code


# What a pack holds


def test_a_pack_is_the_distillers_vectors_with_what_they_are_for(made, distiller, llm, workdir, folders):
    path = made("--keep_demos")
    pack = load_pack(path, llm)
    np.testing.assert_allclose(pack.vectors, distiller.distill(DEMOS).embeds[0], rtol=1e-5, atol=1e-6)
    assert load_file(path).keys() == {"vectors"} and pack.vectors.shape == (4, 32)
    assert (pack.num_vectors, pack.num_demonstrations, pack.dropped) == (4, 4, ())
    assert pack.template == TEMPLATES["qa"] and pack.demonstrations == tuple(DEMOS)
    assert (pack.llm, pack.distiller, pack.kind, pack.bos) == (str(folders[0]), str(workdir), "distiller", "false")
    assert load_pack(made()).demonstrations is None


def test_a_pack_is_read_as_a_prefix(made, distiller, llm):
    pack, vectors = load_pack(made(), llm), distiller.distill(DEMOS)
    options = ["w50", "w51"]
    wanted = mend_jax.score_options(llm, vectors, "w4", options, distiller.template)
    assert mend_jax.score_options(llm, pack, "w4", options) == pytest.approx(wanted, abs=1e-5)
    assert mend_jax.score_options(llm, pack, "w4", options, "space") != pytest.approx(wanted, abs=1e-5)
    said = mend_jax.generate_text(llm, vectors, "w4", 6, template=distiller.template)
    assert mend_jax.generate_text(llm, pack, "w4", 6) == said


def test_a_round_trip_changes_nothing(tmp_path, made):
    pack = load_pack(made("--keep_demos"))
    pack = dataclasses.replace(pack, llm="größer\n名", dropped=(4, 5), demonstrations=(("ä\n", "→"),))
    pack.save(tmp_path / "b.safetensors")
    again = load_pack(tmp_path / "b.safetensors")
    assert_equal(again, pack)


def assert_equal(one, other):
    """Of two packs: the same vectors, bit for bit, and the same facts."""
    np.testing.assert_array_equal(one.vectors, other.vectors)
    assert one.metadata() == other.metadata()


def test_sets_are_distilled_together_as_each_alone(llm, distiller, workdir, monkeypatch):
    """More sets than one call takes, of different lengths."""
    monkeypatch.setattr(make, "TOGETHER", 2)
    sets, counted = [DEMOS[:1], DEMOS[1:4], DEMOS[2:], DEMOS], []
    packs = make.make_packs(llm, distiller, sets, workdir, progress=counted.append)
    assert counted == [2, 2]
    for pack, demos in zip(packs, sets, strict=True):
        np.testing.assert_allclose(pack.vectors, distiller.distill(demos).embeds[0], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_dropped_and_said(llm, distiller, workdir):
    """The window holds whole demonstrations, the first ones."""
    many = DEMOS * 40
    [pack] = make.make_packs(llm, distiller, [many], workdir, keep=True)
    count = pack.num_demonstrations
    assert pack.dropped == tuple(range(count, len(many))) and 0 < count < len(many)
    assert pack.demonstrations == tuple(many[:count])
    np.testing.assert_allclose(pack.vectors, distiller.distill(many[:count]).embeds[0], rtol=1e-5, atol=1e-6)
    with says(f"reads at most {distiller.window}"):
        distiller.distill(many[: count + 1])
    with says("w1 w1", "leave it out"):
        make.make_packs(llm, distiller, [[("w1 " * 500, "w2")]], workdir)


@pytest.mark.slow
def test_chunks_make_longer_packs(llm, folders, tmp_path):
    fields = {"prefix.kind": "chunked", "prefix.chunk_demos": 3, "prefix.length": 4}
    workdir = make_workdir(tmp_path / "run", llm, *folders, **fields)
    chunked = mend_jax.load_prefix(workdir, llm)
    [pack] = make.make_packs(llm, chunked, [DEMOS * 3], workdir)
    np.testing.assert_allclose(pack.vectors, chunked.distill(DEMOS * 3).embeds[0], rtol=1e-5, atol=1e-6)
    assert pack.num_vectors == 16 and pack.kind == "chunked"


def test_a_pack_names_the_llm_as_it_was_given_not_where_the_hubs_copy_lies(folders, workdir, tmp_path, monkeypatch):
    """And the hub is asked once: the fingerprint is that of the files that were read, not of newer ones."""
    copies = iter([str(folders[0])])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: next(copies))
    llm = mend_jax.load_llm("someone/llm")
    [pack] = make.make_packs(llm, mend_jax.load_distiller(workdir, llm), [DEMOS], workdir)
    assert pack.llm == llm.path == "someone/llm"
    pack.save(tmp_path / "a.pack.safetensors")
    assert str(folders[0]) not in str(load_pack(tmp_path / "a.pack.safetensors", llm).metadata())
    assert pack.llm_fingerprint == mend_jax.load_llm(folders[0]).fingerprint


def test_of_chunks_only_what_is_too_long_is_missing(llm, distiller, workdir, tmp_path, folders):
    """And fidelity measures against those that were read."""
    model = Chunked.around(distiller, chunk_demos=1, chunk_tokens=40)
    demos = [*DEMOS[:2], ("w9 " * 40, "w50"), *DEMOS[2:]]
    facts = make.facts_of(llm, model, workdir)
    pack, failed = make.packs_of(llm, model, [demos, demos[2:3]], facts, keep=True)
    assert (pack.num_demonstrations, pack.dropped, pack.demonstrations) == (4, (2,), tuple(DEMOS))
    np.testing.assert_allclose(pack.vectors, model.distill(DEMOS).embeds[0], rtol=1e-5, atol=1e-6)
    assert "number 3" in distill.in_words(pack)
    states(str(failed), "w9 w9", 40, "leave it out")
    with says("Set 2 of 2", "w9 w9"):
        make.make_packs(llm, model, [demos, demos[2:3]], workdir)
    path = tmp_path / "p.safetensors"
    pack.save(path)
    file = write_demos(tmp_path / "d.jsonl", demos)
    assert fidelity._demonstrations(load_pack(path), str(path), str(file)) == DEMOS


def test_a_file_that_cannot_be_read_does_not_stop_the_others(tmp_path, workdir, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, demos in {"a": DEMOS[:2], "b": [("w1", "w2 " * 300)], "c": DEMOS, "d": [("w1", "w2 " * 300)]}.items():
        write_demos(folder / f"{name}.jsonl", demos)
    given = [f"--distiller={workdir}", "--cache=", f"--demos={folder}", f"--out={out}"]
    assert command(distill.distill, *given) == 2
    said = capsys.readouterr()
    assert {path.name[0] for path in out.iterdir()} == {"a", "c"} and said.out.count("older file") == 0
    error = said.err.splitlines()[-1]
    states(error, folder / "b.jsonl", folder / "d.jsonl", 252, "leave it out", "1 more")
    assert command(distill.distill, *given) == 2
    assert capsys.readouterr().out.count("in the place of an older file") == 2


# Made once


def test_what_was_made_is_not_made_again(made, monkeypatch, capsys, tmp_path):
    """Another name and place of the same demonstrations; nothing is loaded."""
    first = load_pack(made())
    (tmp_path / "demos.jsonl").rename(tmp_path / "other.jsonl")
    write_demos(tmp_path / "demos.jsonl")
    monkeypatch.setattr(distill, "load_both", None)
    assert_equal(load_pack(made()), first)
    relative = os.path.relpath(first.llm)  # the same files by another name
    assert load_pack(made(f"--llm={relative}")).llm == relative
    assert "4 vectors of 4 demonstrations" in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["demos", "distiller", "dtype", "damaged"])
def test_what_changed_is_made_again(changed, made, tmp_path, workdir):
    path, [kept] = made(), (tmp_path / "cache").glob("*")
    before, flags = load_pack(path), []
    if changed == "demos":
        write_demos(tmp_path / "demos.jsonl", DEMOS[:3])
    elif changed == "distiller":
        export(workdir, tmp_path / "out")
        flags = [f"--distiller={tmp_path / 'out'}", f"--llm={before.llm}"]
    elif changed == "dtype":
        flags = ["--dtype=bfloat16"]
    else:
        kept.write_bytes(path.read_bytes()[:100])
    again = load_pack(made(*flags))
    assert len(list((tmp_path / "cache").glob("*"))) == (1 if changed == "damaged" else 2)
    same = np.array_equal(again.vectors, before.vectors)
    assert same == (changed in ("damaged", "distiller"))


# Only its LLM reads it


def test_another_llm_is_refused(made, folders, tmp_path, monkeypatch):
    """Of a command before it is loaded."""
    pack, other = (
        made(),
        tokenizer_files.save_model_folder(tmp_path / "other", "byte", tokenizer_files.GPT2 | {"n_embd": 32}, seed=5),
    )
    with says(pack, folders[0], other):
        load_pack(pack, mend_jax.load_llm(other))
    monkeypatch.setattr("mend_jax.packs.pack.load_llm", None)
    assert command(predict.predict, f"--pack={pack}", "--input=w1", "--options=w2,w3", f"--llm={other}") == 2


def test_another_bos_or_tokenizer_is_refused(made, llm):
    path = made()
    with says(path, "bos", "false"):
        load_pack(path, dataclasses.replace(llm, bos=3))
    with says(path, "tokenizer", llm.path):
        load_pack(path, dataclasses.replace(llm, tokenizer=None))


def test_the_same_llm_in_8_bits_reads_it(made, folders):
    assert load_pack(made(), mend_jax.load_llm(folders[0], "bfloat16", weights="int8")).num_vectors == 4


# Files that are no packs


def test_damaged_files_are_one_sentence(made, tmp_path):
    whole = made().read_bytes()
    bad = tmp_path / "bad.safetensors"
    for content in (b"", whole[:7], whole[: len(whole) - 9], b"\xff" * 8 + whole[8:], b"PK\x03\x04 no pack at all"):
        bad.write_bytes(content)
        with says(bad, "copy or make it again"):
            load_pack(bad)
    with says(tmp_path / "none", "mend_jax.distill"):
        load_pack(tmp_path / "none")
    with says(tmp_path, "mend_jax.distill"):
        load_pack(tmp_path)


def test_what_never_was_a_pack_is_not_called_damaged(made, tmp_path, capsys):
    whole = made().read_bytes()
    for name, content in {
        "demos.jsonl": (tmp_path / "demos.jsonl").read_bytes(),
        "a.zip": b"PK\x03\x04" * 9,
        "e": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        capsys.readouterr()
        assert command(predict.predict, f"--pack={tmp_path / name}", "--input=w1", "--options=w2,w3") == 2
        states(capsys.readouterr().err.strip(), tmp_path / name, "is no pack", "mend_jax.distill")
    (tmp_path / "cut").write_bytes(whole[:-9])
    with says(tmp_path / "cut", "cannot be read as a pack"):
        load_pack(tmp_path / "cut")


@pytest.mark.parametrize(
    "facts, vectors, said",
    [
        ({"pack_format": "2"}, None, ("format 2", "up to 1")),
        ({"pack_format": "x"}, None, ("format x",)),
        ({"template": '["a", "b"]'}, None, ("copy or make it again",)),
        ({"template": "[1, 2, 3]"}, None, ("1",)),
        ({"template": "{"}, None, ("copy or make it again",)),
        ({"num_vectors": "5"}, None, ("5", "4")),
        ({"num_demonstrations": "many"}, None, ("many",)),
        ({}, np.zeros((4, 32), np.float16), ("float16",)),
        ({}, np.zeros((0, 32), np.float32), ("0",)),
        ({}, np.full((4, 32), np.nan, np.float32), ("finite",)),
        ({}, np.full((4, 32), 1e19, np.float32), ("squares", "finite")),
    ],
)
def test_packs_with_wrong_content(made, tmp_path, facts, vectors, said):
    pack, bad = load_pack(made()), tmp_path / "bad.safetensors"
    save_file({"vectors": pack.vectors if vectors is None else vectors}, bad, pack.metadata() | facts)
    with says(bad, *said):
        load_pack(bad)


def test_hostile_files_are_one_sentence(made, tmp_path, capsys):
    """Archives and pickles, a header of endless depth or of offsets beyond the file, half a character, folders and devices."""
    whole, bad = made().read_bytes(), tmp_path / "bad.safetensors"
    pack = load_pack(tmp_path / "a.pack.safetensors")
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    beyond = b'{"vectors": {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 99999999]}}'
    headers = [
        len(header).to_bytes(8, "little") + header for header in (deep, beyond, b"{}", b"[]", b'{"__metadata__": 3}')
    ]
    for content in (*headers, pickle.dumps(pack.vectors), b"PK\x03\x04" + bytes(200), whole[:8] + b"\xff" + whole[9:]):
        bad.write_bytes(content)
        with says(bad, re.compile("make it again|no pack")):
            load_pack(bad)
    for facts in ({"template": r'["\ud800", "", " "]'}, {"dropped": "[" * 100_000}, {"num_vectors": "9" * 5000}):
        save_file({"vectors": pack.vectors}, bad, pack.metadata() | facts)
        with says(bad, "make it again"):
            load_pack(bad)
    for path in (tmp_path, Path("/dev/null"), tmp_path / "a.pack.safetensors" / "b"):
        with says(path, "mend_jax.distill"):
            load_pack(path)
    save_file({"vectors": pack.vectors}, bad, pack.metadata() | {"llm": "\x1b[2Jgone", "kind": "\x07"})
    capsys.readouterr()
    assert command(inspect.inspect, f"--pack={bad}") == 0
    assert command(predict.predict, f"--pack={bad}", "--input=w1", "--options=w2,w3") == 2
    said = capsys.readouterr()
    assert not {"\x1b", "\x07"} & {*said.out, *said.err} and r"\x1b[2Jgone" in said.out and said.err.count("\n") == 1


def test_a_file_that_is_too_large_is_not_read(made, monkeypatch):
    path = made()
    monkeypatch.setattr("mend_jax.packs.pack.LARGEST", 100)
    with says(path, f"{path.stat().st_size:,} bytes"):
        load_pack(path)


def test_a_file_of_weights_is_no_pack(tmp_path):
    save_file({"vectors": np.zeros((1, 2), np.float32)}, tmp_path / "a.safetensors")
    with says(tmp_path / "a.safetensors", "no pack"):
        load_pack(tmp_path / "a.safetensors")


# Files of demonstrations


def test_a_folder_and_several_files_become_a_folder(tmp_path, workdir, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    write_demos(folder / "b.jsonl"), write_demos(folder / "a.jsonl", DEMOS[:2]), (folder / "notes.txt").write_text("no")
    write_lines(tmp_path / "c.json", [{"input": "w1", "output": "w2"}])
    (folder / "d.json").write_text(json.dumps([{"input": "w1", "output": "w2"}] * 3))
    given = [f"--distiller={workdir}", "--cache="]
    assert command(distill.distill, *given, f"--demos={folder},{tmp_path / 'c.json'}", f"--out={tmp_path / 'out'}") == 0
    found = {path.name: load_pack(path).num_demonstrations for path in (tmp_path / "out").iterdir()}
    assert found == {f"{name}.pack.safetensors": count for name, count in {"a": 2, "b": 4, "c": 1, "d": 3}.items()}
    assert "in 0:" in capsys.readouterr().err  # progress
    assert command(distill.distill, *given, f"--demos={folder}", f"--out={tmp_path / 'x.safetensors'}") == 2
    assert command(distill.distill, *given, f"--demos={folder / 'a.jsonl'}", f"--out={tmp_path / 'x.txt'}") == 2


def test_a_folder_of_one_file_becomes_a_folder_too(tmp_path, workdir, capsys):
    """A script that counts on it works on the day on which there is a single file."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    one = write_demos(folder / "a.jsonl")
    given = [f"--distiller={workdir}", "--cache="]
    assert command(distill.distill, *given, f"--demos={folder}", f"--out={out}") == 0
    assert [path.name for path in out.iterdir()] == ["a.pack.safetensors"]
    capsys.readouterr()
    assert command(distill.distill, *given, f"--demos={folder}", f"--out={tmp_path / 'x.safetensors'}") == 2
    states(capsys.readouterr().err.strip(), "--out", "x.safetensors", "name a folder")
    assert not (tmp_path / "x.safetensors").exists()
    assert command(distill.distill, *given, f"--demos={one}", f"--out={tmp_path / 'y.safetensors'}") == 0
    assert (tmp_path / "y.safetensors").is_file()


def test_what_makes_no_packs_is_refused(llm, folders, tmp_path, distiller, workdir):
    soft = make_workdir(tmp_path / "run", llm, *folders, **{"prefix.kind": "soft_prompt"})
    with says(soft, "reads no demonstrations"):
        make.make_packs(llm, mend_jax.load_prefix(soft, llm), [DEMOS], soft)
    with says(workdir, "no tokenizer"):
        make.make_packs(llm, dataclasses.replace(distiller, tokenizer=None), [DEMOS], workdir)
    for sets in (DEMOS, [[("w1", 1)]], ["w1"]):
        with says("A demonstration is", "[demos]", "(input, output)"):
            make.make_packs(llm, distiller, sets, workdir)


def test_an_exported_distiller_needs_the_llms_name(workdir, tmp_path, capsys):
    export(workdir, tmp_path / "out")
    write_demos(tmp_path / "demos.jsonl")
    given = [f"--distiller={tmp_path / 'out'}", f"--demos={tmp_path / 'demos.jsonl'}", f"--out={tmp_path}", "--cache="]
    assert command(distill.distill, *given) == 2
    assert "--llm" in capsys.readouterr().err
    given[0] = f"--distiller={tmp_path / 'nothing'}"
    assert command(distill.distill, *given, f"--llm={tmp_path / 'out'}") == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err


# The commands


def test_inspect_prints_the_facts(made, capsys):
    path = made("--keep_demos")
    capsys.readouterr()
    assert command(inspect.inspect, f"--pack={path}", "--demos") == 0
    said = capsys.readouterr().out
    for fact in ("num_vectors", "4", "distiller_fingerprint", "'w3' -> 'w51'", load_pack(path).llm_fingerprint):
        assert fact in said


def test_python_mistakes_with_packs_are_one_sentence(made, llm, distiller, workdir):
    """Sets that are one set, pairs that are none, arguments in the wrong order."""
    path = made()
    one_row = {"input": "w1", "output": "w2"}
    for sets in (["w1 w2", "w3"], [["w1", "w2"]], DEMOS, [[one_row]], [[("w1", "w2"), "w3"]], [one_row], [None]):
        with says("[demos]", "(input, output)"):
            mend_jax.make_packs(llm, distiller, sets, workdir)
    with says("load_pack(FILE, llm)", type(llm).__name__):
        load_pack(llm, path)


def test_what_is_printed_counts_from_1(made, capsys):
    """`dropped` is from 0 in the file and in Python."""
    path = made()
    capsys.readouterr()
    for dropped, shown_as in {(): "none", (0,): "number 1", (1, 4): "number 2, 5"}.items():
        pack = dataclasses.replace(load_pack(path), dropped=dropped)
        pack.save(path)
        assert load_pack(path).dropped == dropped and pack.metadata()["dropped"] == str(list(dropped))
        assert command(inspect.inspect, f"--pack={path}") == 0
        printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert printed["dropped"] == shown_as
        assert shown_as in distill.in_words(pack) or not dropped


def test_predict_prints_or_writes_the_scores_of_options(made, llm, tmp_path, capsys):
    path = made()
    pack = load_pack(path, llm)
    wanted = mend_jax.score_options(llm, pack, "w4", ["w50", "w51"])
    capsys.readouterr()
    assert command(predict.predict, f"--pack={path}", "--input=w4", "--options=w50, w51") == 0
    best = max(wanted)
    assert capsys.readouterr().out.split()[:2] == [["w50", "w51"][wanted.index(best)], f"{best:.3f}"]
    queries = write_lines(
        tmp_path / "q.jsonl",
        [{"input": "w4", "id": 7, "where": "here"}, {"input": "w8 w9", "options": ["w1", "w2", "w3"]}],
    )
    flags = [f"--pack={path}", f"--inputs={queries}", f"--out={tmp_path / 'new' / 'a.jsonl'}", "--options=w50,w51"]
    assert command(predict.predict, *flags) == 0
    first, second = map(json.loads, (tmp_path / "new" / "a.jsonl").read_text().splitlines())
    assert first["id"] == 7 and list(first["scores"].values()) == pytest.approx(wanted, abs=1e-5)
    assert first["prediction"] == max(first["scores"], key=first["scores"].get) and first["where"] == "here"
    assert second["scores"].keys() == {"w1", "w2", "w3"}


@pytest.mark.slow
def test_fidelity_is_that_of_the_definitions(made, llm, distiller, tmp_path, capsys):
    """KL by `training_losses`, one query at a time; choices by `score_options`."""
    path, options = made("--keep_demos"), ["w50", "w51"]
    rows = [
        {"input": "w4", "output": "w50"},
        {"input": "w8 w9 w10", "output": "w51"},
        {"input": "w11 w12", "output": "w50"},  # in one pass with a shorter one
    ]
    queries = write_lines(tmp_path / "q.jsonl", rows)
    capsys.readouterr()
    flags = ["--options=w50,w51", "--batch_size=2"]
    assert command(fidelity.report, f"--pack={path}", f"--queries={queries}", *flags) == 0
    printed = capsys.readouterr().out
    found = fidelity.report(str(path), str(queries), options="w50,w51", batch_size=2)
    pack, around = load_pack(path), distiller.template
    shots = mend_jax.demonstrations_prefix(llm, DEMOS, around)
    kl, same, right = [], [], []
    for row in rows:
        kl.append(mend_jax.training_losses(llm, distiller, DEMOS, row["input"], row["output"])["kd"])
        by = [np.argmax(mend_jax.score_options(llm, p, row["input"], options, around)) for p in (pack, shots)]
        same.append(by[0] == by[1])
        right.append(options[by[0]] == row["output"])
    assert found.kl["pack"] == pytest.approx(np.mean(kl), abs=1e-5)  # of 0.006, in float32
    assert found.agreement["pack"] == pytest.approx(np.mean(same)) and found.accuracy["pack"] == pytest.approx(
        np.mean(right)
    )
    assert found.agreement["demonstrations"] == 1 and found.kl["demonstrations"] == 0 < found.kl["nothing"]
    assert found.recovered() == pytest.approx(1 - found.kl["pack"] / found.kl["nothing"])
    assert found.positions["pack"] == 4 and found.positions["nothing"] == 0
    assert f"{found.kl['pack']:.4f}" in printed and f"{100 * found.recovered():.1f}%" in printed
    for kl, warned in ((0.2, False), (2.0, True)):  # of 1.0 after nothing
        said = fidelity.table(found._replace(kl={"demonstrations": 0.0, "pack": kl, "nothing": 1.0}))
        assert (f"{100 - 100 * kl:.1f}%" in said) and ("Do not trust" in said) == warned


def test_packs_of_fewer_vectors(made, distiller, llm, workdir, tmp_path, capsys):
    whole, short = load_pack(made(), llm), load_pack(made("--vectors=2"), llm)
    assert (whole.shorter, short.shorter, short.num_vectors) == ((1, 2), (1,), 2)
    np.testing.assert_allclose(short.vectors, whole.vectors[:2], atol=1e-6)
    np.testing.assert_array_equal(whole.first(2).vectors, whole.vectors[:2])
    assert whole.first(2).shorter == (1,) and whole.first(4) is whole
    with says("4 vectors", "cut to 3", "1, 2, 4"):
        whole.first(3)
    given = [f"--distiller={workdir}", f"--demos={tmp_path / 'demos.jsonl'}", f"--out={tmp_path / 'b.safetensors'}"]
    assert command(distill.distill, "--vectors=3", "--cache=", *given) == 2
    assert "1, 2, 4 vectors, not of 3" in capsys.readouterr().err


def test_the_shortest_length_that_is_enough_is_written(made, llm, tmp_path, capsys):
    path, out = made("--keep_demos"), tmp_path / "short.pack.safetensors"
    queries = write_lines(tmp_path / "q.jsonl", [{"input": "w4", "output": "w50"}, {"input": "w8 w9"}])
    given = (str(path), str(queries), "", "w50,w51")
    found = fidelity.report(*given, choose_length=True, tolerance=0.05, out=str(out))
    pack, enough = load_pack(path), found.recovered() - 0.05 * abs(found.recovered())
    for count in (1, 2):  # what is measured of a length is what is measured of its pack
        cut = tmp_path / f"{count}.pack.safetensors"
        pack.first(count).save(cut)
        alone = fidelity.report(str(cut), *given[1:])
        assert alone.kl["pack"] == pytest.approx(found.kl[f"first {count}"], abs=1e-6)
        assert alone.recovered() == pytest.approx(found.recovered(f"first {count}"), abs=1e-4)
    wanted = min([n for n in (1, 2) if found.recovered(f"first {n}") >= enough], default=4)
    assert load_pack(out, llm).num_vectors == wanted
    assert f"{wanted} vectors are enough" in capsys.readouterr().out
    known = found._replace(kl={"pack": 0.2, "first 2": 0.23, "first 1": 0.5, "nothing": 1.0})
    assert [measure.shortest(known, (1, 2), share) for share in (0.01, 0.05, 0.5)] == [None, 2, 1]
    with says("one trained length", "prefix.nested"):
        fidelity.report(str(tmp_path / "1.pack.safetensors"), *given[1:], choose_length=True)
    with says("--out", "--choose_length"):
        fidelity.report(*given, out=str(out))


def test_fidelity_needs_the_demonstrations(made, tmp_path):
    path = made()
    queries = write_lines(tmp_path / "q.jsonl", [{"input": "w4", "options": ["w50", "w51"]}])
    with says(path, "--demos"):
        fidelity.report(str(path), str(queries))
    found = fidelity.report(str(path), str(queries), demos=str(tmp_path / "demos.jsonl"))
    assert found.accuracy["pack"] is None and found.queries == 1
    for output in (3, "w52"):
        write_lines(queries, [{"input": "w4", "options": ["w50", "w51"], "output": output}])
        with says(queries, "line 1", "output"):
            fidelity.report(str(path), str(queries), demos=str(tmp_path / "demos.jsonl"))


def test_fidelity_is_measured_against_the_packs_own_demonstrations(made, tmp_path):
    path, file = made(), tmp_path / "demos.jsonl"
    of_file = (str(path), str(file))
    assert fidelity._demonstrations(load_pack(path), *of_file) == DEMOS
    older = dataclasses.replace(load_pack(path), made_of="")
    for demos, facts in ((DEMOS[:3], ("3", "4")), (DEMOS[1:] + DEMOS[:1], ("other demonstrations",))):
        write_demos(file, demos)
        with says(*of_file, *facts):
            fidelity._demonstrations(load_pack(path), *of_file)
    assert fidelity._demonstrations(older, *of_file) == demos  # of which only the number is known
    write_demos(file, DEMOS * 2)
    with says(*of_file, "8", "4"):
        fidelity._demonstrations(older, *of_file)


def test_generate_prints_or_writes_answers(made, llm, tmp_path, capsys):
    path = made()
    wanted = mend_jax.generate_text(llm, load_pack(path), "w4", 5)
    capsys.readouterr()
    assert command(generate.generate, f"--pack={path}", "--input=w4", "--max_tokens=5") == 0
    assert capsys.readouterr().out == wanted.text + "\n"
    queries = write_lines(tmp_path / "q.jsonl", [{"input": "w4", "id": 7}, {"input": "w8 w9"}])
    flags = [f"--pack={path}", f"--inputs={queries}", f"--out={tmp_path / 'a.jsonl'}", "--max_tokens=5"]
    assert command(generate.generate, *flags) == 0
    first, _ = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert first == {"input": "w4", "id": 7, "answer": wanted.text, "finish": wanted.finish}
    end = wanted.text[-1]
    capsys.readouterr()
    flags = [f"--pack={path}", "--input=w4", "--max_tokens=5", "--stop=no, no", f"--stop={end}"]
    assert command(generate.generate, *flags) == 0
    assert capsys.readouterr().out == shown(wanted.text.partition(end)[0], keep="\n\t") + "\n"


@pytest.mark.parametrize(
    "flags, facts",
    [
        ([], ("--input", "--inputs")),
        (["--input=w1", "--inputs=x"], ("one of them",)),
        (["--inputs=x"], ("--out",)),
        (["--input=w1", "--out=x"], ("--inputs",)),
        (["--input=w1"], ("--input", "options")),
        (["--input=w1", "--options=,"], ("options",)),
    ],
)
def test_bad_questions_are_one_sentence(made, flags, facts, capsys):
    path = made()
    capsys.readouterr()
    assert command(predict.predict, f"--pack={path}", *flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(fact in said for fact in facts)


def test_one_option_is_a_list_whose_commas_were_forgotten(made, tmp_path, capsys):
    path = made("--keep_demos")
    queries = write_lines(tmp_path / "q.jsonl", [{"input": "w1"}])
    for main, flags in ((predict.predict, ["--input=w1"]), (fidelity.report, [f"--queries={queries}"])):
        for options in ("w2 w3", "w2,", "w2,w2"):
            capsys.readouterr()
            assert command(main, f"--pack={path}", *flags, f"--options={options}") == 2
            states(capsys.readouterr().err.strip(), f"--options={options}", "one answer", "commas")


def test_questions_that_cannot_be_asked_are_one_sentence(made, llm, tmp_path, capsys, monkeypatch):
    """Beyond the window, of no tokens, of bytes that are no UTF-8: of every command that asks."""
    path, long = made("--keep_demos"), "w1 " * 200
    options = {"options": ["w2", "w3"]}
    queries = write_lines(tmp_path / "q.jsonl", [{"input": "w1"} | options, {"input": long} | options])
    answers = write_lines(tmp_path / "y.jsonl", [{"input": "w1", "output": long, "options": ["w2", long]}])
    monkeypatch.setattr("mend_jax.packs.pack.load_llm", lambda *_, **__: llm)
    monkeypatch.setattr("mend_jax.packs.pack.Pack.check", lambda *_: None)
    odd = dataclasses.replace(llm, tokenizer=tokenizer_files.dropping(llm.tokenizer, " w7"))
    for main, flags, reader, facts in (
        (predict.predict, [f"--input={long}", "--options=w2,w3"], llm, ("256",)),
        (predict.predict, [f"--inputs={queries}", f"--out={tmp_path / 'o'}"], llm, (queries, "line 2", "256")),
        (generate.generate, [f"--input={long}"], llm, ("--input", "256", "max_tokens")),
        (generate.generate, [f"--inputs={queries}", f"--out={tmp_path / 'o'}"], llm, (queries, "line 2", "256")),
        (fidelity.report, [f"--queries={queries}"], llm, (queries, "line 2", "256")),
        (fidelity.report, [f"--queries={answers}"], llm, (answers, "line 1", "256")),
        (generate.generate, ["--input=w1", "--max_tokens=252"], llm, ("256", "252")),
        (generate.generate, ["--input=w1", "--seed=99999999999"], llm, ("seed", "99999999999")),
        (predict.predict, ["--input=w1", "--options=w2,w7"], odd, ("option", "empty")),
        (predict.predict, ["--input=\udcff", "--options=w2,w3"], llm, ("UTF-8",)),
        (predict.predict, ["--input=w1", "--options=w2,\udcff"], llm, ("UTF-8",)),
        (generate.generate, ["--input=\udcff"], llm, ("UTF-8",)),
        (generate.generate, ["--input=w1", "--stop=\udcff"], llm, ("UTF-8",)),
    ):
        monkeypatch.setattr("mend_jax.packs.pack.load_llm", lambda *_, reader=reader, **__: reader)
        capsys.readouterr()
        assert command(main, f"--pack={path}", *flags) == 2
        states(capsys.readouterr().err.rstrip("\n"), *facts)
    assert not (tmp_path / "o").exists()


def test_bad_files_of_queries_name_file_and_line(made, tmp_path, capsys):
    path, queries = made(), tmp_path / "q.jsonl"
    for line, facts in {
        '{"inputs": "a"}': ("line 2", "input"),
        '{"input": "  "}': ("line 2", "input"),
        '{"input": NaN}': ("line 2", "input"),
        r'{"input": "a \ud800"}': ("line 2", "half of a character"),
        "[" * 100_000: ("line 2", "too deep"),
        '{"input": "a", "options": "b"}': ("line 2", "options"),
    }.items():
        queries.write_text('{"input": "w1", "options": ["w2"]}\n' + line)
        capsys.readouterr()
        assert command(predict.predict, f"--pack={path}", f"--inputs={queries}", f"--out={tmp_path / 'o'}") == 2
        said = capsys.readouterr().err
        assert str(queries) in said and all(fact in said for fact in facts) and not (tmp_path / "o").exists()


@pytest.mark.parametrize("main", [predict.predict, generate.generate])
def test_answers_that_nobody_can_write_are_not_computed(main, made, tmp_path, capsys, monkeypatch):
    path, queries = made(), write_lines(tmp_path / "q.jsonl", [{"input": "w4", "options": ["w1", "w2"]}])
    monkeypatch.setattr("mend_jax.packs.pack.load_llm", None)
    for out in (tmp_path, queries / "a.jsonl"):
        capsys.readouterr()
        assert command(main, f"--pack={path}", f"--inputs={queries}", f"--out={out}") == 2
        states(capsys.readouterr().err.rstrip("\n"), out, "--out")


def test_packs_and_tables_that_nobody_can_write_are_not_computed(made, workdir, tmp_path, capsys, monkeypatch):
    path, queries = made("--keep_demos"), write_lines(tmp_path / "q.jsonl", [{"input": "w4", "options": ["w1", "w2"]}])
    monkeypatch.setattr("mend_jax.packs.pack.load_llm", None)
    monkeypatch.setattr(distill, "load_both", None)
    bad = queries / "a.safetensors"
    given = [f"--distiller={workdir}", f"--demos={tmp_path / 'demos.jsonl'}", "--cache="]
    for main, flags in (
        (distill.distill, given),
        (fidelity.report, [f"--pack={path}", f"--queries={queries}", "--choose_length"]),
    ):
        capsys.readouterr()
        assert command(main, *flags, f"--out={bad}") == 2
        states(capsys.readouterr().err.rstrip("\n"), bad, "--out")


def test_a_pack_whose_llm_has_moved_says_so(made, folders, tmp_path, capsys):
    path = made()
    pack = dataclasses.replace(load_pack(path), llm=str(tmp_path / "gone"))
    pack.save(path)
    capsys.readouterr()
    assert command(predict.predict, f"--pack={path}", "--input=w1", "--options=w2,w3") == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "gone") in said and "--llm" in said
    assert command(predict.predict, f"--pack={path}", "--input=w1", "--options=w2,w3", f"--llm={folders[0]}") == 0


def test_a_full_disk_leaves_no_half_pack(made, workdir, tmp_path, monkeypatch, capsys):
    path = made()
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("mend_jax.packs.pack.write_file", full)
    with says(path, "No space left on device", "another file"):
        load_pack(path).save(path)
    given = [f"--distiller={workdir}", f"--demos={tmp_path / 'demos.jsonl'}", f"--cache={tmp_path / 'cache'}"]
    capsys.readouterr()
    assert command(distill.distill, *given, f"--out={path}") == 2
    states(capsys.readouterr().err.strip(), path, "No space left on device", "--out")
    assert path.read_bytes() == before and not list(tmp_path.glob(".*tmp"))


def test_a_pack_is_saved_into_a_new_folder_or_says_in_a_sentence_why_not(made, tmp_path):
    pack = load_pack(made())
    pack.save(tmp_path / "new" / "folder" / "x.pack.safetensors")
    np.testing.assert_array_equal(load_pack(tmp_path / "new" / "folder" / "x.pack.safetensors").vectors, pack.vectors)
    below = tmp_path / "demos.jsonl" / "x.pack.safetensors"
    with pytest.raises(mend_jax.UserError) as error:
        pack.save(below)
    states(str(error.value), below, "cannot be written", "another file")
    assert ".tmp" not in str(error.value)  # no name of a temporary file


def test_a_prefix_of_a_pack_has_one_row(made):
    prefix = load_pack(made()).prefix
    assert prefix.embeds.shape == (1, 4, 32) and jnp.array_equal(prefix.length, jnp.asarray([4]))
