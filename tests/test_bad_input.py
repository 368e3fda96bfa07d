"""Mistakes with models and meshes, at the command line: `train` and `evaluate` say each in one sentence and leave with 2."""

import json
import re
import shutil

import numpy as np
import pytest
from data_files import make_world, words
from facts import states
from safetensors.numpy import load_file, save_file
from test_end_to_end import _model as model_folder
from test_processes import CONFIG

from mend_jax import evaluate, train
from mend_jax.cli import command_line as cli

COMMANDS = {"train": train.train, "evaluate": evaluate.main}
MESH = ["--config.train.parallel=mesh"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with texts, tasks, an LLM (width 32, 2 heads, 96 positions), a backbone (width 24) and a config."""
    folder = make_world(tmp_path_factory.mktemp("bad_input"))
    model_folder(folder / "llm", width=32, seed=1)
    model_folder(folder / "backbone", width=24, seed=2)
    (folder / "tiny.py").write_text(CONFIG.format(folder=folder, steps=1))
    return folder


@pytest.fixture
def said(world, tmp_path, capsys):
    """said(command, flags, *facts): the command refuses the flags in one sentence, which states the facts."""

    def said(command, flags, *facts):
        argv = [command, f"--config={world}/tiny.py", f"--workdir={tmp_path}/run", *flags]
        with pytest.raises(SystemExit) as left:
            cli.run(COMMANDS[command], argv, several=True)
        out, err = capsys.readouterr()
        assert left.value.code == 2 and "Traceback" not in out + err
        [sentence] = [line for line in err.splitlines() if line.startswith("error: ")]
        assert err.endswith(f"{sentence}\n") and sentence.endswith(".")
        states(sentence, *facts)

    return said


def of_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def without_a_shard(folder):
    names = list(load_file(folder / "model.safetensors"))
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


MODELS = {  # what is done to a model's folder: what is said of it beside its path
    "model_type": (
        lambda f: of_config(f, model_type="bert"),
        ["model_type 'bert'", "gpt2, llama"],
    ),
    "layers": (
        lambda f: of_config(f, n_layer=3),
        ["lacks h.2.ln_1.weight", "12 keys missing"],
    ),
    "width": (lambda f: of_config(f, n_embd=8), ["has shape", "config.json asks for"]),
    "shard": (
        without_a_shard,
        ["model-00002-of-00002.safetensors is not there", "model.safetensors.index.json"],
    ),
    "weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights", "model.safetensors"]),
}


@pytest.mark.parametrize("flags", [[], MESH], ids=["pmap", "mesh"])
@pytest.mark.parametrize("mistake", MODELS)
@pytest.mark.parametrize(("command", "model"), [("train", "llm"), ("train", "backbone"), ("evaluate", "llm")])
def test_a_model_that_cannot_be_read(command, model, mistake, flags, world, tmp_path, said):
    change, facts = MODELS[mistake]
    folder = tmp_path / model
    shutil.copytree(world / model, folder)
    change(folder)
    field = {"llm": "llm.path", "backbone": "prefix.backbone"}[model]
    said(command, [f"--config.{field}={folder}", *flags], re.compile(re.escape(str(folder))), *facts)


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--config.mesh.tensor=4"], ["mesh.tensor=4", "2 heads"]),
        (["--config.mesh.data=3"], ["mesh.data=3 x mesh.fsdp=-1 x mesh.tensor=1", "8 devices"]),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_mesh_that_does_not_divide(command, flags, facts, said):
    said(command, [*MESH, *flags], *facts)


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (
            [*MESH, "--config.train.batch_size=12"],
            ["train.batch_size=12", "mesh.data=1 x mesh.fsdp=8", "multiple of 8"],
        ),
        (["--config.train.batch_size=12"], ["train.batch_size=12", "8 devices", "multiple of 8"]),
        (
            ["--config.prefix.projection=identity"],
            ['prefix.projection="identity"', 24, 32, '"tanh"', '"linear"'],
        ),
        (["--config.prefix.length=95"], ["96 tokens", "no room", "prefix.length = 95"]),
        (["--config.data.max_text_tokens=600"], ["data.max_text_tokens = 600", 96, "prefix.length = 4"]),
    ],
)
def test_what_cannot_be_trained(flags, facts, said):
    said("train", flags, *facts)


def soft_prompt(world, folder, shape):
    save_file({"vectors": np.ones(shape, np.float32)}, folder / "soft_prompt.safetensors")


def distiller(world, folder, shape):
    """As `export` writes one whose vectors are as wide as its backbone."""
    shutil.copytree(world / "backbone", folder, dirs_exist_ok=True)
    settings = {"projection": "identity", "llm_width": shape[1], "separator": " "}
    (folder / "distiller_config.json").write_text(json.dumps(settings))
    save_file({"placeholders": np.ones(shape, np.float32)}, folder / "distiller.safetensors")


@pytest.mark.parametrize("flags", [[], MESH], ids=["pmap", "mesh"])
@pytest.mark.parametrize(
    ("make", "shape", "facts"),
    [
        (distiller, (4, 24), ["width 24", 32]),
        (soft_prompt, (4, 24), ["width 24", 32]),
        (soft_prompt, (100, 32), ["103 positions", "100 of them the prefix", "at most 96"]),
    ],
)
def test_what_was_trained_for_another_llm(make, shape, facts, flags, world, tmp_path, said):
    (tmp_path / "trained").mkdir()
    make(world, tmp_path / "trained", shape)
    said("evaluate", [f"--config.evaluate.methods=mine={tmp_path}/trained", *flags], *facts)


@pytest.mark.parametrize("flags", [[], MESH], ids=["pmap", "mesh"])
def test_an_item_beyond_the_window(flags, world, tmp_path, said):
    shutil.copytree(world / "metaicl", tmp_path / "tasks")
    path = tmp_path / "tasks" / "data" / "t" / "t_4_13_test.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    row["options"].append(words(0, 120))
    path.write_text(json.dumps(row) + "\n")
    argv = [f"--config.data.tasks={tmp_path}/tasks", "--config.evaluate.methods=zero_shot", *flags]
    said("evaluate", argv, "t, seed 13, test", "longest option", re.compile(r"\d+ positions"), "at most 96")
    argv = ["--config.data.max_demo_tokens=2", "--config.evaluate.methods=icl", *flags]
    said("evaluate", argv, "No demonstration", "t, seed 13", "2 tokens", "data.max_demo_tokens")
