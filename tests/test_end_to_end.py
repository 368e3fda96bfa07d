"""The whole program as its users run it: the real commands, on tiny files in the real formats.

prepare -> all five methods trained and evaluated, killed twice on the way -> export -> the exported folder evaluated.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ONE_DEVICE, ROOT, save_tokenizer
from data_files import make_world, words, write_examples

import mend_jax
from mend_jax.models.families import from_hf_config
from mend_jax.models.folders import init_model, save_model
from mend_jax.run import checkpoint, saved_steps

pytestmark = pytest.mark.slow

METHODS = ("zero_shot", "prompt_tuning", "icl", "hypertuning", "mend")
STAGES = (
    "prompt_tuning/finetune", "hypertuning/pretrain", "hypertuning/finetune", "mend/pretrain", "mend/finetune",
)  # fmt: skip
SEEDS = (13, 21)
PREDICTIONS = len(METHODS) * 2 * len(SEEDS)  # files: two test tasks
DEMOS = [[("w1 w2", "w50"), ("w3 w4 w5", "w51")], [("w7", "w50")]]  # two contexts of different lengths
CONFIG = """
from configs import base

def get_config():
    c = base.get_config()
    c.llm.path, c.prefix.backbone, c.prefix.length = "{folder}/llm", "{folder}/backbone", 4
    c.data.text, c.data.tasks, c.data.partition = "{folder}/c4", "{folder}/metaicl", "own"
    c.data.cache = "{folder}/cache"
    c.data.k, c.data.max_text_tokens, c.data.max_demo_tokens, c.data.max_input_tokens = 4, 40, 32, 6
    c.data.demo_buckets, c.data.query_buckets, c.data.validation_items = (32,), (8,), 8
    c.optimizer.learning_rate = 1e-2
    c.train.batch_size, c.train.log_every, c.train.eval_every, c.train.save_every = 4, 3, 4, 2
    c.experiment.pretrain_steps = c.experiment.finetune_steps = 8
    c.evaluate.seeds, c.evaluate.batch_size = {seeds}, 4
    return c
"""


class Program:
    """The commands of the package, in processes of their own, with the files in `folder`."""

    def __init__(self, folder):
        self.folder, self.said = folder, ""
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.environment = os.environ | ONE_DEVICE | cache

    def start(self, command, *flags):
        """The process of `python -m mend_jax.COMMAND`; what it prints goes to a file."""
        full = [sys.executable, "-m", f"mend_jax.{command}", *flags]
        with open(self.folder / "log.txt", "w") as log:
            return subprocess.Popen(full, cwd=ROOT, env=self.environment, stdout=log, stderr=log)

    def run(self, command, *flags):
        """Runs it to its end, which must be a good one; returns what it printed."""
        code = self.start(command, *flags).wait()
        return self.check(code)

    def check(self, code):
        said = (self.folder / "log.txt").read_text()
        assert code == 0 and "Traceback" not in said, said
        return said

    def experiment(self, workdir):
        return ("experiments.methods", f"--config={self.folder}/tiny.py", f"--workdir={workdir}")

    def kill(self, workdir, part, when, seconds):
        """Starts the experiment and kills it so many seconds after `when()` is first true, before `part` has ended."""
        for _ in range(5):
            run = self.start(*self.experiment(workdir))
            while run.poll() is None and not when():
                time.sleep(0.001)
            time.sleep(seconds)
            run.kill()
            if run.wait() == -signal.SIGKILL and not (workdir / "evaluation" / "scores.json").exists():
                return
            self.check(0 if run.returncode == -signal.SIGKILL else run.returncode)
            shutil.rmtree(part)  # it was faster than we: that part again
        pytest.fail(f"The run ended five times before it could be killed in {part}.")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The commands, and what they read: texts, tasks, an LLM, a backbone and a config."""
    folder = make_world(tmp_path_factory.mktemp("program"), seeds=SEEDS)
    _second_test_task(folder / "metaicl")
    _model(folder / "llm", width=32, seed=1)
    _model(folder / "backbone", width=24, seed=2)
    (folder / "tiny.py").write_text(CONFIG.format(folder=folder, seeds=SEEDS))
    return Program(folder)


def _second_test_task(tasks):
    """u, whose items have options of their own: it is measured by accuracy, t by Macro-F1."""
    for seed in SEEDS:
        for split, count in (("train", 4), ("dev", 4), ("test", 6)):
            lines = []
            for i in range(count):
                options = [words(seed + 7 * i + j, 1 + j) for j in range(3)]
                lines.append({"task": "u", "input": words(i, 4), "output": options[i % 3], "options": options})
            path = write_examples(tasks / "data" / "u" / f"u_4_{seed}_{split}.jsonl", "u", [], [])
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tasks / "partitions.json").write_text(json.dumps({"own": {"train": ["a", "b", "c"], "test": ["t", "u"]}}))


def _model(folder, width, seed):
    """A folder as Hugging Face has it, with random weights."""
    sizes = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 96, "vocab_size": 64, "n_inner": None}
    rest = {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "bos_token_id": 1, "eos_token_id": 1}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes | rest))
    save_tokenizer(folder)
    params = init_model(folder, seed).params
    rng = np.random.default_rng(seed)  # larger weights, so that answers differ
    params = jax.tree.map(lambda a: np.asarray(a) + 0.1 * rng.standard_normal(a.shape).astype(np.float32), params)
    save_model(folder, from_hf_config(folder), params, folder)


def bytes_of(*folders):
    """{path: content} of all files below."""
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def without_times(tree):
    """JSON-like content without what differs between two workdirs: seconds, checksums of files with seconds, and paths of models."""
    if isinstance(tree, dict):
        ending = ("seconds", "compiled", "path", "checksum")
        return {name: without_times(value) for name, value in tree.items() if not name.endswith(ending)}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def predictions(evaluation):
    """{file: lines} of every prediction and, without seconds, of what they cost."""
    found = {}
    for path, content in bytes_of(evaluation / "predictions").items():
        if not path.name.endswith(".jsonl"):
            content = without_times(json.loads(content))
        found[str(path.relative_to(evaluation))] = content
    return found


def scores(evaluation):
    return json.loads((evaluation / "scores.json").read_text())


def assert_same_training(workdir, other):
    """All checkpoints that were kept, and every line of metrics, bit for bit."""
    assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    steps = saved_steps.whole_steps(workdir)
    assert 8 in steps and steps == saved_steps.whole_steps(other)
    for step in steps:
        ours, theirs = (checkpoint.read_step(folder, step) for folder in (workdir, other))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_prepare_train_kill_go_on_evaluate_export(program, kill_rng):
    """One test, because each part reads what the one before wrote. MEND_KILL_SEED=N repeats its kills (conftest.py)."""
    folder = program.folder
    unbroken, broken, exported = folder / "unbroken", folder / "broken", folder / "exported"
    frozen = bytes_of(folder / "llm", folder / "backbone")
    assert "documents" in program.run("prepare", f"--config={folder}/tiny.py")
    prepared = bytes_of(folder / "cache")

    table = program.run(*program.experiment(unbroken))
    _kill_in_training(program, broken, kill_rng)
    _kill_in_evaluation(program, broken, kill_rng)
    assert "This run is finished: 8 steps" in program.run(*program.experiment(broken))

    for stage in STAGES:
        assert_same_training(broken / stage, unbroken / stage)
    assert predictions(broken / "evaluation") == predictions(unbroken / "evaluation")
    assert without_times(scores(broken / "evaluation")) == without_times(scores(unbroken / "evaluation"))
    _check_table(table, unbroken / "evaluation")

    assert "release" in program.run("export", f"--workdir={broken}/mend/finetune", f"--out={exported}")
    _check_vectors(folder, broken / "mend" / "finetune", exported)
    flags = [f"--config={folder}/tiny.py", f"--workdir={folder}/again", f"--config.evaluate.methods=mend={exported}"]
    program.run("evaluate", *flags)
    again, before = (
        without_times(scores(path))["methods"]["mend"] for path in (folder / "again", broken / "evaluation")
    )
    assert again == before
    mend = {name: lines for name, lines in predictions(broken / "evaluation").items() if "/mend-" in name}
    assert predictions(folder / "again") == mend
    _check_users_xla(program, exported, mend)

    assert bytes_of(folder / "llm", folder / "backbone") == frozen
    assert bytes_of(folder / "cache").items() >= prepared.items()


def _check_users_xla(program, exported, mend):
    """With XLA as users have it (conftest.py takes some away from tests) the scores are the same but for rounding."""
    program.environment |= {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    flags = [f"--config={program.folder}/tiny.py", f"--config.evaluate.methods=mend={exported}"]
    program.run("evaluate", *flags, f"--workdir={program.folder}/users")
    found = predictions(program.folder / "users")
    assert found.keys() == mend.keys()
    for name in (name for name in mend if name.endswith(".jsonl")):
        for ours, wanted in zip(*(map(json.loads, part[name].splitlines()) for part in (found, mend)), strict=True):
            assert ours.pop("scores") == pytest.approx(wanted.pop("scores"), abs=1e-4) and ours == wanted


def _kill_in_training(program, workdir, rng):
    """In one of the five trainings, while it compiles, trains or saves."""
    run = workdir / rng.choice(STAGES)
    sign = run / rng.choice(["config.json", "checkpoints/2", "checkpoints/4"])
    program.kill(workdir, workdir, sign.exists, rng.uniform(0, 0.3))
    assert run.exists()


def _kill_in_evaluation(program, workdir, rng):
    """After some of the predictions, in any part of the next one."""
    count, folder = rng.randrange(1, PREDICTIONS - 4), workdir / "evaluation" / "predictions"
    program.kill(workdir, workdir / "evaluation", lambda: len(_written(folder)) >= count, rng.uniform(0, 0.03))
    assert len(_written(folder)) >= count


def _written(folder: Path):
    return list(folder.glob("*/*.jsonl"))


def _check_table(said, evaluation):
    """Every method has its row, in order, in the terminal and as Markdown, and the scores of the JSON file."""
    found = scores(evaluation)["methods"]
    assert tuple(found) == METHODS
    assert len(predictions(evaluation)) == 2 * PREDICTIONS + len(METHODS)  # lines, cost, and made_of.json
    for text in (said, (evaluation / "table.md").read_text()):
        lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
        rows = [cells for cells in lines if cells[1].strip() in METHODS and len(cells) > 9]
        assert [cells[1].strip() for cells in rows] == list(METHODS)
        for cells, method in zip(rows, found.values(), strict=True):
            mean, spread = (100 * method["score"][name] for name in ("mean", "std"))
            assert cells[2].strip() == f"{mean:.2f} ± {spread:.2f}"
    assert len({json.dumps(method["per_task"]) for method in found.values()}) > 2  # methods really differ


def _check_vectors(folder, workdir, exported):
    """The workdir, the Hugging Face folder and the release's files are one distiller."""
    llm = mend_jax.load_llm(folder / "llm")
    wanted = mend_jax.load_distiller(workdir, llm)
    others = [mend_jax.load_distiller(exported, llm)]
    for file in sorted((exported / "release").iterdir()):  # .bin where PyTorch is there
        others.append(mend_jax.load_distiller(file, llm, backbone=folder / "backbone"))
    assert (exported / "release" / "distiller.safetensors").exists()
    for demos in DEMOS:
        vectors = wanted.distill(demos)
        assert vectors.embeds.shape == (1, 4, 32)
        for other in others:
            np.testing.assert_array_equal(other.distill(demos).embeds, vectors.embeds)
