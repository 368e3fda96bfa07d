"""How a distiller begins: with so many layers of its backbone, and with vectors as large as the LLM's embeddings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_t5
from facts import says
from family_rows import COMMON, ROWS, save_random, tokens
from tiny_training import RandomBatches, config, model_folder

from mend_jax import train
from mend_jax.interchange.export import export
from mend_jax.interchange.trained import read_distiller
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.start import TANH_RMS, embeddings_rms
from mend_jax.run import build, checkpoint

T5 = test_t5.COMMON | {"model_type": "t5"} | test_t5.V1
FAMILIES = {name: COMMON | ROWS[name] for name in ("gpt2", "opt-350m", "tinyllama", "gemma3") if name in ROWS} | {
    "t5": T5
}


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.mark.parametrize("projection", ["identity", "linear", "tanh"])
@pytest.mark.parametrize("family", FAMILIES)
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


def test_more_layers_than_there_are(tmp_path):
    folder = model_folder(tmp_path / "llm")
    with says("prefix.layers", 3, "2 layers", folder):
        train.train(config(folder, **{"prefix.layers": 3}), tmp_path / "run")


def test_a_run_with_fewer_layers_resumes_is_read_and_exported(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "llm")
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    fields = {"prefix.layers": 1, "train.eval_every": 2, "train.save_every": 2, "train.steps": 4}
    assert train.train(config(folder, **fields), tmp_path / "run") == 0
    kept = checkpoint.read_config(tmp_path / "run")["prefix"]
    assert kept["rms"] == embeddings_rms(load_llm(folder)) and kept["layers"] == 1
    found = read_distiller(tmp_path / "run")
    assert found.config.layers == 1
    export(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_layer"] == 1
    again = read_distiller(tmp_path / "out")
    np.testing.assert_array_equal(again.distill([1, 2, 3]).embeds, found.distill([1, 2, 3]).embeds)
    with says("prefix.layers", 1, 2):
        train.train(config(folder, **fields | {"prefix.layers": 2, "train.steps": 6}), tmp_path / "run")


def test_what_was_measured_is_kept_where_a_run_goes_on(tmp_path):
    folder = model_folder(tmp_path / "llm")
    llm, c = load_llm(folder), config(folder)
    first = build.measured(c, llm, tmp_path / "run")
    assert c.prefix.rms == -1 and first.prefix.rms == embeddings_rms(llm)
    for saved, wanted in (({"rms": 0.25}, 0.25), ({}, 0.0)):  # one of before the field was there began without
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.json").write_text(json.dumps({"prefix": saved}))
        assert build.measured(c, llm, tmp_path / "run").prefix.rms == wanted
