"""Mistakes with models and meshes, at the command line: `train` and `evaluate` say each in one sentence and leave with 2."""

import json
import shutil

import numpy as np
import pytest
from data_files import make_world, words
from safetensors.numpy import load_file, save_file
from test_end_to_end import _model as model_folder
from test_processes import CONFIG

from mend_jax import evaluate, train
from mend_jax.cli import command_line as cli

COMMANDS = {"train": train.train, "evaluate": evaluate.main}
MESH = ["--config.train.parallel=mesh"]
pytestmark = [pytest.mark.usefixtures("compiled_quickly"), pytest.mark.slow]


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
    """said(command, *flags) -> the one sentence that the command says."""

    def said(command, *flags):
        argv = [command, f"--config={world}/tiny.py", f"--workdir={tmp_path}/run", *flags]
        with pytest.raises(SystemExit) as left:
            cli.run(COMMANDS[command], argv, several=True)
        out, err = capsys.readouterr()
        assert left.value.code == 2 and "Traceback" not in out + err
        [sentence] = [line for line in err.splitlines() if line.startswith("error: ")]
        assert err.endswith(f"{sentence}\n") and sentence.endswith(".")
        return sentence

    return said


def of_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def without_a_shard(folder):
    names = list(load_file(folder / "model.safetensors"))
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


MODELS = {  # what is done to a model's folder: what is said of it
    "model_type": (
        lambda f: of_config(f, model_type="bert"),
        "model_type 'bert' is not supported: use one of gpt2, llama,",
    ),
    "layers": (
        lambda f: of_config(f, n_layer=3),
        "lacks h.2.ln_1.weight (12 keys missing): the file is of another model",
    ),
    "width": (lambda f: of_config(f, n_embd=8), "has shape ("),
    "shard": (
        without_a_shard,
        "model-00002-of-00002.safetensors is not there, though model.safetensors.index.json names it",
    ),
    "weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights: model.safetensors or"),
}


@pytest.mark.parametrize("flags", [[], MESH], ids=["pmap", "mesh"])
@pytest.mark.parametrize("mistake", MODELS)
@pytest.mark.parametrize(("command", "model"), [("train", "llm"), ("train", "backbone"), ("evaluate", "llm")])
def test_a_model_that_cannot_be_read(command, model, mistake, flags, world, tmp_path, said):
    change, part = MODELS[mistake]
    folder = tmp_path / model
    shutil.copytree(world / model, folder)
    change(folder)
    field = {"llm": "llm.path", "backbone": "prefix.backbone"}[model]
    sentence = said(command, f"--config.{field}={folder}", *flags)
    assert part in sentence and str(folder) in sentence


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--config.mesh.tensor=4"], "mesh.tensor=4 does not divide the 2 heads of"),
        (["--config.mesh.data=3"], "mesh.data=3 x mesh.fsdp=-1 x mesh.tensor=1 does not fit 8 devices"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_mesh_that_does_not_divide(command, flags, part, said):
    assert part in said(command, *MESH, *flags)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([*MESH, "--config.train.batch_size=12"], "train.batch_size=12 cannot be divided by mesh.data=1 x mesh.fsdp=8"),
        (["--config.train.batch_size=12"], "train.batch_size=12 cannot be divided by 8 devices"),
        (["--config.prefix.projection=identity"], "a backbone as wide as the LLM (32), not 24"),
        (["--config.prefix.length=95"], "window of 96 tokens has no room for a query after prefix.length = 95"),
        (["--config.data.max_text_tokens=600"], "fit the LLM's window of 96 after prefix.length = 4 vectors"),
    ],
)
def test_what_cannot_be_trained(flags, part, said):
    assert part in said("train", *flags)


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
    ("make", "shape", "part"),
    [
        (distiller, (4, 24), "makes vectors of width 24, but the LLM"),
        (soft_prompt, (4, 24), "makes vectors of width 24, but the LLM"),
        (
            soft_prompt,
            (100, 32),
            "needs 103 positions (100 for the prefix), but the LLM reads at most 96: shorten the input, or make the prefix shorter",
        ),
    ],
)
def test_what_was_trained_for_another_llm(make, shape, part, flags, world, tmp_path, said):
    (tmp_path / "trained").mkdir()
    make(world, tmp_path / "trained", shape)
    assert part in said("evaluate", f"--config.evaluate.methods=mine={tmp_path}/trained", *flags)


@pytest.mark.parametrize("flags", [[], MESH], ids=["pmap", "mesh"])
def test_an_item_beyond_the_window(flags, world, tmp_path, said):
    shutil.copytree(world / "metaicl", tmp_path / "tasks")
    path = tmp_path / "tasks" / "data" / "t" / "t_4_13_test.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    row["options"].append(words(0, 120))
    path.write_text(json.dumps(row) + "\n")
    sentence = said("evaluate", f"--config.data.tasks={tmp_path}/tasks", "--config.evaluate.methods=zero_shot", *flags)
    assert (
        "t, seed 13, test: A query with its longest option needs" in sentence
        and "reads at most 96: shorten" in sentence
    )
    sentence = said("evaluate", "--config.data.max_demo_tokens=2", "--config.evaluate.methods=icl", *flags)
    assert "No demonstration of t, seed 13 fits into 2 tokens: raise data.max_demo_tokens" in sentence
