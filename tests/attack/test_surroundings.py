"""Where commands run: places that cannot be written, no home, few open files, odd paths, folders that go away, two at a time.

Each in a process of its own, as its users start it, so only in the whole attack.
"""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import test_end_to_end as whole
from attack_scale import FULL
from conftest import ROOT
from data_files import make_world
from facts import states

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FULL, reason="./launch/test.sh attack")]
NOBODY = 54321  # a number without a name


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("odd places, päths & 漢字"), seeds=whole.SEEDS)
    whole._second_test_task(folder / "metaicl")
    whole._model(folder / "llm", width=32, seed=1)
    whole._model(folder / "backbone", width=24, seed=2)
    (folder / "tiny.py").write_text(whole.CONFIG.format(folder=folder, seeds=whole.SEEDS))
    return whole.Program(folder)


def flags(program, command, workdir=None):
    steps = ["--config.train.steps=8", "--config.stage=pretrain"] if command == "train" else []
    where = [] if workdir is None else [f"--workdir={workdir}"]
    return [sys.executable, "-m", f"mend_jax.{command}", f"--config={program.folder}/tiny.py", *steps, *where]


def ended(program, arguments, code, **more):
    """What a command printed, which ended with this exit code and no trace."""
    environment = program.environment | more.pop("env", {})
    environment = {name: value for name, value in environment.items() if value is not None}
    run = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, **more)
    said = run.stdout + run.stderr
    assert run.returncode == code and "Traceback" not in said, (run.returncode, said)
    return said


def refused(program, arguments, *facts, **more):
    """The sentence with which a command ended."""
    said = ended(program, arguments, 2, **more)
    [sentence] = [line for line in said.splitlines() if line.startswith("error: ")]
    states(sentence, *facts)


def test_paths_with_spaces_and_other_letters(program, tmp_path):
    """All commands: the world lies in such a folder, and so does what they write."""
    for command in ("prepare", "train", "evaluate"):
        ended(
            program, flags(program, command, None if command == "prepare" else tmp_path / f"mit Leer, é {command}"), 0
        )
    out = tmp_path / "aus | gabe ö"
    ended(
        program, [sys.executable, "-m", "mend_jax.export", f"--workdir={tmp_path}/mit Leer, é train", f"--out={out}"], 0
    )
    assert (out / "distiller.safetensors").exists()


@pytest.fixture
def read_only(tmp_path):
    """A folder on a disk that can only be read."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("command", ["train", "evaluate", "experiments.methods"])
def test_a_workdir_that_cannot_be_written(command, program, read_only):
    refused(program, flags(program, command, read_only / "run"), read_only / "run", "Read-only file system")


def test_a_cache_that_cannot_be_written(program, read_only):
    arguments = [*flags(program, "prepare"), f"--config.data.cache={read_only}/cache"]
    refused(program, arguments, re.compile(str(read_only)), "config.data.cache")


def test_no_home(program, tmp_path):
    """A user that the system does not know, as in many containers."""
    for folder in (program.folder, *program.folder.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    try:
        subprocess.run([sys.executable, "-c", ""], user=NOBODY, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("another user cannot run this Python")
    nothing = {"HOME": None, "JAX_COMPILATION_CACHE_DIR": None}
    arguments = [*flags(program, "prepare"), "--config.data.cache=~/.cache/mend_jax"]
    refused(program, arguments, "HOME", env=nothing, user=NOBODY)
    tmp_path.chmod(0o777)
    ended(program, [*flags(program, "prepare"), f"--config.data.cache={tmp_path}/c"], 0, env=nothing, user=NOBODY)


@pytest.mark.parametrize("limit", [48, 64])
def test_few_open_files(limit, program, tmp_path):
    """It works, or says so."""
    for command in ("prepare", "train"):
        arguments = flags(program, command, None if command == "prepare" else tmp_path / "run")
        shell = ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "bash", *arguments]
        run = subprocess.run(shell, cwd=ROOT, env=program.environment, capture_output=True, text=True)
        said = run.stdout + run.stderr
        assert run.returncode == 0 or (run.returncode == 2 and "ulimit" in said and "Traceback" not in said), said


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_workdir_that_is_removed(command, program, tmp_path):
    workdir, sign = tmp_path / "run", {"train": "metrics.jsonl", "evaluate": "predictions"}[command]
    more = ["--config.train.steps=4000", "--config.train.save_every=200"] if command == "train" else []
    run = program.start(command, *flags(program, command, workdir)[3:], *more)
    while run.poll() is None and not (workdir / sign).exists():
        time.sleep(0.001)
    moved = tmp_path / "gone"
    os.replace(workdir, moved)  # at once, as a removal on another machine
    shutil.rmtree(moved, ignore_errors=True)
    code, said = run.wait(), (program.folder / "log.txt").read_text()
    assert code == 2 and "Traceback" not in said, said
    states(next(line for line in said.splitlines() if line.startswith("error: ")), re.compile(re.escape(str(workdir))))


def test_two_at_a_time(program, tmp_path):
    """Of two trainings, evaluations or exports in one place one works and one says why not; two tokenisings both work."""
    for command in ("train", "evaluate"):
        both = [subprocess.Popen(flags(program, command, tmp_path / command), cwd=ROOT, env=program.environment, stderr=subprocess.PIPE, text=True)
                for _ in range(2)]  # fmt: skip
        said = [run.communicate()[1] for run in both]
        codes = sorted(run.returncode for run in both)
        assert codes in ([0, 2], [0, 0]), said  # the second may begin when the first has ended
        assert all("Traceback" not in text for text in said) and (
            codes == [0, 0] or any("Another run" in t for t in said)
        ), said
    prepare = [*flags(program, "prepare"), f"--config.data.cache={tmp_path}/cache"]
    both = [
        subprocess.Popen(prepare, cwd=ROOT, env=program.environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [(run.communicate()[1], run.returncode)[1] for run in both] == [0, 0]
    export = [sys.executable, "-m", "mend_jax.export", f"--workdir={tmp_path}/train", f"--out={tmp_path}/out"]
    both = [
        subprocess.Popen(export, cwd=ROOT, env=program.environment, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [run.communicate()[1] for run in both]
    assert sorted(run.returncode for run in both) == [0, 2] and all("Traceback" not in text for text in said), said
    assert {p.name for p in tmp_path.iterdir()} == {"train", "evaluate", "cache", "out"}
