"""Weights in 8 bits: what is held, what is computed with it, what it costs in memory, how it is read from files.

Axes: B batch, N demonstration tokens, L vectors, Q query tokens, D width.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import says
from safetensors.numpy import load_file, save_file
from tiny_training import RandomBatches, config, model_folder

from mend_jax import train
from mend_jax.cli import config_files
from mend_jax.cli.settings import check
from mend_jax.data.batches import Batch
from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import LLM, EncoderDecoderLLM, load_llm
from mend_jax.models.config import DecoderConfig, EncoderDecoderConfig
from mend_jax.models.families import from_hf_config
from mend_jax.models.folders import init_params, save_model
from mend_jax.models.int8 import quantize, quantize_params
from mend_jax.prefixes.demonstrations import demonstrations_prefix
from mend_jax.prefixes.soft_prompt import SoftPrompt
from mend_jax.run import build, checkpoint, reporting, resume
from mend_jax.scoring import costs
from mend_jax.scoring.options import score_options
from mend_jax.step import make_loss_fn

pytestmark = pytest.mark.slow

ROWS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {  # as opt-350m: projections at both ends
        "hidden_size": 32,
        "word_embed_proj_dim": 24,
        "do_layer_norm_before": False,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "qwen3": {  # norms of queries and keys, shared keys and values, a head of its own
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {  # scaled embeddings, layers of two kinds
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "sliding_window": 5,
        "sliding_window_pattern": 3,
    },
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
}
WORDS, B, N, L, Q = 61, 2, 12, 3, 10


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return functools.cache(lambda family: make_row(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(params=ROWS)
def row(request, rows):
    """One family: its folder, the LLM in 8 bits, and the same LLM in float32 with the numbers that 8 bits hold."""
    return rows(request.param)


def make_row(family, folder):
    fields = {"model_type": family, "vocab_size": WORDS} | ROWS[family]
    model, rng = from_hf_config(fields), np.random.default_rng(1)
    params = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), init_params(model, 0))
    save_model(folder, model, params, folder)
    exact, held = load_llm(folder), load_llm(folder, weights="int8")
    return SimpleNamespace(folder=folder, exact=exact, held=held, same=like(held, params=restored(held.params)))


def like(llm, **changes):
    return dataclasses.replace(llm, **changes)


def restored(params):
    """The float32 tree that a tree in 8 bits stands for."""
    tree = {}
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            tree[name] = restored(leaf)
        elif name + "_scale" in params:
            scale = params[name + "_scale"]
            tree[name] = leaf * (scale[..., None, :] if name == "kernel" else scale[..., None])
        elif not name.endswith("_scale"):
            tree[name] = leaf
    return tree


def paths(params):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in jax.tree.leaves_with_path(params)}


def training_gradient(llm, vectors):
    """f(llm_params) -> ({"kd", "pred"}, gradient of the vectors (L,D)) of the training loss on a fixed batch."""
    rng = np.random.default_rng(0)
    query = Query(rng.integers(0, WORDS, (B, Q), np.int32), np.array([Q, 7]), np.array([4, 3]))
    batch = Batch(rng.integers(0, WORDS, (B, N), np.int32), np.array([N, 5]), query, None)
    loss_fn = make_loss_fn(config("unused", stage="finetune"), llm, SoftPrompt({"vectors": vectors}))
    compiled = jax.jit(jax.grad(loss_fn, has_aux=True))

    def gradient(llm_params):
        found, losses = compiled({"vectors": vectors}, llm_params, batch)
        return losses, found["vectors"]

    return gradient


# What is held


def test_the_largest_number_of_a_channel_is_127():
    values, scale = quantize(np.array([[1.0, -2.54, 0.0], [0.5, 1.0, 0.0]], np.float32), -2)
    np.testing.assert_array_equal(values, [[127, -127, 0], [64, 50, 0]])  # 63.5 is rounded to even
    np.testing.assert_allclose(scale, [1 / 127, 2.54 / 127, 0], rtol=1e-6)
    rows = np.random.randn(5, 300).astype(np.float32)
    values, scale = quantize(rows, -1)
    assert values.dtype == np.int8 and scale.shape == (5,) and np.all(np.abs(values).max(1) == 127)
    assert np.all(np.abs(values * scale[:, None] - rows) <= 0.5001 * scale[:, None])


def test_kernels_and_tables_are_int8_under_their_own_paths_with_a_scale_beside_them(row):
    exact, held = paths(row.exact.params), paths(row.held.params)
    assert {path for path in held if not path.endswith("_scale")} == exact.keys()
    for path, leaf in exact.items():
        if path.endswith(("/kernel", "embed/tokens", "embed/head")):
            assert held[path].dtype == jnp.int8 and held[path].shape == leaf.shape
            outputs = (*leaf.shape[:-2], leaf.shape[-1]) if path.endswith("kernel") else leaf.shape[:1]
            assert held[path + "_scale"].shape == outputs and held[path + "_scale"].dtype == jnp.float32
        else:
            assert path + "_scale" not in held
            np.testing.assert_array_equal(held[path], leaf)


def test_bytes_by_formula_are_those_that_are_held(row):
    for llm, int8 in ((row.exact, False), (row.held, True)):
        assert costs.weight_bytes(llm.config, 4, int8) == sum(leaf.nbytes for leaf in jax.tree.leaves(llm.params))
    assert reporting.count(row.held.params) == reporting.count(row.exact.params)


def test_what_is_read_from_files_is_what_the_whole_tree_gives(row):
    jax.tree.map(np.testing.assert_array_equal, quantize_params(row.exact.params), row.held.params)


# What is computed


@pytest.mark.parametrize("row", ["gpt2", "gemma3_text", "t5"], indirect=True)  # tables, gates and norms, two stacks
def test_losses_and_the_gradient_of_the_prefix_are_those_of_the_numbers_that_are_held(row):
    """And so the gradient flows through the integers; near to those of the weights themselves."""
    vectors = jnp.asarray(np.random.randn(L, row.exact.config.width), jnp.float32)
    run = training_gradient(row.exact, vectors)
    (held, held_grad), (same, same_grad), (exact, exact_grad) = (
        run(llm.params) for llm in (row.held, row.same, row.exact)
    )
    for name in ("kd", "pred"):
        assert abs(held[name] - same[name]) < 1e-5
        assert 1e-6 < abs(held[name] - exact[name]) < 0.05 * exact[name]
    assert np.abs(held_grad - same_grad).max() < 1e-4 * np.abs(same_grad).max()
    cosine = (held_grad * exact_grad).sum() / jnp.linalg.norm(held_grad) / jnp.linalg.norm(exact_grad)
    assert 0.99 < cosine < 1 - 1e-7


@pytest.mark.parametrize("row", ["gpt2", "t5"], indirect=True)
def test_options_are_scored_after_demonstrations(row):
    scores = {}
    for name, llm in {"held": row.held, "same": row.same}.items():
        scores[name] = score_options(llm, demonstrations_prefix(llm, [5, 6, 7, 8]), [9, 10], [[11, 12], [13]])
    np.testing.assert_allclose(scores["held"], scores["same"], atol=1e-4)


def test_a_soft_prompt_starts_from_rows_of_the_table(row):
    c = config("unused")
    held, same = (SoftPrompt.init(c, llm, seed=3).params["vectors"] for llm in (row.held, row.same))
    assert held.dtype == jnp.float32
    np.testing.assert_array_equal(held, same)


@pytest.mark.parametrize("row", ["opt"], indirect=True)
def test_bfloat16_arithmetic_takes_the_integers_as_they_are(row):
    half = load_llm(row.folder, dtype="bfloat16", weights="int8")
    assert half.params["layers"]["up"]["kernel"].dtype == jnp.int8
    assert half.params["layers"]["norm1"]["scale"].dtype == jnp.bfloat16
    query = Query(np.arange(20, dtype=np.int32)[None], np.array([20]), np.array([0]))
    logits = {}
    for name, llm in {"half": half, "same": row.same}.items():
        states = llm.states(llm.params, demonstrations_prefix(llm, [1, 2, 3]), query)
        logits[name] = llm.logits(llm.params, states)
        assert logits[name].dtype == jnp.float32
    assert states.dtype == jnp.float32 and jnp.linalg.norm(logits["half"] - logits["same"]) < 0.03 * jnp.linalg.norm(
        logits["same"]
    )


def test_a_distiller_trains_and_is_scored_through_an_llm_in_8_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    fields = {"llm.weights": "int8", "train.steps": 2, "train.log_every": 1, "train.eval_every": 2}
    c = config(model_folder(tmp_path / "model"), **fields)
    assert train.train(c, tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kd"] > 0 and np.isfinite([line["validation_loss"] for line in lines if "validation_loss" in line])
    trained = paths(checkpoint.load_best(tmp_path / "run")[0])
    assert all(leaf.dtype == np.float32 for leaf in trained.values())
    c.llm.weights = "full"
    with says(tmp_path / "run", 'llm.weights="int8"', '"full"'):
        resume.check_resume(tmp_path / "run", c, False)


# Memory

DEEP = {
    "decoder": DecoderConfig("llama", 64, 128, 12, 4, 512, 64, activation="silu", gated=True, rms_norm=True),
    "encoder_decoder": EncoderDecoderConfig("t5", 64, 128, 12, 2, 4, 32, 512),
}


@pytest.mark.parametrize("kind", DEEP)
def test_no_full_precision_copy_of_the_layers_lives_anywhere(kind):
    """In the compiled gradient of L_distill and L_pred."""
    model, make = DEEP[kind], LLM if kind == "decoder" else EncoderDecoderLLM
    full = jax.eval_shape(lambda: init_params(model, 0))
    held = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, abstract_int8(full)))
    query = Query(np.zeros((1, 6), np.int32), np.array([6]), np.array([3]))
    batch = Batch(np.zeros((1, 6), np.int32), np.array([6]), query, None)
    vectors = {"vectors": jax.ShapeDtypeStruct((2, 128), jnp.float32)}
    loss_fn = make_loss_fn(
        config("unused", stage="finetune"), make(model, None, None, "", "float32"), SoftPrompt(vectors)
    )

    def memory(function):
        return jax.jit(jax.grad(function, has_aux=True)).lower(vectors, held, batch).compile().memory_analysis()

    layers = sum(4 * leaf.size for path, leaf in paths(full).items() if "layers" in path)
    scanned = memory(loss_fn)
    assert scanned.argument_size_in_bytes < 0.3 * layers
    assert scanned.temp_size_in_bytes < 0.4 * layers
    if kind == "decoder":  # the measure sees a program that restores the weights first
        restoring = memory(lambda p, held, batch: loss_fn(p, restored(held), batch))
        assert restoring.temp_size_in_bytes > 0.9 * layers


def abstract_int8(shapes):
    """The zeros of a tree in 8 bits."""
    return quantize_params(jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes))


LOAD = """
import gc, json, sys
from pathlib import Path
from mend_jax.measure import machine as measure
from mend_jax.run import sharding
from mend_jax.llm.decoder_only import load_llm
from mend_jax.models import weights
from mend_jax.models.families import from_hf_config

import jax

def peak(load):
    gc.collect()
    measure.reset_peak()
    before = measure.peak_bytes()
    result = load()
    return {"peak": measure.peak_bytes() - before, "result": sum(a.nbytes for a in jax.tree.leaves(result))}

def careless(folder):
    tensors = [(name, tensor[:]) for name, tensor in weights._tensors_of(weights.weight_files(folder))]
    return weights.from_tensors(iter(tensors), from_hf_config(folder), int8=True)

small, large, sizes = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
place = sharding.placer(sharding.make_mesh(sizes)) if sizes else None
load_llm(small, weights="int8", place=place), load_llm(small, place=place)
found = {name: peak(lambda: load_llm(large, weights=name, place=place).params) for name in ("int8", "full")}
print(json.dumps(found | {"careless": peak(lambda: careless(large))}))
"""


@pytest.mark.parametrize("mesh", [{}, {"data": 1, "fsdp": 4, "tensor": 2}], ids=["whole", "mesh"])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_loading_never_holds_two_copies(tmp_path, ending, mesh):
    """Peak host memory: at most the result, which is all of a mesh's devices here, and 1.2 times the largest shard."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of a process's memory cannot be reset here")
    small, large = tmp_path / "small", tmp_path / "large"
    sizes = {"model_type": "gpt2", "vocab_size": 100, "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}
    shard = 0
    for folder, changes in {small: {}, large: {"vocab_size": 20_000, "n_layer": 4, "n_embd": 768}}.items():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(sizes | changes))
        shard = write_shards(folder, 4, ending)
    command = [sys.executable, "-c", LOAD, small, large, json.dumps(mesh)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=config_files.ROOT, check=True)
    found = json.loads(done.stdout)
    within = {name: of["peak"] <= of["result"] + 1.2 * shard for name, of in found.items()}
    assert within == {"int8": True, "full": True, "careless": False}, (found, shard)
    assert found["int8"]["result"] < 0.26 * found["full"]["result"]


def write_shards(folder, count, ending):
    """Random weights in `count` files of about the same size; returns the bytes of the largest."""
    from mend_jax.models.families import key_table

    table = key_table(from_hf_config(folder))
    limit = sum(4 * int(np.prod(entry.shape)) for entry in table.values()) / count
    shards, block = [{}], np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    for name, entry in table.items():
        shards[-1][name] = np.resize(block, entry.shape)
        if sum(tensor.nbytes for tensor in shards[-1].values()) >= limit:
            shards.append({})
    shards = [shard for shard in shards if shard]
    single = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[ending]
    names = [f"{i}-{single}" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        if ending == "bin":
            torch = pytest.importorskip("torch")
            torch.save({key: torch.from_numpy(array) for key, array in tensors.items()}, folder / name)
        else:
            save_file(tensors, folder / name)
    index = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": index}))
    return max((folder / name).stat().st_size for name in names)


# Bad input


def test_weights_that_there_are_not(row):
    with says("weights", "'int4'", "full, int8"):
        load_llm(row.folder, weights="int4")
    c = config("unused")
    c.llm.weights = "int4"
    with says("llm.weights", '"int4"', "full, int8"):
        check(c)


def test_an_llm_that_is_trained_is_not_held_in_8_bits():
    with says('"lm"', 'llm.weights="int8"', "--config.llm.weights=full"):
        check(config("unused", stage="lm", **{"llm.weights": "int8"}))


@pytest.mark.parametrize("row", ["gpt2"], indirect=True)
@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_numbers_that_are_not_finite_are_named(row, tmp_path, wrong):
    tensors = load_file(row.folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = wrong
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((row.folder / "config.json").read_text())
    with says(tmp_path, "h.1.mlp.c_fc.weight", "not finite"):
        load_llm(tmp_path, weights="int8")
    load_llm(tmp_path)


@pytest.mark.parametrize("row", ["gpt2"], indirect=True)
def test_a_head_that_is_not_the_token_table_is_seen(row, tmp_path):
    tensors = load_file(row.folder / "model.safetensors")
    (tmp_path / "config.json").write_text((row.folder / "config.json").read_text())
    head = tensors["transformer.wte.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_llm(tmp_path, weights="int8").params, row.held.params)
    head[5, 6] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    with says(tmp_path, "lm_head.weight", "token table", "tie_word_embeddings"):
        load_llm(tmp_path, weights="int8")
