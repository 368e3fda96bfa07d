"""How a distiller begins: with so many layers of its backbone, and with vectors as large as the LLM's embeddings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_t5
from data_files import make_world, tiny_config
from facts import says
from family_rows import COMMON, ROWS, save_random, tokens
from safetensors import safe_open
from tiny_training import RandomBatches, config, model_folder

from mend_jax import train
from mend_jax.interchange.export import export
from mend_jax.interchange.trained import load_distiller, read_distiller, read_trained
from mend_jax.llm.decoder_only import load_llm
from mend_jax.models import weights
from mend_jax.models.folders import load_model
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.embeddings import without_tokens
from mend_jax.prefixes.start import TANH_RMS, embeddings_rms
from mend_jax.run import build, checkpoint, reporting, saved_config, sharding

T5 = test_t5.COMMON | {"model_type": "t5"} | test_t5.V1
FAMILIES = {name: COMMON | ROWS[name] for name in ("gpt2", "opt-350m", "tinyllama", "gemma3") if name in ROWS} | {
    "t5": T5
}


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.mark.parametrize(
    ("family", "projection"),
    [
        *(("gpt2", projection) for projection in ("identity", "linear", "tanh")),
        ("opt-350m", "identity"), ("tinyllama", "tanh"), ("gemma3", "identity"), ("t5", "linear"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_the_first_vectors_are_as_large_as_embeddings(family, projection, tmp_path):
    folder = save_random(tmp_path / "llm", FAMILIES[family], 0)
    llm, fields = load_llm(folder), {"prefix.backbone": folder, "prefix.projection": projection}
    context = tokens(48).tolist()
    usual = rms(Distiller.init(config(folder, **fields, **{"prefix.rms": 0.0}), llm, 0).distill(context).embeds)
    wanted = min(embeddings_rms(llm), TANH_RMS if projection == "tanh" else np.inf)
    found = rms(Distiller.init(config(folder, **fields), llm, 0).distill(context).embeds)
    assert found == pytest.approx(wanted, rel=0.1) and abs(usual / wanted - 1) > 0.1
    given = rms(Distiller.init(config(folder, **fields, **{"prefix.rms": 0.3}), llm, 0).distill(context).embeds)
    assert given == pytest.approx(0.3, rel=0.1)


def test_the_rms_of_all_embeddings_is_that_of_the_sample(tmp_path):
    llm = load_llm(save_random(tmp_path / "llm", FAMILIES["gpt2"], 0))
    assert embeddings_rms(llm) == pytest.approx(rms(llm.params["embed"]["tokens"]), rel=0.03)


def test_a_tanh_that_cannot_is_said(tmp_path, caplog):
    folder = save_random(tmp_path / "llm", FAMILIES["gpt2"], 0)
    llm = load_llm(folder)
    made = Distiller.init(config(folder, **{"prefix.projection": "tanh", "prefix.rms": 2.0}), llm, 0)
    assert rms(made.distill(tokens(48).tolist()).embeds) == pytest.approx(TANH_RMS, rel=0.1)
    assert "RMS 2" in caplog.text and 'prefix.projection="linear"' in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_the_first_layers_are_those_of_the_backbone(family, tmp_path):
    folder = save_random(tmp_path / "llm", FAMILIES[family], 0)
    llm = load_llm(folder)
    c = config(folder, **{"prefix.layers": 1, "prefix.rms": 0.0})
    whole, cut = (
        Distiller.init(config(folder, **{"prefix.rms": 0.0}) if full else c, llm, 0) for full in (True, False)
    )
    assert cut.config.layers == 1 < whole.config.layers
    cut_leaves = dict(jax.tree.leaves_with_path(cut.params))
    for path, leaf in jax.tree.leaves_with_path(whole.params):
        stacked = any(getattr(key, "key", "") == "layers" for key in path)
        np.testing.assert_array_equal(cut_leaves[path], leaf[:1] if stacked else leaf)
    assert not np.allclose(cut.distill([1, 2, 3]).embeds, whole.distill([1, 2, 3]).embeds)


@pytest.fixture
def numbers_read(monkeypatch):
    """How many numbers each read of a .safetensors file gave."""
    sizes, getitem = [], weights._SafeTensor.__getitem__

    def counted(tensor, index):
        part = getitem(tensor, index)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(weights._SafeTensor, "__getitem__", counted)
    return sizes


def placer():
    return sharding.placer(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "t5"])
def test_of_the_backbone_the_first_layers_alone_are_read(family, split, numbers_read, tmp_path):
    """In float32 the LLM's own token table serves both; in bfloat16 it may be rounded, and the file's is read."""
    folder, place = save_random(tmp_path / "llm", FAMILIES[family], 0), placer() if split else None
    c, whole = config(folder, **{"prefix.layers": 1, "prefix.rms": 0.0}), load_model(folder)
    values = dict(jax.tree.leaves_with_path(whole.params))
    for dtype, trained in (("float32", False), ("float32", True), ("bfloat16", False)):
        c.prefix.train_embeddings, llm = trained, load_llm(folder, dtype, place=place)
        numbers_read.clear()
        backbone = Distiller.init(c, llm, 0, place).params["backbone"]
        table, read = backbone["embed"]["tokens"], sum(numbers_read)
        shared = table is llm.params["embed"]["tokens"]
        assert shared == (dtype == "float32" and not trained)
        assert read + shared * table.size == sum(leaf.size for leaf in jax.tree.leaves(backbone)) < whole_size(whole)
        for path, leaf in jax.tree.leaves_with_path(backbone):
            stacked = any(getattr(key, "key", "") == "layers" for key in path)
            np.testing.assert_array_equal(leaf, values[path][:1] if stacked else values[path])


def whole_size(model):
    return sum(leaf.size for leaf in jax.tree.leaves(model.params))


def test_more_layers_than_there_are(tmp_path):
    folder = model_folder(tmp_path / "llm")
    with says("prefix.layers", 3, "2 layers", folder):
        train.train(config(folder, **{"prefix.layers": 3}), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a refused run leaves no folder"


@pytest.mark.slow
def test_a_run_with_fewer_layers_resumes_is_read_and_exported(tmp_path, monkeypatch, caplog):
    folder = model_folder(tmp_path / "llm")
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    fields = {"prefix.layers": 1, "train.eval_every": 2, "train.save_every": 2, "train.steps": 4}
    assert train.train(config(folder, **fields), tmp_path / "run") == 0
    kept = saved_config.read_config(tmp_path / "run")["prefix"]
    assert kept["rms"] == embeddings_rms(load_llm(folder)) and kept["layers"] == 1
    found = read_distiller(tmp_path / "run")
    assert found.config.layers == 1 and "has not ended" not in caplog.text
    export(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_layer"] == 1
    again = read_distiller(tmp_path / "out")
    np.testing.assert_array_equal(again.distill([1, 2, 3]).embeds, found.distill([1, 2, 3]).embeds)
    with says("prefix.layers", 1, 2):
        train.train(config(folder, **fields | {"prefix.layers": 2, "train.steps": 6}), tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    saved["train"]["steps"] = 9
    del saved["checksum"]  # else it would say that the file has changed
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    read_distiller(tmp_path / "run")
    assert "step 4 of 9" in caplog.text


def test_what_was_measured_is_kept_where_a_run_goes_on(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "llm")
    llm, c = load_llm(folder), config(folder)
    first = build.measured(c, llm, tmp_path / "run")
    assert c.prefix.rms == -1 and first.prefix.rms == embeddings_rms(llm)
    for saved, wanted in (({"rms": 0.25}, 0.25), ({}, 0.0)):  # one of before the field was there began without
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.json").write_text(json.dumps(c.to_dict() | {"prefix": saved}))
        assert build.measured(c, llm, tmp_path / "run").prefix.rms == first.prefix.rms  # it begins anew: no checkpoint
        with monkeypatch.context() as patch:
            patch.setattr(build.saved_steps, "has_checkpoint", lambda workdir: True)
            assert build.measured(c, llm, tmp_path / "run").prefix.rms == wanted


LEFT = ("wte.weight", "embed_tokens.weight", "shared.weight")  # token embeddings, in PyTorch's names
FROZEN = {"prefix.train_embeddings": False, "train.eval_every": 2, "train.save_every": 2, "train.steps": 4}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """family -> (its folder, the workdir of a run with FROZEN)."""
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = save_random(folder / "llm", FAMILIES[family], 0), folder / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(build, "make_batches", RandomBatches)
                assert train.train(config(made[family][0], **FROZEN), made[family][1]) == 0
        return made[family]

    return of


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "t5"])
@pytest.mark.slow
def test_embeddings_that_are_not_trained_are_left_to_the_llm(family, frozen, tmp_path):
    folder, run = frozen(family)
    params, meta = checkpoint.load_best(run)
    assert "tokens" not in params["backbone"].get("embed", {}) and not [n for n in meta["shapes"] if "tokens" in n]
    found, llm = read_distiller(run), load_llm(folder)
    np.testing.assert_array_equal(found.params["backbone"]["embed"]["tokens"], llm.params["embed"]["tokens"])
    export(run, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        names = list(file.keys())
    assert not [name for name in names if name.endswith(LEFT)]
    again, context = load_distiller(tmp_path / "out", llm), [5, 3, 9, 2]
    wanted = found.distill(context).embeds
    np.testing.assert_array_equal(again.distill(context).embeds, wanted)
    _in_pytorch(tmp_path / "out", folder, context, wanted)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.slow
def test_a_run_is_read_with_the_token_table_alone_where_each_part_lies(family, frozen, numbers_read):
    folder, run = frozen(family)
    numbers_read.clear()
    tokens = read_trained(run, place=placer()).params["backbone"]["embed"]["tokens"]
    assert sum(numbers_read) == tokens.size and tokens.addressable_shards[0].data.size * 4 == tokens.size
    np.testing.assert_array_equal(tokens, load_llm(folder).params["embed"]["tokens"])


def _in_pytorch(out, folder, context, wanted):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from mend_jax.prefixes.mend_distiller import MendDistiller

    with pytest.raises(ValueError, match="llm=model"):
        MendDistiller.from_pretrained(out)
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(folder).is_encoder_decoder else AutoModelForCausalLM
    theirs = MendDistiller.from_pretrained(out, llm=kind.from_pretrained(folder, dtype=torch.float32))
    np.testing.assert_allclose(theirs.distill(context).numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_frozen_embeddings_train_the_rest_as_with_a_table_of_gradient_0(tmp_path, monkeypatch):
    """The first step's loss and the others' gradients do not depend on whether the table is trained."""
    folder = model_folder(tmp_path / "llm")
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    runs = {frozen: tmp_path / f"run{frozen}" for frozen in (False, True)}
    for frozen, run in runs.items():
        # A clip that is never reached, and one step: AdamW's first moment is then 0.1 times the gradient of each parameter.
        fields = {"train.steps": 1, "optimizer.clip": 1e9, "prefix.train_embeddings": not frozen}
        assert train.train(config(folder, **fields), run) == 0
    saved = {frozen: checkpoint.load_best(run)[0] for frozen, run in runs.items()}
    shared = without_tokens(saved[False]["backbone"])[0]
    jax.tree.map(np.testing.assert_array_equal, saved[True], {**saved[False], "backbone": shared})


@pytest.mark.slow
def test_finetuning_with_a_frozen_table_has_the_scores_of_a_trained_one(tiny_llm, tmp_path):
    """On several devices, at a learning rate of 0. (By hand it was tried with pmap too.)"""
    c = tiny_config(make_world(tmp_path / "world"), "finetune", cache=str(tmp_path / "cache"), max_demo_tokens=40)
    c.data.demo_buckets, c.data.query_buckets, c.data.max_input_tokens = (40,), (24,), 16
    c.llm.path = c.prefix.backbone = str(tiny_llm)
    c.optimizer.learning_rate, c.loss.chunk, c.train.parallel = 0.0, 16, "mesh"
    c.train.batch_size, c.train.steps, c.train.eval_every = 8, 1, 1
    found = {}
    for trained in (True, False):
        c.prefix.train_embeddings, run = trained, tmp_path / str(trained)
        assert train.train(c, run) == 0
        lines = reporting.read_lines(run / "metrics.jsonl")
        found[trained] = [
            line[name] for name in ("kd", "pred", "dev_score", "recovered") for line in lines if name in line
        ]
    assert len(found[True]) >= 4 and found[False] == found[True]


@pytest.mark.slow
def test_a_frozen_table_of_another_backbone_is_exported(tmp_path, monkeypatch):
    folder, other = model_folder(tmp_path / "llm"), model_folder(tmp_path / "other")
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    assert train.train(config(folder, **FROZEN, **{"prefix.backbone": str(other)}), tmp_path / "run") == 0
    export(tmp_path / "run", tmp_path / "out")
    alone, trained = read_distiller(tmp_path / "out"), read_distiller(tmp_path / "run")
    np.testing.assert_array_equal(alone.distill([1, 2]).embeds, trained.distill([1, 2]).embeds)


@pytest.mark.slow
def test_a_distiller_with_frozen_embeddings_goes_on_and_is_bound_to_its_llm(frozen, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    folder, run = frozen("gpt2")
    later = config(folder, **FROZEN | {"prefix.start_from": str(run), "train.steps": 2})
    assert train.train(later, tmp_path / "next") == 0
    with says("prefix.train_embeddings", "false", "true"):
        later.prefix.train_embeddings = True
        train.train(later, tmp_path / "third")
    export(tmp_path / "next", tmp_path / "out")
    other = load_llm(save_random(tmp_path / "other", FAMILIES["gpt2"] | {"vocab_size": 90}, 0))
    with says("token embeddings", 90):
        load_distiller(tmp_path / "out", other)
