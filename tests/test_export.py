"""Out to PyTorch and back: the exported folder, LLMs, soft prompts, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from facts import says, states
from safetensors.numpy import load_file

import mend_jax
from configs import base
from mend_jax.export import main as export_command
from mend_jax.interchange import export, trained
from mend_jax.models import weights
from mend_jax.prefixes import kind_of, release
from mend_jax.run import checkpoint, saved_config

ROOT = Path(__file__).parents[1]
ROWS = [[5, 9, 2, 33], [7] * 31, [60], list(range(2, 22))]  # demonstrations of different lengths
PAIRS = [("w1 w2 w3", "w9"), ("w4 w5", "w8")]


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return mend_jax.load_llm(tiny_llm)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, llm, tiny_llm, tiny_backbone):
    return make_workdir(tmp_path_factory.mktemp("finetune"), llm, tiny_llm, tiny_backbone)


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "mend"
    said = export.export(workdir, out)
    assert str(out) in said and "release" in said
    return out


def make_config(tiny_llm, tiny_backbone, **fields):
    config = base.get_config()
    config.llm.path, config.prefix.backbone, config.prefix.length = str(tiny_llm), str(tiny_backbone), 6
    config.data.tasks, config.data.text = "/home/someone/MetaICL", "/home/someone/c4"
    config.update_from_flattened_dict(fields)
    return config


def make_workdir(folder, llm, tiny_llm, tiny_backbone, params=None, **fields):
    """A workdir as training leaves it: the better checkpoint is the earlier one."""
    config = make_config(tiny_llm, tiny_backbone, **fields)
    if params is None:
        params = kind_of(config).init(config, llm, seed=3).split_params()[0]
    params = jax.tree.map(lambda a: np.asarray(a) + 0.05 * np.random.randn(*a.shape).astype(np.float32), params)
    folder.mkdir(exist_ok=True)
    saved_config.write_config(folder, config)
    checkpoints = checkpoint.Checkpoints(folder, maximize=True)
    checkpoints.save(20, params, {"m": np.zeros(1)}, {}, score=0.8)
    checkpoints.save(40, jax.tree.map(np.zeros_like, params), {"m": np.zeros(1)}, {}, score=0.7)
    checkpoints.close()
    lines = [
        {"step": 20, "loss": 1.25, "learning_rate": 1e-5},
        {"step": 20, "dev_score": 0.8},
        {"step": 40, "loss": 9.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def same_vectors(one, other, demos=ROWS, tolerance=1e-6):
    a, b = one.distill(demos), other.distill(demos)
    return a.embeds.shape == b.embeds.shape and np.abs(a.embeds - b.embeds).max() <= tolerance


# The release's layout


def test_the_release_has_no_linear_projection(golden, tmp_path, llm, tiny_llm, tiny_backbone, workdir):
    folder = make_workdir(tmp_path / "linear", llm, tiny_llm, tiny_backbone, **{"prefix.projection": "linear"})
    said = export.export(folder, tmp_path / "out")
    assert "linear" in said and not (tmp_path / "out" / "release").exists()
    assert same_vectors(trained.read_distiller(folder), trained.read_distiller(tmp_path / "out"))


def test_without_pytorch_the_safetensors_are_written(workdir, tmp_path):
    """And everything else: on a machine where PyTorch is not installed, in a process of its own."""
    program = f"""if True:
        from importlib.machinery import PathFinder
        find = PathFinder.find_spec
        PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
        from mend_jax.interchange import export
        from mend_jax.interchange import trained
        print(export.export({str(workdir)!r}, {str(tmp_path / "out")!r}))
        print(trained.read_distiller({str(tmp_path / "out")!r}).distill({PAIRS!r}).embeds.shape)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install torch" in done.stdout and "(1, 6, 32)" in done.stdout
    assert [path.name for path in (tmp_path / "out" / "release").iterdir()] == ["distiller.safetensors"]


# The exported folder


def test_load_distiller_reads_every_format_back(workdir, exported, llm, tiny_backbone):
    pytest.importorskip("torch")
    trained = mend_jax.load_distiller(workdir, llm)
    assert trained.num_vectors == 6 and trained.projection == "tanh"
    assert same_vectors(trained, mend_jax.load_distiller(exported, llm))
    assert same_vectors(trained, mend_jax.load_distiller(exported, llm), PAIRS)  # the tokenizer came along
    for suffix in (".safetensors", ".bin"):
        path = exported / "release" / f"distiller{suffix}"
        assert same_vectors(trained, mend_jax.load_distiller(path, llm, backbone=tiny_backbone))
        assert same_vectors(trained, mend_jax.load_distiller(path, llm, backbone=exported))


def test_the_template_of_the_training_stays_with_the_distiller(llm, tiny_llm, tiny_backbone, tmp_path):
    folder = make_workdir(tmp_path / "run", llm, tiny_llm, tiny_backbone, **{"data.template": "newline"})
    export.export(folder, tmp_path / "out")
    assert {trained.read_distiller(place).separator for place in (folder, tmp_path / "out")} == {"\n"}
    assert "a newline before every x and y" in (tmp_path / "out" / "README.md").read_text()


def test_the_best_checkpoint_is_exported(workdir, exported):
    kept = checkpoint.load_best(workdir)[0]["placeholders"]
    assert np.any(kept) and np.array_equal(load_file(exported / "distiller.safetensors")["placeholders"], kept)


@pytest.mark.parametrize("projection", ["tanh", "linear", "identity"])
@pytest.mark.slow
def test_pytorch_computes_the_same_vectors(projection, llm, tiny_llm, tiny_backbone, tmp_path):
    """A batch of different lengths, in a process that cannot import anything of ours."""
    pytest.importorskip("torch")
    backbone = tiny_llm if projection == "identity" else tiny_backbone
    folder = make_workdir(tmp_path / "run", llm, tiny_llm, backbone, **{"prefix.projection": projection})
    out = tmp_path / "out"
    export.export(folder, out)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(out, tmp_path / "elsewhere" / "it")
    program = """if True:
        import json, sys
        sys.modules["mend_jax"] = sys.modules["jax"] = None
        sys.path.insert(0, "it")
        import numpy, torch
        from mend_distiller import MendDistiller
        distiller = MendDistiller.from_pretrained("it")
        rows, pairs = json.loads(sys.argv[1])
        vectors = {"rows": distiller.distill(rows), "one": distiller.distill(rows[1]), "pairs": distiller.distill(pairs)}
        numpy.savez("vectors.npz", **vectors)
        try:
            distiller.distill([2] * 1000)
        except ValueError as error:
            print(error)
    """
    command = [sys.executable, "-c", program, json.dumps([ROWS, PAIRS])]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reads at most" in done.stdout
    theirs, ours = np.load(tmp_path / "elsewhere" / "vectors.npz"), trained.read_distiller(folder)
    for name, demos in (("rows", ROWS), ("one", ROWS[1]), ("pairs", PAIRS)):
        assert np.abs(theirs[name] - np.asarray(ours.distill(demos).embeds)).max() < 1e-5, name
    assert theirs["rows"].shape == (4, 6, 32)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"prefix.kind": "chunked", "prefix.chunk_demos": 1, "prefix.chunk_tokens": 9}])
def test_pytorch_cuts_inputs_and_leaves_out_demonstrations_as_we_do(fields, llm, tiny_llm, tiny_backbone, tmp_path):
    pytest.importorskip("torch")
    from mend_jax.prefixes.mend_distiller import MendDistiller

    run = make_workdir(tmp_path / "run", llm, tiny_llm, tiny_backbone, **{"data.max_input_tokens": 3} | fields)
    export.export(run, tmp_path / "out")
    ours, theirs = trained.read_trained(tmp_path / "out"), MendDistiller.from_pretrained(tmp_path / "out")
    long, short = ("w1 w2 w3 w4 w5 w6", "w7"), ("w1 w2", "w8")
    wanted = ours.distill([long, short]).embeds
    for no_pairs in (["w1", "w2"], "w1 w2", [("w1", "w2"), "w3"], [{"input": "w1", "output": "w2"}], {"w1": "w2"}):
        with pytest.raises(ValueError, match=r"list of \(input, output\) pairs"):
            theirs.distill(no_pairs)
    np.testing.assert_allclose(theirs.distill([long, short]), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(theirs.distill([("w1 w2 w3 w9", "w7"), short]), wanted, rtol=1e-4, atol=1e-5)
    if fields:
        too_long = ("w1", "w2 " * 12)
        with pytest.warns(UserWarning, match="demonstration 2 .* left out"):
            found = theirs.distill([long, too_long, short])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours.distill([long, too_long, short]).embeds, wanted, rtol=1e-5, atol=1e-6)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="as short as a chunk"):
            theirs.distill([too_long])


@pytest.mark.parametrize("embeddings", ["trained", "llm"])
@pytest.mark.parametrize("weights_", ["int8", "bfloat16"])
@pytest.mark.slow
def test_weights_of_fewer_bits(weights_, embeddings, llm, tiny_llm, tiny_backbone, tmp_path):
    """They are read back, here and in PyTorch, as what was written: each within half a step of its row's scale."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from mend_jax.prefixes.mend_distiller import MendDistiller

    own = embeddings == "llm"
    fields = {"prefix.train_embeddings": False} if own else {}
    run = make_workdir(tmp_path / "run", llm, tiny_llm, tiny_llm if own else tiny_backbone, **fields)
    export.export(run, tmp_path / "out", weights=weights_, llm="tiny")
    assert trained.own_llm(tmp_path / "out") == "tiny" and "tiny" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "model.safetensors").exists() == (weights_ == "bfloat16")
    assert (tmp_path / "out" / "tokenizer.json").exists() is not own
    made, found = mend_jax.load_distiller(run, llm), mend_jax.load_distiller(tmp_path / "out", llm)
    step = {"int8": 1 / 254, "bfloat16": 1 / 256}[weights_]
    for a, b in zip(*(jax.tree.leaves(d.params["backbone"]["layers"]) for d in (made, found)), strict=True):
        assert np.abs(a - b).max() <= 1.01 * step * np.abs(a).max()
    assert not same_vectors(made, found) and same_vectors(made, found, tolerance=0.1)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32) if own else None
    module = MendDistiller.from_pretrained(tmp_path / "out", llm=theirs)
    for row in ROWS:
        np.testing.assert_allclose(module.distill(row).numpy(), found.distill(row).embeds, rtol=1e-4, atol=1e-5)


def test_only_a_distiller_has_weights_of_fewer_bits(llm, tiny_llm, tiny_backbone, tmp_path):
    soft = make_workdir(tmp_path / "soft", llm, tiny_llm, tiny_backbone, **{"prefix.kind": "soft_prompt"})
    with says("--weights=int8", "soft prompt"):
        export.export(soft, tmp_path / "out", weights="int8")
    assert not (tmp_path / "out").exists()


def test_vectors_that_pytorch_makes_are_read_by_the_pytorch_llm_as_by_ours(exported, llm, tiny_llm):
    """The card's example: vectors in front of a query, through transformers, against score_options."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    distiller = mend_jax.load_distiller(exported, llm)
    query, option = [3, 4, 5], [17, 40]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny_llm)
        vectors = torch.from_numpy(np.array(distiller.distill(ROWS[0]).embeds))
        embeds = torch.cat([vectors, model.get_input_embeddings()(torch.tensor([query + option]))], 1)
        log_probs = model(inputs_embeds=embeds).logits[0].log_softmax(-1)
    theirs = np.mean([log_probs[6 + 2, 17], log_probs[6 + 3, 40]])
    assert mend_jax.score_options(llm, distiller.distill(ROWS[0]), query, [option])[0] == pytest.approx(
        theirs, abs=1e-5
    )


def test_the_backbone_is_an_ordinary_hugging_face_model(exported, workdir):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    backbone, info = AutoModel.from_pretrained(exported, output_loading_info=True)
    assert type(backbone).__name__ == "GPT2Model" and not info["missing_keys"] and not info["unexpected_keys"]
    trained = checkpoint.load_best(workdir)[0]["backbone"]["embed"]["tokens"]
    assert torch.equal(backbone.wte.weight, torch.from_numpy(trained))
    assert AutoTokenizer.from_pretrained(exported)("w3 w4").input_ids == [5, 6]


def test_the_card_tells_what_it_was_trained_on_and_keeps_paths_private(exported, workdir):
    card = (exported / "README.md").read_text()
    for fact in ("class_to_class", "MetaICL", "6 vectors", "width 24", "finetune", "step 20 of", "dev_score", "0.8000"):
        assert fact in card
    assert "9.0000" not in card and "/home" not in card and str(workdir) not in card and "{" not in card
    assert card.startswith("---\n")


# LLMs and soft prompts


def test_an_llm_is_exported_with_the_same_logits(llm, tiny_llm, tiny_backbone, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_workdir(tmp_path / "lm", llm, tiny_llm, tiny_backbone, llm.params, stage="lm")
    assert "LLM" in export.export(folder, tmp_path / "out")
    ids = np.asarray([ROWS[3]])
    params = checkpoint.load_best(folder)[0]
    query = mend_jax.Query(ids, np.asarray([20]), np.asarray([0]))
    ours = llm.logits(params, llm.states(params, mend_jax.no_prefix(1, 32), query))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.from_numpy(ids)).logits
    assert np.abs(np.asarray(ours) - theirs.numpy()).max() < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3").input_ids == [5]
    again = mend_jax.load_llm(tmp_path / "out")
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, params))
    with says(folder, "stage lm"):
        trained.read_distiller(folder)


def test_an_llm_cut_from_a_larger_one_is_exported(llm, tiny_llm, tiny_backbone, tmp_path):
    """As the small world's backbone is: llm.layers of the layers that llm.path has."""
    one = llm.params | {"layers": jax.tree.map(lambda a: a[:1], llm.params["layers"])}
    folder = make_workdir(tmp_path / "lm", llm, tiny_llm, tiny_backbone, one, **{"stage": "lm", "llm.layers": 1})
    export.export(folder, tmp_path / "out")
    again = mend_jax.load_llm(tmp_path / "out")
    assert again.config.layers == 1 < llm.config.layers
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, checkpoint.load_best(folder)[0]))


def test_an_llm_of_another_shape_is_refused(llm, tiny_llm, tiny_backbone, tmp_path):
    folder = make_workdir(tmp_path / "lm", llm, tiny_llm, tiny_backbone, llm.params, stage="lm")
    with says(folder, tiny_backbone, "embed/positions", "[96, 32]", "not [[80, 24]"):
        export.export(folder, tmp_path / "out", tiny_backbone)
    assert not (tmp_path / "out").exists()


def test_a_soft_prompt_is_exported(llm, tiny_llm, tiny_backbone, tmp_path):
    folder = make_workdir(tmp_path / "prompt", llm, tiny_llm, tiny_backbone, **{"prefix.kind": "soft_prompt"})
    assert "6 vectors" in export.export(folder, tmp_path / "out")
    for place in (folder, tmp_path / "out"):
        assert trained.read_trained(place).llm_width == 32
        with says(place, "soft prompt"):
            trained.read_distiller(place)
    assert np.array_equal(
        load_file(tmp_path / "out" / "soft_prompt.safetensors")["vectors"], checkpoint.load_best(folder)[0]["vectors"]
    )
    assert "6 learned vectors" in (tmp_path / "out" / "README.md").read_text()


# What is exported is exported again


@pytest.mark.parametrize(
    "fields",
    [{}, {"prefix.train_embeddings": False}, {"prefix.kind": "chunked"}],
    ids=["its own embeddings", "the LLM's", "chunked"],
)
@pytest.mark.parametrize("weights_", ["float32", "bfloat16"])
def test_an_exported_folder_is_written_in_other_weights(fields, weights_, llm, tiny_llm, tiny_backbone, tmp_path):
    """Its card says the same of the training, and the LLM keeps its name."""
    backbone = tiny_llm if "prefix.train_embeddings" in fields else tiny_backbone
    run = make_workdir(tmp_path / "run", llm, tiny_llm, backbone, **fields)
    export.export(run, tmp_path / "first", weights="int8", llm="someone/tiny")
    said = export.export(tmp_path / "first", tmp_path / "again", weights=weights_)
    assert str(tmp_path / "first") in said and str(tmp_path / "again") in said
    first, again = (mend_jax.load_prefix(tmp_path / name, llm) for name in ("first", "again"))
    demos = ROWS[0] if fields.get("prefix.kind") is None else [ROWS[0]]
    assert same_vectors(first, again, demos, 1e-6 if weights_ == "float32" else 0.1)
    assert first.settings() == again.settings() and trained.own_llm(tmp_path / "again") == "someone/tiny"
    cards = [(tmp_path / name / "README.md").read_text() for name in ("first", "again")]
    training = [card.partition("## Training")[2] for card in cards]
    assert training[0] == training[1] and "dev_score" in training[0] and "(someone/tiny)" in cards[1]
    assert "model.int8.safetensors" not in {path.name for path in (tmp_path / "again").iterdir()}
    with says(tmp_path / "first", "--backbone=b"):
        export.export(tmp_path / "first", tmp_path / "other", "b")


def test_the_releases_file_becomes_a_folder(workdir, exported, llm, tmp_path):
    file = exported / "release" / "distiller.safetensors"
    with says(file, "mend_jax.export", "--backbone=FOLDER"):
        export.export(file, tmp_path / "out")
    export.export(file, tmp_path / "out", exported)
    assert same_vectors(mend_jax.load_distiller(tmp_path / "out", llm), mend_jax.load_distiller(workdir, llm))
    assert "## Training" not in (tmp_path / "out" / "README.md").read_text()


# Mistakes


def test_an_existing_folder_is_never_written_into(workdir, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with says(tmp_path, "already"):
        export.export(workdir, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_an_existing_folder_is_refused_before_a_word_and_not_to_be_removed(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(mend_jax.UserError) as error:
        export_command(out=str(tmp_path), llm="model.gguf")
    states(str(error.value), tmp_path, "there already", "another folder")
    assert "remove" not in str(error.value) and capsys.readouterr() == ("", "")


def test_a_full_disk_leaves_nothing(workdir, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with says(tmp_path / "out", "No space left on device"):
        export.export(workdir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kilobytes", [4, 40])
def test_a_file_that_cannot_grow_is_one_sentence(workdir, tmp_path, kilobytes):
    """The operating system's own refusal, which safetensors and PyTorch report in their own ways."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    _, model, _ = trained.read_workdir(workdir, None)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            release.write_release(model, tmp_path / "big.safetensors")
        with says(tmp_path / "out", "File too large"):
            export.export(workdir, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path.name for path in tmp_path.iterdir() if path.name != "big.safetensors"]


def test_pytorchs_error_for_a_full_disk_is_an_oserror(workdir, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")

    def full(*_args, **_kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0\nmore")

    monkeypatch.setattr(torch, "save", full)
    with says(tmp_path / "out", "unexpected pos 64 vs 0"):
        export.export(workdir, tmp_path / "out")


def test_a_backbone_that_has_moved_is_named_and_can_be_given(llm, tiny_llm, tiny_backbone, tmp_path):
    moved = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, moved)
    folder = make_workdir(tmp_path / "run", llm, tiny_llm, moved)
    shutil.rmtree(moved)
    with says(folder, moved, "--backbone=FOLDER"):
        export.export(folder, tmp_path / "out")
    with says(folder, moved, "mend_jax.export", "--backbone=FOLDER"):
        mend_jax.load_distiller(folder, llm)  # as `evaluate` does, which has no such flag
    export.export(folder, tmp_path / "out", tiny_backbone)
    assert mend_jax.load_distiller(tmp_path / "out", llm).num_vectors == 6
    with says(folder, tiny_llm, "embed/positions", "[80, 24]", "not [[96, 32]"):
        export.export(folder, tmp_path / "other", tiny_llm)


def test_a_distiller_for_another_llm_is_refused(exported, tiny_backbone):
    with says("width 32", 24):
        mend_jax.load_distiller(exported, mend_jax.load_llm(tiny_backbone))


def test_wrong_paths(tmp_path, llm, exported, golden):
    for path, named in (
        (tmp_path / "nothing", "exported folder"),
        (tmp_path, "config.json"),
        (golden / "gpt2" / "distiller_official.safetensors", "backbone"),
    ):
        with says(path, named):
            mend_jax.load_distiller(path, llm)
    with says(Path(__file__), ".safetensors", ".bin"):
        mend_jax.load_distiller(Path(__file__), llm, backbone=exported)
    with says(tmp_path / "nothing", "folder"):
        export.export(tmp_path / "nothing", tmp_path / "out")


def test_a_damaged_export_is_named(exported, llm, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "distiller.safetensors").write_bytes((exported / "distiller.safetensors").read_bytes()[:-7])
    with says(copy / "distiller.safetensors"):
        mend_jax.load_distiller(copy, llm)
    shutil.copyfile(exported / "distiller.safetensors", copy / "distiller.safetensors")
    (copy / "distiller_config.json").write_text('{"projection": "tanh"')
    with says(copy / "distiller_config.json"):
        mend_jax.load_distiller(copy, llm)


def test_a_bin_that_is_no_weights_is_refused(tmp_path, llm, exported):
    torch = pytest.importorskip("torch")
    torch.save({"hypernet.wte.weight": Path("a pickled object")}, tmp_path / "bad.bin")
    with says(tmp_path / "bad.bin"):
        mend_jax.load_distiller(tmp_path / "bad.bin", llm, backbone=exported)


@pytest.mark.slow
def test_the_command(workdir, tmp_path):
    command = [sys.executable, "-m", "mend_jax.export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "mend_distiller.py" in done.stdout, done.stderr
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "already" in done.stderr and "Traceback" not in done.stderr
