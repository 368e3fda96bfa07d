"""One run by several processes of this machine: killed, told to stop, gone on with another number, and as of one.

The real commands, started by launch/local.sh; the process that is alone is that of the tests, with its 8 devices.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ONE_DEVICE, ROOT
from data_files import make_world
from facts import says
from test_end_to_end import _model as model_folder

from mend_jax import train
from mend_jax.cli.config_files import load_config
from mend_jax.evaluate import evaluate
from mend_jax.run import build, checkpoint, distributed, reporting, saved_steps

pytestmark = pytest.mark.slow

STEPS = 20
CONFIG = """
from configs import base

def get_config():
    c = base.get_config()
    c.stage, c.llm.path, c.prefix.backbone, c.prefix.length = "pretrain", "{folder}/llm", "{folder}/backbone", 4
    c.data.text, c.data.tasks, c.data.partition, c.data.cache = "{folder}/c4", "{folder}/metaicl", "tiny", "{folder}/cache"
    c.data.k, c.data.max_text_tokens, c.data.max_demo_tokens, c.data.max_input_tokens = 4, 40, 32, 6
    c.data.demo_buckets, c.data.query_buckets, c.data.validation_items = (16, 32), (8,), 8
    c.optimizer.learning_rate, c.train.batch_size, c.train.steps = 1e-4, 8, {steps}
    c.train.log_every, c.train.eval_every, c.train.save_every = 1, 10, 5
    c.evaluate.methods, c.evaluate.seeds, c.evaluate.batch_size = ("zero_shot", "icl"), (13, 21), 4
    return c
"""

WAITS = """
import time

from mend_jax.scoring.results import Store

read = Store.read

def wait(self, task, seed, *rest):
    while (self.folder.name.split("-")[0], seed) == ("icl", 21):
        time.sleep(0.01)
    return read(self, task, seed, *rest)

Store.read = wait
"""


class Machine:
    """Starts commands in several processes, with what they read in `folder`."""

    def __init__(self, folder):
        self.folder, self.log, self.config = folder, folder / "log.txt", "tiny.py"
        self.environment = os.environ | ONE_DEVICE

    def start(self, processes, command, workdir, *flags):
        full = [
            ROOT / "launch" / "local.sh",
            command,
            f"--config={self.folder}/{self.config}",
            f"--workdir={workdir}",
            *flags,
        ]
        settings = self.environment | {"PROCESSES": str(processes)}
        with open(self.log, "w") as log:
            return subprocess.Popen(full, cwd=self.folder, env=settings, stdout=log, stderr=log)

    def run(self, *arguments):
        return self.end(self.start(*arguments), 0)

    def end(self, launcher, code):
        """What was printed, when the launcher has ended, as it must, with that code."""
        found, said = launcher.wait(timeout=1200), self.log.read_text()
        assert found == code, said
        return said

    def train_until_saved(self, processes, workdir, *flags):
        """(launcher, its processes), when the first new checkpoint is whole."""
        before = set(saved_steps.whole_steps(workdir))
        launcher = self.start(processes, "train", workdir, *flags)
        while launcher.poll() is None and not any(
            int(path.parent.name) not in before for path in workdir.glob("checkpoints/*/checksums.json")
        ):
            time.sleep(0.002)
        assert launcher.poll() is None, self.log.read_text()
        return launcher, children(launcher.pid)


def children(pid):
    """The Python processes of a launcher, in their order."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in found if b"mend_jax" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("machine"))
    model_folder(folder / "llm", width=32, seed=1)
    model_folder(folder / "backbone", width=24, seed=2)
    (folder / "tiny.py").write_text(CONFIG.format(folder=folder, steps=STEPS))
    return Machine(folder)


@pytest.fixture(scope="module")
def alone(machine):
    """The workdir of the run that one process made."""
    config, workdir = load_config(f"{machine.folder}/tiny.py"), machine.folder / "alone"
    assert train.train(config, workdir) == 0
    start = build.build(config, build.load(config)).params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start, checkpoint.read_step(workdir, STEPS))
    assert max(jax.tree.leaves(moved)) > 1e-3  # a hundred times more than runs may differ
    return workdir


def assert_same_run(workdir, other):
    """Parameters within 1e-5, and the same rows in every step."""
    ours, theirs = (checkpoint.read_step(folder, STEPS) for folder in (workdir, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours, theirs)
    lines, expected = (reporting.read_lines(folder / "metrics.jsonl") for folder in (workdir, other))
    assert [line["step"] for line in lines] == [line["step"] for line in expected] and len(lines) == STEPS + 2
    for line, wanted in zip(lines, expected, strict=True):
        assert line.keys() == wanted.keys()
        for name in line:
            if name in ("tokens", "padding"):  # of all processes: the rows' own numbers
                assert line[name] == wanted[name]
            np.testing.assert_allclose(line[name], wanted[name], 1e-4, 1e-7, err_msg=f"{name} in step {line['step']}")


def kept_alive(pids):
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize(
    ("mode", "first", "flags", "then"),
    [
        ("pmap", 1, [], 2),
        ("mesh", 4, ["--config.mesh.tensor=2"], 2),  # then fsdp alone: the checkpoint is of another mesh
    ],
)
def test_killed_and_gone_on_with_another_number_ends_as_one_process(machine, alone, mode, first, flags, then, tmp_path):
    flag = f"--config.train.parallel={mode}"
    launcher, processes = machine.train_until_saved(first, tmp_path, flag, *flags)
    assert len(processes) == first
    os.kill(processes[-1], signal.SIGKILL)
    machine.end(launcher, 128 + signal.SIGKILL)
    assert not kept_alive(processes)  # none is left waiting for the dead one

    said = machine.run(then, "train", tmp_path, flag)
    assert said.count("Resuming from step") == 1 and f"{then} devices" in said  # process 0 alone speaks
    assert_same_run(tmp_path, alone)
    written = {path.name for path in (tmp_path / "checkpoints" / str(STEPS) / "params").glob("ocdbt.process_*")}
    assert written == {f"ocdbt.process_{i}" for i in range(then)}  # all of them wrote


def test_sigterm_to_any_process_saves_at_one_step_and_says_75(machine, alone, tmp_path):
    launcher, processes = machine.train_until_saved(2, tmp_path)
    os.kill(processes[1], signal.SIGTERM)
    said = machine.end(launcher, 75)
    stopped = saved_steps.whole_steps(tmp_path)[-1]
    assert said.count(f"Stopped at step {stopped}, which is saved") == 1 and stopped < STEPS
    machine.run(2, "train", tmp_path)
    assert_same_run(tmp_path, alone)


def test_dev_scores_of_a_mesh_are_those_of_one_process(machine, tmp_path, monkeypatch):
    """Finetuning evaluates with both models in parts on two processes."""
    monkeypatch.setitem(machine.environment, "JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # else mostly waiting for XLA
    fields = {"stage": "finetune", "train.steps": 2, "train.eval_every": 1}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    machine.run(2, "train", tmp_path / "both", "--config.train.parallel=mesh", *flags)
    config = load_config(f"{machine.folder}/tiny.py")
    config.stage, config.train.steps, config.train.eval_every = fields.values()
    assert train.train(config, tmp_path / "alone") == 0
    lines = [reporting.read_lines(tmp_path / name / "metrics.jsonl") for name in ("both", "alone")]
    scores = [[line["dev_score"] for line in part if "dev_score" in line] for part in lines]
    assert len(scores[0]) == 2 and scores[0] == scores[1] and 0 < scores[0][0] < 1
    np.testing.assert_allclose(*([line["kd"] for line in part if "kd" in line] for part in lines), rtol=1e-4)


@pytest.fixture(scope="module")
def evaluated(machine, alone):
    """(methods, the workdir of their evaluation by one process)."""
    config, methods = load_config(f"{machine.folder}/tiny.py"), ("zero_shot", "icl", f"mend={alone}")
    config.evaluate.methods = methods
    evaluate(config, machine.folder / "evaluated")
    return methods, machine.folder / "evaluated"


@pytest.mark.parametrize("mode", ["pmap", "mesh"])
def test_evaluation_is_shared_and_the_same(machine, evaluated, mode, tmp_path):
    """By tasks, or with both models in parts: the predictions of one process, to the last digits; going on scores nothing."""
    methods, one = evaluated
    expected = json.loads((one / "scores.json").read_text())
    flags = [f"--config.train.parallel={mode}", f"--config.evaluate.methods={','.join(methods)}"]
    said = machine.run(2, "evaluate", tmp_path / "both", *flags)
    assert said.count("| icl ") == 1
    found = json.loads((tmp_path / "both" / "scores.json").read_text())
    for name, method in expected["methods"].items():
        assert found["methods"][name]["per_task"] == method["per_task"]
    files = [sorted(folder.glob("predictions/*/*.jsonl")) for folder in (one, tmp_path / "both")]
    assert len(files[0]) == len(files[1]) == 6
    lines = [[json.loads(line) for file in part for line in file.read_text().splitlines()] for part in files]
    for ours, theirs in zip(*lines, strict=True):
        np.testing.assert_allclose(ours.pop("scores"), theirs.pop("scores"), atol=2e-5)
        assert ours == theirs
    if mode == "pmap":  # the next test is one of going on
        return
    written = {file: file.stat().st_mtime_ns for file in files[1]}
    machine.run(2, "evaluate", tmp_path / "both", *flags)
    assert written == {file: file.stat().st_mtime_ns for file in files[1]}


def test_sigterm_ends_an_evaluation_which_goes_on(machine, tmp_path, monkeypatch):
    """Process 0 has scored its seed and waits for process 1, which waits before its last predictions."""
    monkeypatch.setitem(machine.environment, "JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    (machine.folder / "waits.py").write_text((machine.folder / "tiny.py").read_text() + WAITS)
    monkeypatch.setattr(machine, "config", "waits.py")
    launcher = machine.start(2, "evaluate", tmp_path)
    while launcher.poll() is None and len(list(tmp_path.glob("predictions/*/*.jsonl"))) < 3:
        time.sleep(0.002)
    assert launcher.poll() is None, machine.log.read_text()
    launcher.terminate()
    said = machine.end(launcher, 75)
    assert said.count("Stopped. ") == 2 and "Traceback" not in said
    scored = {path: path.stat().st_mtime_ns for path in tmp_path.glob("predictions/*/*.jsonl")}
    assert len(scored) == 3 and not (tmp_path / "scores.json").exists()
    monkeypatch.setattr(machine, "config", "tiny.py")
    machine.run(2, "evaluate", tmp_path)
    assert scored == {path: path.stat().st_mtime_ns for path in scored}  # they were not scored again
    assert len(list(tmp_path.glob("predictions/*/*.jsonl"))) == 4 and (tmp_path / "scores.json").exists()


def test_a_mistake_is_one_sentence_and_ends_all(machine, tmp_path):
    said = machine.end(machine.start(2, "train", tmp_path, "--config.data.text=nowhere"), 2)
    assert "error: " in said and "nowhere" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("environment", "platforms", "expected"),
    [
        ({}, "cpu", False),
        ({}, "", False),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, "", True),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "", True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, "", False),  # a shell within an allocation
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "cuda", True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu", False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu", True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", False),
        ({}, "tpu,cpu", True),  # a TPU VM, whose metadata JAX asks
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", False),
    ],
)
def test_which_process_is_one_of_several(environment, platforms, expected, monkeypatch):
    names = (
        "JAX_COORDINATOR_ADDRESS SLURM_STEP_NUM_TASKS OMPI_COMM_WORLD_SIZE MEGASCALE_NUM_SLICES TPU_WORKER_HOSTNAMES"
    )
    for name in [*names.split(), "TPU_PROCESS_ADDRESSES", "TPU_SKIP_MDS_QUERY"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_one_of_several(platforms) is expected


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({}, ["JAX_COORDINATOR_ADDRESS=HOST:PORT", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]),
        ({"JAX_NUM_PROCESSES": "two"}, ["JAX_NUM_PROCESSES=two"]),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, ["process_id < num_processes"]),
    ],
)
def test_settings_that_are_not_whole(settings, facts, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    def initialize(coordinator_address=None, **given):  # JAX's own checks, for a process whose devices are in use
        jax._src.distributed.State().initialize(**given | {"cluster_detection_method": "deactivate"})

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with says(*facts):
        distributed.start()


def test_a_process_that_is_alone_starts_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("it was started"))
    distributed.start()
    assert not distributed.is_running() and distributed.is_first() and distributed.label() == ""
    assert distributed.of_first(0.1) == 0.1
    distributed.leave(2)
