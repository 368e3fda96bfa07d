"""What is measured on an accelerator: the parts at a tiny size, what becomes of a part that fails, and what travels there."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import jax
import pytest
from conftest import ROOT
from data_files import make_world
from facts import says

import mend_jax
from configs import base
from mend_jax import benchmark
from mend_jax.cli import command_line as cli
from mend_jax.cli import config_files
from mend_jax.measure import accelerator, accelerator_pack, devices, parts, timed_training
from mend_jax.measure.accelerator_page import page
from mend_jax.measure.parts import DONE, FAILED, SKIPPED, TIMED_OUT, Part
from mend_jax.measure.pieces import split

COMMANDS = {
    "mend_jax.benchmark": benchmark.COMMANDS,
    "mend_jax.measure.devices": devices.devices,
    "mend_jax.measure.timed_training": timed_training.timed_training,
}


def script(name, text, seconds=60, least=1, **more):
    return Part(name, f"the part {name}", ("-c", text), seconds, least, **more)


def run(folder, *chosen, until=None, before=None):
    """The results of some parts."""
    results = {"dry_run": True, "minutes": 1, "machine": accelerator.machine(), "parts": before or {}}
    (folder / "home").mkdir(exist_ok=True)
    until = time.monotonic() + 60 if until is None else until
    accelerator.run_parts(list(chosen), folder, folder / "home", results, until)
    assert json.loads((folder / "home" / "results.json").read_text()) == results
    assert (folder / "home" / "results.md").read_text() == page(results)
    return results["parts"]


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    broken = script("broken", "import sys; print('half way'); sys.exit('all is lost')")
    found = run(tmp_path, broken, script("fine", "print('done')"))
    assert (found["broken"]["state"], found["broken"]["exit"], found["fine"]["state"]) == (FAILED, 1, DONE)
    assert parts.last_line(found["broken"]) == "all is lost" and found["broken"]["tail"][0] == "half way"
    text = (tmp_path / "home" / "results.md").read_text()
    assert "**broken** failed after 0 s: all is lost" in text and "**fine**" not in text


def test_what_a_part_wrote_before_it_failed_is_kept(tmp_path):
    text = "import json, sys; json.dump([1], open(sys.argv[1], 'w')); sys.exit(1)"
    part = Part("broken", "", ("-c", text, "{out}"), 60, 1)
    assert run(tmp_path, part)["broken"]["result"] == [1]
    late = run(tmp_path, part, until=0.0, before={"broken": {**run(tmp_path, part)["broken"]}})
    assert late["broken"]["state"] == FAILED and late["broken"]["result"] == [1]  # no time to try again


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_with_its_children(tmp_path):
    child = (
        f"import time; open({str(tmp_path / 'child')!r}, 'w').write(str(__import__('os').getpid())); time.sleep(600)"
    )
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    text = f"import signal, subprocess, sys, time; {deaf}; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    began = time.monotonic()
    found = run(tmp_path, script("slow", text, seconds=3), script("fine", "pass"))
    assert (found["slow"]["state"], found["slow"]["exit"], found["fine"]["state"]) == (TIMED_OUT, None, DONE)
    assert time.monotonic() - began < 30
    state = Path("/proc", (tmp_path / "child").read_text(), "status")
    while state.exists() and "\nState:\tZ" not in state.read_text():
        assert time.monotonic() - began < 30, "the child lives"
    assert "**slow** timed out after" in (tmp_path / "home" / "results.md").read_text()


def test_what_does_not_fit_the_time_is_left_out(tmp_path):
    found = run(tmp_path, script("long", "pass", least=3000), script("short", "pass"))
    assert (found["long"]["state"], found["short"]["state"]) == (SKIPPED, DONE)
    assert "**long** was left out: it needs 3000 s," in (tmp_path / "home" / "results.md").read_text()
    found = run(tmp_path, script("late", "pass"), until=time.monotonic() - 1)
    assert parts.last_line(found["late"]) == "it needs 1 s, 0 s were left"


def test_a_part_whose_files_are_missing_is_left_out(tmp_path):
    part = script("needy", "pass", needs=(tmp_path / "model.gguf",))
    assert "model.gguf is not there" in parts.last_line(run(tmp_path, part)["needy"])
    (tmp_path / "model.gguf").touch()
    assert run(tmp_path, part)["needy"]["state"] == DONE


def test_a_part_that_is_done_is_not_run_again(tmp_path, capsys):
    part = script("once", f"open({str(tmp_path / 'runs')!r}, 'a').write('x')")
    found = run(tmp_path, part)
    found = run(tmp_path, part, before=found)
    assert (tmp_path / "runs").read_text() == "x" and "once: done before" in capsys.readouterr().err
    run(tmp_path, script("once", "pass"), before=found)  # another command
    assert (tmp_path / "runs").read_text() == "x"


def test_tests_that_ran_are_counted(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n@pytest.mark.skip\ndef test_left(): pass\n"
    )
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_some.py"), "--junitxml={out}")
    found = run(tmp_path, Part("golden", "", words, 60, 1, read=parts.read_junit))["golden"]
    assert found["state"] == FAILED
    assert [found["result"][kind] for kind in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert list(found["result"]["failing"].values()) == ["assert 1 == 2"]
    assert "test_bad: assert 1 == 2" in (tmp_path / "home" / "results.md").read_text()
    assert parts.read_junit(tmp_path / "nothing") is None


@pytest.mark.parametrize("part", accelerator.make_parts(ROOT / "w", ROOT / "h", False), ids=lambda part: part.name)
def test_the_commands_are_ones_that_run(part, monkeypatch):
    """Up to the point where the work starts: this machine cannot run them."""
    monkeypatch.setattr("mend_jax.data.small_world.resolve", lambda config: config)
    monkeypatch.chdir(ROOT)
    module, *words = part.command[1:]
    words = [word.replace("{out}", "o.json").replace("{seconds}", "60") for word in words]
    if module == "pytest":
        assert [(ROOT / word).is_file() for word in words if word.startswith("tests/")] == [True]
    else:
        cli.parse(*cli.chosen(COMMANDS[module], [module, *words]))
    assert part.least < part.seconds <= 540


def test_parts_are_chosen_by_name(tmp_path):
    every = accelerator.make_parts(tmp_path, tmp_path, False)
    assert len({part.name for part in every}) == len(every) == 15
    assert [part.name for part in accelerator.chosen(every, "mend, golden")] == ["golden", "mend"]
    with says("--only=goldne", "did you mean golden?"):
        accelerator.chosen(every, "goldne")


@pytest.mark.parametrize("bundles", [1, 3, 6])
def test_the_calls_run_every_part_in_time(bundles):
    found = [
        re.search(r"accelerator\.sh(?: --only=(\S+))? --minutes=(\d+)$", call)
        for call in accelerator_pack.calls(bundles)
    ]
    names = [name for call in found[:-1] for name in call[1].split(",")]
    assert names[-1] == "mend" and found[-1][1] is None  # the last one picks nothing: it runs what is left
    assert set(names) <= {part.name for part in accelerator.make_parts(ROOT, ROOT, False)}
    assert len(found) == bundles + 1
    assert sum(int(call[2]) for call in found) <= 14  # of 15, in which the machine starts too


def test_what_travels_fits_a_call_with_the_projects_files():
    """With the LLM of configs/smollm2_135m.py in two parts, or its data."""
    room = accelerator_pack.CALL - accelerator_pack.MARGIN - accelerator_pack.project_size(ROOT)
    assert room > 48 * accelerator_pack.MIB


def test_no_accelerator_is_one_sentence(tmp_path):
    if jax.default_backend() != "cpu":
        pytest.skip("there is one")
    with says("no accelerator", "--dry_run"):
        accelerator.accelerator(workdir=str(tmp_path))
    found = json.loads((tmp_path / "results" / "results.json").read_text())["parts"]
    assert list(found) == ["devices"] and found["devices"]["state"] == DONE


@pytest.mark.parametrize(
    ("done", "pace", "start", "left", "wanted"),
    [
        (30, 0.1, 10, 120, None),  # 1,180 of 1,000 steps fit: it goes on
        (30, 0.1, 10, 100, None),  # 980 fit
        (30, 0.1, 10, 65, 500),  # 630 fit; anew, without the first ten seconds again, 500
        (30, 0.01, 10, 65, 5_000),  # far more fit
        (3, 5.0, 10, 65, None),  # too slow to begin anew: SIGTERM ends it
    ],
)
def test_the_number_of_steps_follows_the_first_ones(done, pace, start, left, wanted):
    assert timed_training.other_steps(1000, done, pace, start, left) == wanted


def stage_of(train, tmp_path, monkeypatch, **fields):
    """The report of a stage of 1,000 steps in three seconds, whose trainings are calls of `train(config, workdir)`."""
    config = base.get_config()
    config.train.steps = 1000
    config.update_from_flattened_dict(fields)
    monkeypatch.setattr(timed_training, "train", train)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return timed_training.run_stage(config.lock(), tmp_path / "run", time.monotonic() + 3)
    finally:
        signal.signal(signal.SIGTERM, before)


def write_steps(workdir, count, seconds):
    """What a training writes in so many steps."""
    workdir.mkdir(exist_ok=True)
    speeds = [{"step": i + 1, "seconds_per_step": seconds, "tokens_per_second": 9.0} for i in range(count)]
    (workdir / "speed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in speeds))
    losses = [{"step": i + 1, "loss": 2.0 - i} for i in range(count)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))


def test_a_stage_that_would_take_too_long_begins_anew_with_fewer_steps(tmp_path, monkeypatch):
    asked = []

    def train(config, workdir):
        asked.append((config.train.steps, config.train.eval_every))
        stopped = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        write_steps(workdir, 3 if len(asked) == 1 else config.train.steps, 0.01)
        if len(asked) == 1:
            assert stopped.wait(30)
        signal.signal(signal.SIGTERM, before)
        return 75 if stopped.is_set() else 0

    found = stage_of(train, tmp_path, monkeypatch)
    (first, _), (second, evaluated) = asked
    assert first == found["first_guess"] == 1000 and 100 < second == evaluated == found["steps"] < 300
    assert found["done"] == second and not found["stopped"] and found["cudnn_failure"] is None


def test_a_stage_whose_time_is_over_is_stopped(tmp_path, monkeypatch):
    def train(config, workdir):
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        write_steps(workdir, 3, 5.0)
        assert stopped.wait(30)
        return 75

    found = stage_of(train, tmp_path, monkeypatch)
    assert (found["steps"], found["done"], found["stopped"]) == (1000, 3, True)
    assert (found["first_loss"], found["last_loss"]) == (2.0, 0.0)


def test_a_stage_goes_on_without_cudnn_where_that_fails(tmp_path, monkeypatch):
    def train(config, workdir):
        write_steps(workdir, 1, 0.01)
        if config.llm.attention == "cudnn":
            raise RuntimeError("no such kernel")
        return 0

    found = stage_of(train, tmp_path, monkeypatch, **{"llm.attention": "cudnn"})
    assert (found["attention"], found["cudnn_failure"]) == ("xla", "no such kernel")
    with pytest.raises(ZeroDivisionError):  # any other error stays one
        stage_of(lambda *_: 1 / 0, tmp_path, monkeypatch)


def test_pieces_make_the_file_again(tmp_path):
    (tmp_path / "whole").write_bytes(bytes(range(256)) * 10_000)
    for count in (4, 3):
        pieces = split(tmp_path / "whole", tmp_path / "home.tar", count)
        assert sorted(tmp_path.glob("home.tar.part*")) == pieces and len(pieces) == count
        assert b"".join(piece.read_bytes() for piece in pieces) == (tmp_path / "whole").read_bytes()
        assert max(piece.stat().st_size for piece in pieces) <= -(-2_560_000 // count)


MODEL = bytes(range(256)) * (10 << 10)  # 2.5 MiB, for bundles of 2


@pytest.fixture
def bundles(tmp_path, tiny_llm, monkeypatch):
    """Those of a tiny world and of a model in two parts."""
    load = config_files.load_config

    def tiny(path):
        config = load(path)
        config.llm.path = config.prefix.backbone = str(tiny_llm)
        config.data.partition, config.data.k, config.data.processes = "tiny", 4, 1
        config.evaluate.tasks, config.evaluate.seeds = ("t",), (13, 21)
        return config

    world = make_world(tmp_path / "world")
    (tmp_path / "m.gguf").write_bytes(MODEL)
    monkeypatch.setattr(accelerator_pack, "project_size", lambda root: accelerator_pack.CALL - 3 * accelerator_pack.MIB)
    monkeypatch.setattr(config_files, "load_config", tiny)
    monkeypatch.setattr(accelerator_pack, "local_folder", lambda path: tmp_path / "m.gguf")
    arguments = str(tmp_path / "bundles"), str(world / "c4"), str(world / "metaicl"), 1
    accelerator_pack.pack(*arguments)
    accelerator_pack.pack(*arguments)  # again
    return tmp_path / "bundles"


def test_what_travels(bundles):
    held = {
        path.name: sorted(file.name for file in path.iterdir()) for path in bundles.iterdir() if path.name.isdigit()
    }
    assert held == {"1": ["data.tar.gz", "model.gguf.part1of2"], "2": ["model.gguf.part2of2"]}
    with tarfile.open(bundles / "1" / "data.tar.gz") as tar:
        names = set(tar.getnames())
    assert {"data/c4/c4-train.00000-of-00002.json.gz", "data/metaicl/data/t/t_4_13_test.jsonl"} < names
    assert "data/c4/c4-train.00001-of-00002.json.gz" not in names  # of C4's files one
    assert len([name for name in names if name.endswith(".array_record")]) == 5  # two texts, three tasks
    text = accelerator_pack.bundles_text(bundles, 2 * accelerator_pack.MIB)
    assert "with 2: ./launch/accelerator.sh --only=mend --minutes=4" in text
    with says("bundles/1", "wheels"):
        accelerator_pack.bundles_text(bundles, 10)


def test_files_go_where_there_is_room(tmp_path):
    sizes = {"data": 30, "a": 60, "b": 60, "c": 10}
    for number in ("1", "2", "10"):
        (tmp_path / number).mkdir()
        (tmp_path / number / "of_before").touch()
    (tmp_path / "1" / "wheels").mkdir()
    (tmp_path / "1" / "wheels" / "x.whl").write_bytes(bytes(40))
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    accelerator_pack.place([tmp_path / name for name in sizes], tmp_path, 80)
    held = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert held == {"1/wheels/x.whl", "1/data", "1/c", "2/a", "3/b"}
    assert not (tmp_path / "10").exists()
    (tmp_path / "large").write_bytes(bytes(81))
    with says("large", "FILES"):
        accelerator_pack.place([tmp_path / "large"], tmp_path, 80)


PYTHON = """#!/bin/sh
# Stands for the machine's Python: writes down what it is asked to do and where it looks for packages, installs nothing.
echo "$PYTHONPATH: $@" >>"$CALLS"
while [ $# -gt 0 ]; do if [ "$1" = --target ] || [ "$1" = --dest ]; then mkdir -p "$2" && touch "$2/a.whl"; fi; shift; done
"""


@pytest.fixture
def launch(tmp_path):
    """launch(words, **settings) -> (finished process, what it asked Python to do), in a clone of the scripts."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    for name in ("requirements.txt", "requirements-test.txt"):
        shutil.copy(ROOT / name, clone)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def launch(*words, **settings):
        (tmp_path / "calls").write_text("")
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), "CALLS": str(tmp_path / "calls")}
        command = [str(clone / "launch" / "accelerator.sh"), *words]
        done = subprocess.run(command, cwd="/", env=environment | settings, capture_output=True, text=True, timeout=60)
        return done, [line for line in (tmp_path / "calls").read_text().splitlines() if " -c " not in line]

    return launch


def test_bundles_are_unpacked_as_they_come(launch, bundles, tmp_path):
    work, there = tmp_path / "clone" / "runs" / "accelerator", tmp_path / "there"
    (bundles / "1" / "wheels").mkdir()
    (bundles / "1" / "wheels" / "grain-1.whl").touch()
    there.mkdir()
    (bundles / "1").rename(there / "1")
    done, calls = launch("--only=golden", BUNDLES=str(there))
    assert done.returncode == 0 and "1 of 2 parts of runs/accelerator/model.gguf are here" in done.stderr
    install, measure = calls
    assert "pip install" in install and "--no-index" in install and install.endswith("/grain-1.whl")
    assert measure == f"{work / 'site'}: -m mend_jax.measure.accelerator --workdir=runs/accelerator --only=golden"
    (bundles / "2").rename(there / "2")
    for _ in range(2):
        done, calls = launch(BUNDLES=str(there))
        assert (done.returncode, done.stderr, len(calls)) == (0, "", 1)  # the wheels are there
    assert (work / "model.gguf").read_bytes() == MODEL
    assert (work / "data" / "metaicl" / "partitions.json").is_file()
    assert sorted(path.name for path in work.iterdir()) == ["data", "model.gguf", "site"]


def test_wheels_are_what_the_requirements_ask_for(launch):
    done, calls = launch("pack", TEXT="c4", TASKS="tasks", FILES="2")
    assert done.returncode == 0, done.stderr
    download, packed = calls
    asked = {word.split("~")[0].split("=")[0] for word in download.split("--dest ")[1].split()[1:]}
    assert asked == {"array-record", "flax", "grain", "ml-collections", "tensorboardX", "gguf", "portpicker"}
    assert "flax~=0.12.10" in download and "--python-version 3.12" in download
    bundles = "--out=runs/accelerator/bundles --text=c4 --tasks=tasks --files=2"
    assert packed == f": -m mend_jax.measure.accelerator_pack {bundles}"


@pytest.mark.parametrize("missing", ["TEXT", "TASKS"])
def test_a_missing_setting_is_one_sentence(launch, missing):
    done, calls = launch("pack", **dict.fromkeys({"TEXT", "TASKS"} - {missing}, "there"))
    assert done.returncode == 1 and calls == [] and done.stderr.startswith(f"error: {missing} is not set: ")


def test_help_is_the_scripts_head(launch):
    done, calls = launch("--help")
    assert (done.returncode, calls, done.stderr) == (0, [], "") and "--dry_run" in done.stdout


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The folder of a dry run of every part."""
    folder = tmp_path_factory.mktemp("accelerator")
    environment = os.environ | {"PYTHON": sys.executable, "OMP_WAIT_POLICY": "passive"}
    command = [ROOT / "launch" / "accelerator.sh", "--dry_run", f"--workdir={folder}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_every_part_at_a_tiny_size(dry_run):
    pytest.importorskip("torch")
    found = json.loads((dry_run / "results" / "results.json").read_text())["parts"]
    assert {name: part["state"] for name, part in found.items()} == {
        part.name: DONE for part in accelerator.make_parts(dry_run, dry_run, True)
    }
    assert found["golden"]["result"]["passed"] == 1
    assert found["step_pytorch"]["result"]["same"]["yes"] and found["inference"]["result"]["same"]["yes"]
    assert [one["rows"] for one in found["step_gpt2_large"]["result"]["tried"]] == [1]
    assert found["step_opt_6_7b_int8"]["result"]["settings"]["weights"] == "int8"
    mend = found["mend"]["result"]
    assert mend["stages"]["pretrain"]["done"] > 0 and mend["stages"]["finetune"]["done"] > 0
    assert list(mend["evaluation"]["methods"]) == ["zero_shot", "icl", "mend"]
    text = (dry_run / "results" / "results.md").read_text()
    for words in (
        "**A dry run: ",
        "## Tests on this device",
        "| t5_large ",
        "Vanilla ICL, cached",
        "| finetune ",
        "as fast as PyTorch",
    ):
        assert words in text


@pytest.mark.slow
def test_the_distiller_that_comes_back_is_whole(dry_run, tmp_path):
    pieces = sorted((dry_run / "results").glob("mend.tar.part*"))
    (tmp_path / "mend.tar").write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    with tarfile.open(tmp_path / "mend.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    llm = mend_jax.load_llm(ROOT / "mend_jax" / "small_world" / "llm")
    distiller = mend_jax.load_distiller(tmp_path / "mend", llm)
    assert distiller.distill([("gopi fepo bota", "maroon")]).length.tolist() == [8]
