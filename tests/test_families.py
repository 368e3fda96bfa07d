"""Every decoder-only family against PyTorch, on small random weights with the quirks of the real models.

Axes: B batch, P prefix, Q query tokens, D width, V vocabulary.
"""

import functools
import json
import math
import re
from types import SimpleNamespace

import family_sizes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_training import config as tiny_config

from mend_jax import costs
from mend_jax.data.batches import Batch
from mend_jax.errors import UserError
from mend_jax.export import write_folder
from mend_jax.llm import load_llm
from mend_jax.models.decoder import init_params
from mend_jax.models.families import FAMILIES, from_hf_config, key_table, to_hf_config
from mend_jax.models.folders import load_model, save_model
from mend_jax.models.rope import frequencies, read_rope
from mend_jax.prefix import Prefix, demonstrations_prefix, init_distiller, no_prefix
from mend_jax.query import Query
from mend_jax.scoring import score_options
from mend_jax.step import init_state, make_loss_fn, make_optimizer, make_train_step
from mend_jax.trained import read_distiller

OPT = {
    "model_type": "opt",
    "hidden_size": 24,
    "ffn_dim": 40,
    "num_attention_heads": 3,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
}
QWEN = LLAMA | {"num_key_value_heads": 2, "rms_norm_eps": 1e-6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROWS = {
    "opt-125m": OPT,
    "opt-350m": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "llama-2": LLAMA | {"num_key_value_heads": 4},
    "llama-3": LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "mistral": LLAMA | {"model_type": "mistral", "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 48},
    "qwen2": QWEN | {"model_type": "qwen2", "tie_word_embeddings": True, "rope_scaling": YARN, "rope_theta": 1e6},
    "qwen3": QWEN | {"model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
    "smollm2": LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
}
COMMON = {"vocab_size": 61, "num_hidden_layers": 2, "max_position_embeddings": 64}
IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}


def torch_model(fields, seed=0):
    """The PyTorch model of a config.json's fields, with random biases and norms too: fresh ones would hide mistakes."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**COMMON, **IDS, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module", params=ROWS)
def row(request, tmp_path_factory):
    """One family: its PyTorch model, the folder that transformers saves, our LLM of it."""
    model, folder = torch_model(ROWS[request.param]), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return SimpleNamespace(name=request.param, torch=model, folder=folder, llm=load_llm(folder))


def tokens(*shape):
    return np.random.randint(0, COMMON["vocab_size"], shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradient(llm, embeds, length, query, direction):
    """Logits (B,Q,V) after the prefixes, and the gradient (B,P,D) of their products with `direction`."""

    def value(embeds):
        logits = llm.logits(llm.params, llm.states(llm.params, Prefix(embeds, length), query))
        return (logits * direction).sum(), logits

    gradient, logits = jax.grad(value, has_aux=True)(embeds)
    return logits, gradient


def test_a_padded_batch_of_prefixes_gives_what_pytorch_gives_one_by_one(row):
    """Logits, and the gradient with respect to the prefix; the first row's prefix is embedded demonstrations."""
    torch = pytest.importorskip("torch")
    llm, B, P, Q, D = row.llm, 3, 24, 16, row.llm.config.width
    prefix_lengths, lengths = np.array([24, 9, 0]), np.array([10, 16, 5])
    ids, demos = tokens(B, Q), tokens(1, P)
    embeds = np.random.randn(B, P, D).astype(np.float32)
    embeds[0] = llm.embed(llm.params, demos[0])
    direction = np.random.randn(B, Q, COMMON["vocab_size"]).astype(np.float32)
    direction *= (np.arange(Q) < lengths[:, None])[..., None]
    query = Query(ids, lengths, np.zeros(B, np.int32))
    logits, gradient = logits_and_gradient(llm, embeds, prefix_lengths, query, direction)
    for i, (before, length) in enumerate(zip(prefix_lengths, lengths, strict=True)):
        theirs = torch.from_numpy(embeds[i : i + 1, :before]).requires_grad_()
        read = row.torch.get_input_embeddings()(torch.from_numpy(ids[i : i + 1, :length]).long())
        expected = row.torch(inputs_embeds=torch.cat([theirs, read], 1)).logits[:, before:]
        assert np.abs(logits[i, :length] - expected[0].detach().numpy()).max() < 1e-4
        if before:
            (expected * torch.from_numpy(direction[i : i + 1, :length])).sum().backward()
            wanted = theirs.grad[0].numpy()
            assert np.abs(gradient[i, :before] - wanted).max() < 1e-3 * np.abs(wanted).max()
        assert not np.any(gradient[i, before:])
    with torch.no_grad():  # the embedded demonstrations are the demonstrations
        whole = row.torch(torch.from_numpy(np.concatenate([demos, ids[:1, : lengths[0]]], 1)).long()).logits
    assert np.abs(logits[0, : lengths[0]] - whole[0, P:].numpy()).max() < 1e-4


def test_scores_after_a_shared_cache_are_those_of_rereading_everything(row):
    torch = pytest.importorskip("torch")
    demos, x, options = tokens(20).tolist(), [5, 6, 7], [[8, 9, 10], [11], [12, 13]]
    prefixes = {"nothing": (no_prefix(1, row.llm.config.width), []), "demonstrations": (None, demos)}
    for prefix, before in prefixes.values():
        prefix = demonstrations_prefix(row.llm, before) if prefix is None else prefix
        expected = []
        for option in options:
            ids = torch.tensor([before + x + option])
            with torch.no_grad():
                log_probs = torch.log_softmax(row.torch(ids).logits[0, :-1].double(), -1)
            picked = log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            expected.append(picked[-len(option) :].mean().item())
        np.testing.assert_allclose(score_options(row.llm, prefix, x, options), expected, atol=1e-4)


def test_costs_are_what_is_computed_and_kept(row):
    llm, tokens_read, positions = row.llm, 20, 12
    embeds, params = jax.ShapeDtypeStruct((1, tokens_read, llm.config.width), jnp.float32), llm.params
    read = costs.count_products(lambda e: llm.model.apply({"params": params}, e), embeds)
    assert read == costs.reading(llm.config, tokens_read).forward
    states = jax.ShapeDtypeStruct((1, tokens_read, llm.config.width), jnp.float32)
    assert costs.count_products(functools.partial(llm.logits, params), states) == costs.head(llm.config, tokens_read)
    prefix = Prefix(jnp.zeros((1, positions, llm.config.width)), jnp.array([positions]))
    cache = jax.eval_shape(llm.prefix_cache, params, prefix)
    kept = sum(math.prod(a.shape) * a.dtype.itemsize for a in (cache.keys, cache.values))
    assert kept == costs.cache_bytes(llm.config, positions, 4)
    assert costs.vector_bytes(llm.config, positions, 4) == prefix.embeds.nbytes
    ids, at = jnp.zeros((1, 8), jnp.int32), jnp.arange(8)[None]
    after = costs.count_products(lambda c: llm.cached_states(params, c, ids, at, ids), cache)
    assert after == costs.reading(llm.config, 8, positions + 8).forward


def test_the_distiller_of_a_family_trains_in_both_stages_and_evaluates(row, tmp_path):
    """A step of pretraining and of finetuning, with a smaller model of the same family as the backbone."""
    from mend_jax.torch_module import MendDistiller

    small = ROWS[row.name] | {"hidden_size": 12 * ROWS[row.name]["num_attention_heads"] // 3}
    torch_model(small, seed=1).save_pretrained(tmp_path)
    fields = {"prefix.backbone": str(tmp_path), "llm.path": str(row.folder)}
    rng, B, N, Q = np.random.default_rng(0), 2, 16, 16
    query = Query(tokens(B, Q), rng.integers(5, Q + 1, B, np.int32), np.full(B, 3, np.int32))
    batch = Batch(tokens(B, N), rng.integers(4, N + 1, B, np.int32), query, np.arange(B))
    model = init_distiller(tiny_config(row.folder, **fields).prefix, row.llm, seed=0)
    assert "head" not in model.params["backbone"]["embed"]
    for stage in ("pretrain", "finetune"):
        config = tiny_config(row.folder, stage=stage, **fields)
        optimizer = make_optimizer(config)
        step = jax.jit(make_train_step(config, make_loss_fn(config, row.llm, model), optimizer))
        state, metrics = step(init_state(model.params, optimizer), row.llm.params, batch.replace(ids=None))
        assert metrics["kd"] > 0 and np.isfinite(metrics["grad_norm"])
        moved = jax.tree.map(lambda a, b: np.any(a != b), state.params, model.params)
        assert jax.tree.all(moved), [path for path, leaf in jax.tree.leaves_with_path(moved) if not leaf]
    context = tokens(12).tolist()
    vectors = model.distill(context)
    assert vectors.embeds.shape == (1, model.num_vectors, row.llm.config.width)
    scores = score_options(row.llm, vectors, [5, 6], [[7, 8], [9]])
    assert np.all(np.isfinite(scores)) and scores[0] != scores[1]
    write_folder(model, tmp_path / "out")  # and in PyTorch, and back
    theirs = MendDistiller.from_pretrained(tmp_path / "out").distill(context).numpy()
    assert np.abs(vectors.embeds - theirs).max() < 1e-5
    assert jax.tree.all(jax.tree.map(np.array_equal, read_distiller(tmp_path / "out").params, model.params))


# Folders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_comes_back_byte_for_byte(row, tmp_path, dtype):
    import copy

    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    copy.deepcopy(row.torch).to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    save_model(tmp_path / "ours", model.config, model.params, tmp_path / "theirs", dtype=dtype)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].tobytes() == tensor.tobytes(), name
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert again.dtype == getattr(torch, dtype)
    before, after = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").config.to_dict(), again.config.to_dict()
    free = {"_name_or_path", "dropout", "attention_dropout", "layerdrop", "head_dim", "use_cache", "pretraining_tp"}
    assert {k: v for k, v in before.items() if k not in free} == {k: v for k, v in after.items() if k not in free}
    ids = torch.from_numpy(tokens(1, 30)).long()
    with torch.no_grad():
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(ids).logits
        assert torch.equal(again(ids).logits, kept)


def test_settings_survive_the_round_trip(row):
    assert from_hf_config(to_hf_config(row.llm.config)) == row.llm.config


@pytest.mark.parametrize("name", family_sizes.SIZES)
def test_published_sizes(name):
    fields, published = family_sizes.SIZES[name]
    config = from_hf_config(fields)
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == published
    table = key_table(config)
    assert sum(math.prod(entry.shape) for entry in table.values()) == published
    for path, leaf in jax.tree.leaves_with_path(shapes):  # every parameter has its key, with the shape of the tree
        keys = tuple(key.key for key in path)
        entries = [entry for entry in table.values() if entry.path == keys]
        stack = () if entries[0].layer is None else (len(entries),)
        assert {(*stack, *entry.our_shape) for entry in entries} == {leaf.shape}, keys


# Rotary positions


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
        YARN | {"original_max_position_embeddings": 32768},
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "original_max_position_embeddings": 4096},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 4096},
        YARN | {"attention_factor": 1.5},
    ],
)
def test_angles_are_those_of_transformers(scaling):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {"max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": scaling}
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=256, num_attention_heads=2, **json.loads(json.dumps(fields))))
    angle, factor = frequencies(read_rope(fields), 128)
    np.testing.assert_allclose(angle, theirs.inv_freq.numpy(), rtol=1e-6)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_logits_with_other_scalings(kind, tmp_path):
    torch = pytest.importorskip("torch")
    model = torch_model(LLAMA | {"num_key_value_heads": 2, "rope_scaling": {"rope_type": kind, "factor": 3.0}})
    model.save_pretrained(tmp_path)
    llm, ids = load_llm(tmp_path), tokens(1, COMMON["max_position_embeddings"])
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.numpy()
    query = Query(ids, np.array([ids.shape[1]]), np.zeros(1, np.int32))
    states = llm.states(llm.params, no_prefix(1, llm.config.width), query)
    assert np.abs(llm.logits(llm.params, states) - theirs).max() < 1e-4


# Bad input


def test_an_unknown_model_type_is_told_the_known_ones():
    with pytest.raises(UserError, match="model_type 'gemma3' is not supported: use one of gpt2, llama, mistral, opt"):
        from_hf_config({"model_type": "gemma3"})
    assert {"gpt2", "opt", "llama", "mistral", "qwen2", "qwen3"} <= FAMILIES.keys()


@pytest.mark.parametrize(
    ("fields", "change", "named"),
    [
        (OPT, {"activation_function": "gelu"}, "activation_function='gelu'"),
        (OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        (OPT, {"num_attention_heads": 5}, "width 24 and 5 heads"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA, {"num_key_value_heads": 3}, "4 heads and 3 of keys and values"),
        (LLAMA, {"num_attention_heads": 8}, "even width"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "longrope"}},
            "'longrope', which is not supported: only default, linear",
        ),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "'linear' lacks factor"),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(fields, change, named):
    from_hf_config(COMMON | fields)
    with pytest.raises(UserError, match=named):
        from_hf_config(COMMON | fields | change)
    with pytest.raises(UserError, match="lacks the field 'hidden_size'"):
        from_hf_config({name: value for name, value in (COMMON | fields).items() if name != "hidden_size"})


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("opt-125m", {"max_position_embeddings": 62}, r"embed_positions.weight has shape \(66, 24\).*\(64, 24\)"),
        ("opt-125m", {"enable_bias": False}, "bias, which a 2-layer opt model does not have"),
        ("opt-350m", {"word_embed_proj_dim": 24}, "which a 2-layer opt model does not have|has shape"),
        ("llama-2", {"num_key_value_heads": 2}, r"k_proj.weight has shape \(24, 24\).*\(12, 24\)"),
        ("llama-2", {"tie_word_embeddings": True}, "not the token table"),
        ("llama-3", {"tie_word_embeddings": False}, "lacks lm_head.weight"),
        ("qwen2", {"model_type": "llama"}, "proj.bias, which a 2-layer llama model does not have"),
        ("qwen3", {"head_dim": 6}, "has shape"),
    ],
)
def test_a_config_that_disagrees_with_its_weights_is_named(tmp_path, name, change, named):
    torch_model(ROWS[name]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(UserError, match=named):
        load_model(tmp_path)


def test_a_missing_shard_is_named(row, tmp_path):
    row.torch.save_pretrained(tmp_path, max_shard_size="10KB")
    whole = load_model(tmp_path).params
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, row.llm.params))
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is not there, though model.safetensors.index.json names it"):
        load_model(tmp_path)


def test_a_position_beyond_the_window_is_refused(row):
    window = 48 if row.name == "mistral" else 64
    assert row.llm.window == window
    reason = re.escape(" (sliding_window=48 in its config.json: longer sequences are not supported)")
    end = f"reads at most {window}{reason if row.name == 'mistral' else ''}: "
    with pytest.raises(UserError, match=f"have {window + 1} tokens, the LLM {end}give fewer"):
        demonstrations_prefix(row.llm, [1] * (window + 1))
    prefix = no_prefix(1, row.llm.config.width)
    with pytest.raises(UserError, match=f"{end}shorten"):
        score_options(row.llm, prefix, [1] * window, [[2, 3]])


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, 32768),
        ({"model_type": "llama", "sliding_window": 8}, 32768),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, 32768),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, 32768),
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, 8),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "full_attention"],
            },
            32768,
        ),
    ],
)
def test_a_sliding_window_bounds_the_window_where_it_is_active(fields, window):
    config = from_hf_config(COMMON | LLAMA | fields | {"max_position_embeddings": 32768})
    assert config.window == window
    assert from_hf_config(to_hf_config(config)) == config


def test_old_files_with_buffers_and_heads_are_read(tmp_path):
    """Llama files carried their angles, OPT's of the hub the head as well as the token table, or no `model.`."""
    for name, drop in (("llama-3", "model."), ("opt-125m", "model."), ("opt-125m", "")):
        torch_model(ROWS[name]).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        new = {key.removeprefix(drop): tensor for key, tensor in tensors.items()}
        table = next(tensor for key, tensor in tensors.items() if key.endswith("embed_tokens.weight"))
        new["lm_head.weight"] = table.copy()
        if name == "llama-3":
            new["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        expected = load_model(tmp_path).params
        save_file(new, tmp_path / "model.safetensors")
        assert jax.tree.all(jax.tree.map(np.array_equal, load_model(tmp_path).params, expected))


def test_the_real_opt_tokenizer_reads_texts(shared):
    from mend_jax.models.folders import load_tokenizer

    tokenizer = load_tokenizer(shared / "tokenizers" / "opt")
    ids = tokenizer(" a great film", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == " a great film" and 2 not in ids


def test_bfloat16_is_close(row):
    half = load_llm(row.folder, dtype="bfloat16")
    ids = tokens(1, 16)
    query = Query(ids, np.array([16]), np.zeros(1, np.int32))
    run = lambda llm: llm.logits(llm.params, llm.states(llm.params, no_prefix(1, llm.config.width), query))  # noqa: E731
    exact, near = run(row.llm), run(half)
    assert near.dtype == jnp.float32 and jnp.linalg.norm(near - exact) < 0.1 * jnp.linalg.norm(exact)
