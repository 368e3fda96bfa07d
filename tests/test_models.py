"""The decoder against PyTorch's GPT-2, and its weights between Hugging Face files and our tree.

Axes: B batch, T any sequence, P prefix, Q query tokens, D width, V vocabulary.
"""

import dataclasses
import errno
import fnmatch
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mend_jax import checkpoint
from mend_jax.errors import UserError
from mend_jax.llm import init_llm, load_llm
from mend_jax.models import weights
from mend_jax.models.decoder import Decoder, init_params
from mend_jax.models.families import from_hf_config, to_hf_config
from mend_jax.models.folders import has_weights, load_model, local_folder, save_model
from mend_jax.prefix import Prefix, join, no_prefix
from mend_jax.query import Query

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
SIZES = {  # layers, width, heads, parameters (published)
    "gpt2": (12, 768, 12, 124_439_808),
    "gpt2-medium": (24, 1024, 16, 354_823_168),
    "gpt2-large": (36, 1280, 20, 774_030_080),
    "gpt2-xl": (48, 1600, 25, 1_557_611_200),
}


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return load_llm(tiny_llm)


@pytest.fixture(scope="module")
def torch_model(tiny_llm):
    pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(tiny_llm).eval()


def tokens(*shape):
    return np.random.randint(0, 64, shape).astype(np.int32)


def query(ids, length=None, start=0):
    rows = len(ids)
    return Query(ids, np.full(rows, ids.shape[1]) if length is None else np.asarray(length), np.full(rows, start))


# Parity with PyTorch


def test_logits_are_those_of_pytorch(llm, torch_model):
    torch = pytest.importorskip("torch")
    ids = tokens(3, 96)  # the whole window
    with torch.no_grad():
        theirs = torch_model(torch.from_numpy(ids).long()).logits.numpy()
    states = llm.states(llm.params, no_prefix(3, 32), query(ids))
    assert np.abs(llm.logits(llm.params, states) - theirs).max() < 1e-4


@pytest.mark.parametrize(
    "sizes", [{"n_inner": 40}, {"n_head": 1, "layer_norm_epsilon": 1e-3}, {"n_layer": 5, "n_embd": 48}]
)
def test_other_sizes_too(sizes, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**({"n_embd": 24, "n_layer": 1, "n_head": 4, "vocab_size": 64} | sizes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    llm, ids = load_llm(tmp_path), tokens(2, 20)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.numpy()
    states = llm.states(llm.params, no_prefix(2, llm.config.width), query(ids))
    assert np.abs(llm.logits(llm.params, states) - theirs).max() < 1e-4


def test_gradient_of_the_input_embeddings_is_that_of_pytorch(llm, torch_model):
    torch = pytest.importorskip("torch")
    embeds = (0.3 * np.random.randn(2, 40, 32)).astype(np.float32)
    direction = np.random.randn(2, 40, 64).astype(np.float32)
    theirs = torch.from_numpy(embeds).requires_grad_()
    (torch_model(inputs_embeds=theirs).logits * torch.from_numpy(direction)).sum().backward()

    def value(embeds):
        return (llm.logits(llm.params, llm.model.apply({"params": llm.params}, embeds)) * direction).sum()

    ours = jax.jit(jax.grad(value))(embeds)
    assert np.abs(ours - theirs.grad.numpy()).max() < 1e-4 * np.abs(theirs.grad.numpy()).max()


# Padding, prefixes and causality


def test_a_right_padded_batch_equals_one_by_one(llm):
    lengths, ids = [5, 30, 17, 1], tokens(4, 30)
    together = jax.jit(llm.states)(llm.params, no_prefix(4, 32), query(ids, lengths))
    for row, length in enumerate(lengths):
        alone = llm.states(llm.params, no_prefix(1, 32), query(ids[row : row + 1, :length]))
        assert np.abs(together[row, :length] - alone[0]).max() < 1e-5


def test_a_batch_of_prefixes_of_different_lengths_equals_one_by_one(llm):
    ids, embeds = tokens(3, 8), (0.2 * np.random.randn(3, 12, 32)).astype(np.float32)
    prefix_lengths, lengths = [12, 4, 0], [8, 3, 6]
    prefix = Prefix(jnp.asarray(embeds), jnp.asarray(prefix_lengths))
    together = jax.jit(llm.states)(llm.params, prefix, query(ids, lengths))
    assert together.shape == (3, 8, 32)
    for row, (before, length) in enumerate(zip(prefix_lengths, lengths, strict=True)):
        one = Prefix(jnp.asarray(embeds[row : row + 1, :before]), jnp.asarray([before]))
        alone = llm.states(llm.params, one, query(ids[row : row + 1, :length]))
        assert np.abs(together[row, :length] - alone[0]).max() < 1e-5


def test_join_puts_rows_right_behind_the_prefix():
    prefix = Prefix(jnp.arange(2 * 3 * 1.0).reshape(2, 3, 1) + 1, jnp.asarray([3, 1]))
    embeds, length = join(prefix, jnp.asarray([[[10.0], [11]], [[20], [21]]]), jnp.asarray([2, 1]))
    assert embeds[0, :5, 0].tolist() == [1, 2, 3, 10, 11] and embeds[1, :3, 0].tolist() == [4, 20, 21]
    assert length.tolist() == [5, 2]


def test_padding_changes_nothing(llm):
    ids = tokens(2, 20)
    other = ids.copy()
    other[:, 11:] = tokens(2, 9)
    embeds = np.random.randn(2, 6, 32).astype(np.float32)
    changed = embeds.copy()
    changed[:, 4:] = 1e3
    run = jax.jit(llm.states)
    one = run(llm.params, Prefix(jnp.asarray(embeds), jnp.asarray([4, 4])), query(ids, [11, 11]))
    two = run(llm.params, Prefix(jnp.asarray(changed), jnp.asarray([4, 4])), query(other, [11, 11]))
    assert np.array_equal(one[:, :11], two[:, :11])


def test_no_gradient_reaches_a_later_input(llm):
    """The state at t is a function of the inputs up to t alone: exactly, in value and gradient."""
    embeds = jnp.asarray(np.random.randn(1, 12, 32), jnp.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(embeds, t):
        return jax.grad(lambda e: (llm.model.apply({"params": llm.params}, e)[0, t] ** 3).sum())(embeds)

    for t in (0, 5, 11):
        size = np.abs(gradient(embeds, t)[0]).max(-1)
        assert np.all(size[: t + 1] > 0) and np.all(size[t + 1 :] == 0)


def test_cached_states_equal_those_of_the_whole_sequence(llm):
    ids, embeds = tokens(2, 9), jnp.asarray(0.2 * np.random.randn(1, 7, 32), jnp.float32)
    cache = llm.prefix_cache(llm.params, Prefix(embeds, jnp.asarray([5])))  # two rows of padding
    # An input of 4 tokens, two options of 2, a column of padding.
    positions = np.asarray([[0, 1, 2, 3, 4, 5, 4, 5, 0]] * 2)
    segments = np.asarray([[0, 0, 0, 0, 1, 1, 2, 2, -1]] * 2)
    cached = jax.jit(llm.cached_states)(llm.params, cache, ids, positions, segments)
    for row in range(2):
        for option in (slice(4, 6), slice(6, 8)):
            alone = np.concatenate([ids[row : row + 1, :4], ids[row : row + 1, option]], 1)
            whole = llm.states(llm.params, Prefix(embeds[:, :5], jnp.asarray([5])), query(alone))
            assert np.abs(cached[row, :4] - whole[0, :4]).max() < 1e-5
            assert np.abs(cached[row, option] - whole[0, 4:]).max() < 1e-5


def test_rematerialisation_changes_no_number(llm):
    embeds = jnp.asarray(np.random.randn(1, 10, 32), jnp.float32)

    def value(embeds, remat):
        return (llm.model.clone(remat=remat).apply({"params": llm.params}, embeds) ** 2).sum()

    plain, again = (jax.jit(jax.grad(functools.partial(value, remat=remat)))(embeds) for remat in (False, True))
    assert np.abs(plain - again).max() <= 1e-5 * np.abs(plain).max()


def test_bfloat16_is_close_and_its_logits_are_float32(tiny_llm, llm):
    half, ids = load_llm(tiny_llm, dtype="bfloat16"), tokens(2, 30)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    states = half.states(half.params, no_prefix(2, 32), query(ids))
    logits = half.logits(half.params, states)
    exact = llm.logits(llm.params, llm.states(llm.params, no_prefix(2, 32), query(ids)))
    assert states.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


# Sizes and config.json


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    layers, width, heads, published = SIZES[name]
    config = from_hf_config(GPT2 | {"n_layer": layers, "n_embd": width, "n_head": heads})
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == published
    listed = sum(math.prod(entry.shape) for entry in weights.key_table(config).values())
    assert listed == published


def test_config_survives_the_round_trip(llm, tmp_path):
    assert from_hf_config(to_hf_config(llm.config)) == llm.config
    odd = dataclasses.replace(llm.config, mlp_width=50, norm_eps=1e-6, max_positions=33)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(odd)))
    assert from_hf_config(tmp_path) == from_hf_config(tmp_path / "config.json") == odd


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "bert"}, "bert"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_head": 5}, "multiple"),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(change, named):
    config = GPT2 | {"n_layer": 1, "n_embd": 8, "n_head": 2}
    from_hf_config(config)
    with pytest.raises(UserError, match=named):
        from_hf_config(config | change)
    with pytest.raises(UserError, match="n_embd"):
        from_hf_config({name: value for name, value in config.items() if name != "n_embd"})


def test_folders_that_are_none(tmp_path):
    for path, named in ((tmp_path / "nothing", "nothing"), ("./nothing", "nothing"), (tmp_path, "config.json")):
        with pytest.raises(UserError, match=named):
            load_model(path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"')
    with pytest.raises(UserError, match="line 1"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"config.json holds no JSON object but \[1, 2\]"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | {"n_layer": 1, "n_embd": 8, "n_head": 2}))
    assert not has_weights(tmp_path)
    with pytest.raises(UserError, match="no weights"):
        load_model(tmp_path)
    assert local_folder(str(tmp_path)) == tmp_path


def test_cudnn_without_a_gpu_is_refused(tiny_llm):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    for make in (load_llm, lambda *args, **kwargs: init_llm(*args, 0, **kwargs)):
        with pytest.raises(UserError, match="needs an NVIDIA GPU"):
            make(tiny_llm, dtype="bfloat16", attention="cudnn")


# Weights


def test_a_folder_that_we_write_is_read_by_transformers(llm, torch_model, tiny_llm, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    save_model(tmp_path / "new", llm.config, llm.params, tiny_llm)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    theirs = torch_model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == load_file(tiny_llm / "model.safetensors").keys()


def test_shards_and_bin_hold_the_same(llm, torch_model, tiny_llm, tmp_path):
    torch = pytest.importorskip("torch")
    torch_model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("bin", "bin_shards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tiny_llm / "config.json").read_text())
    state = torch_model.state_dict()
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 96, 96, dtype=torch.bool)  # a buffer of old files
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for part, keys in parts.items():
        torch.save({key: state[key] for key in keys}, tmp_path / "bin_shards" / part)
    index = {"weight_map": {key: part for part, keys in parts.items() for key in keys}}
    (tmp_path / "bin_shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name in ("shards", "bin", "bin_shards"):
        assert has_weights(tmp_path / name)
        assert jax.tree.all(jax.tree.map(np.array_equal, load_model(tmp_path / name).params, llm.params)), name
    (tmp_path / "bin_shards" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="pytorch_model-00002-of-00002.bin"):
        load_model(tmp_path / "bin_shards")
    assert has_weights(tmp_path / "bin_shards")  # else stage "lm" would begin with random weights, without a word


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tiny_llm, tmp_path, content):
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert has_weights(tmp_path)
    with pytest.raises(UserError, match="model.safetensors.index.json is no index of weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("weights_file", ["model.safetensors", "pytorch_model.bin"])
def test_bin_is_fetched_only_where_the_hub_has_no_safetensors(tmp_path, monkeypatch, weights_file):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        if any(fnmatch.fnmatch(weights_file, pattern) for pattern in allow_patterns):
            (tmp_path / weights_file).write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert local_folder("someone/model") == tmp_path
    assert has_weights(tmp_path) and len(asked) == (1 if weights_file == "model.safetensors" else 2)
    assert not any(fnmatch.fnmatch("training_args.bin", pattern) for pattern in asked[-1])


def test_a_file_that_cannot_grow_is_an_oserror(llm, tmp_path):
    """train.py and export.py turn OSErrors into a sentence; safetensors has its own error for a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
        with pytest.raises(OSError, match="model.safetensors") as error:
            weights.write_params(tmp_path, llm.config, llm.params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG


def test_a_full_disk_is_recognised_in_safetensors_words(llm, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise weights.SafetensorError(
            "Error while serializing: I/O error: Out of room (os error 28)"
        )

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError) as error:
        weights.write_params(tmp_path, llm.config, llm.params)
    assert checkpoint.is_disk_full(error.value)


def test_half_precision_files_are_read(llm, torch_model, tmp_path):
    torch = pytest.importorskip("torch")
    import copy

    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        copy.deepcopy(torch_model).to(dtype).save_pretrained(folder)
        ours = load_model(folder).params
        rounded = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}[str(dtype).removeprefix("torch.")]
        wanted = jax.tree.map(lambda leaf, rounded=rounded: leaf.astype(rounded).astype(jnp.float32), llm.params)
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, wanted))


WTE, LN = "transformer.wte.weight", "transformer.ln_f.bias"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t | {"transformer.h.9.ln_1.bias": t[LN]}, "transformer.h.9.ln_1.bias"),
        (lambda t: t | {"classifier.weight": t[LN]}, "classifier.weight"),
        (lambda t: t | {"wte.weight": t[WTE]}, "wte.weight twice"),
        (lambda t: {name: tensor for name, tensor in t.items() if name != LN}, "ln_f.bias"),
        (lambda t: t | {WTE: t[WTE][:-1]}, r"transformer.wte.weight has shape \(63, 32\).*\(64, 32\)"),
    ],
)
def test_keys_that_do_not_fit_are_refused_by_name(tiny_llm, tmp_path, change, named):
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    save_file(change(load_file(tiny_llm / "model.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=named):
        load_model(tmp_path)


def test_a_key_in_two_shards_is_refused(tiny_llm, tmp_path):
    tensors = load_file(tiny_llm / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({LN: tensors[LN]}, tmp_path / "b.safetensors")
    index = {"weight_map": {**dict.fromkeys(tensors, "a.safetensors"), LN: "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="ln_f.bias twice"):
        load_model(tmp_path)


def test_damaged_files_are_named(tiny_llm, tmp_path):
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    whole = (tiny_llm / "model.safetensors").read_bytes()
    for content in (whole[:-100], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="model.safetensors"):
            load_model(tmp_path)


def test_an_arbitrary_pickle_is_never_run(tiny_llm, tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin"):
        load_model(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_the_initial_weights_are_gpt2s(llm):
    params = init_params(llm.config, 0)
    assert np.std(params["embed"]["tokens"]) == pytest.approx(0.02, rel=0.1)
    assert np.std(params["layers"]["out"]["kernel"]) == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.1)
    assert not np.any(params["layers"]["qkv"]["bias"]) and np.all(params["layers"]["norm1"]["scale"] == 1)
    assert jax.tree.structure(params) == jax.tree.structure(llm.params)
    other = init_params(llm.config, 1)
    assert np.any(params["embed"]["tokens"] != other["embed"]["tokens"])
    assert not np.array_equal(params["layers"]["up"]["kernel"][0], params["layers"]["up"]["kernel"][1])
    assert Decoder(llm.config).apply({"params": params}, jnp.zeros((1, 3, 32))).dtype == jnp.float32
