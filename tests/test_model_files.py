"""Model folders: config.json and weights, between Hugging Face files and our tree; what is refused."""

import dataclasses
import errno
import fnmatch
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_files
from facts import says
from safetensors.numpy import load_file, save_file

from mend_jax.llm.decoder_only import load_llm
from mend_jax.models import weights
from mend_jax.models.decoder import init_params
from mend_jax.models.families import from_hf_config, to_hf_config
from mend_jax.models.folders import (
    has_weights,
    load_model,
    load_tokenizer,
    local_folder,
    save_model,
    settings_here,
    write_tokenizer,
)
from mend_jax.run.files import is_disk_full

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
SIZES = {  # layers, width, heads, parameters (published)
    "distilgpt2": (6, 768, 12, 81_912_576),
    "gpt2": (12, 768, 12, 124_439_808),
    "gpt2-medium": (24, 1024, 16, 354_823_168),
    "gpt2-large": (36, 1280, 20, 774_030_080),
    "gpt2-xl": (48, 1600, 25, 1_557_611_200),
}
WTE, LN = "transformer.wte.weight", "transformer.ln_f.bias"


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return load_llm(tiny_llm)


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
    ("change", "facts"),
    [
        ({"model_type": "bert"}, ["model_type 'bert'", "gpt2"]),
        ({"activation_function": "relu"}, ["activation_function='relu'", "gpt2"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ({"n_head": 5}, ["width 8", "5 heads"]),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(change, facts):
    config = GPT2 | {"n_layer": 1, "n_embd": 8, "n_head": 2}
    from_hf_config(config)
    with says(*facts):
        from_hf_config(config | change)
    with says("config.json", "gpt2", "'n_embd'"):
        from_hf_config({name: value for name, value in config.items() if name != "n_embd"})


def test_folders_that_are_none(tmp_path):
    for path, named in (
        (tmp_path / "nothing", tmp_path / "nothing"),
        ("./nothing", "nothing"),
        (tmp_path, tmp_path / "config.json"),
    ):
        with says(named):
            load_model(path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"')
    with says(tmp_path / "config.json", "column 22"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with says(tmp_path / "config.json", "JSON object", "[1, 2]"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | {"n_layer": 1, "n_embd": 8, "n_head": 2}))
    assert not has_weights(tmp_path)
    with says(tmp_path, "no weights"):
        load_model(tmp_path)
    assert local_folder(str(tmp_path)) == tmp_path


# Weights


def test_a_folder_that_we_write_is_read_by_transformers(llm, torch_llm, tiny_llm, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    save_model(tmp_path / "new", llm.config, llm.params, tiny_llm)
    modes = {file.stat().st_mode for file in (tmp_path / "new" / name for name in ("config.json", "model.safetensors"))}
    assert len(modes) == 1  # whoever may read the one may read the other
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    theirs = torch_llm.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == load_file(tiny_llm / "model.safetensors").keys()


def test_shards_and_bin_hold_the_same(llm, torch_llm, tiny_llm, tmp_path):
    torch = pytest.importorskip("torch")
    torch_llm.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("bin", "bin_shards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tiny_llm / "config.json").read_text())
    state = torch_llm.state_dict()
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
    with says(tmp_path / "bin_shards/pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"):
        load_model(tmp_path / "bin_shards")
    assert has_weights(tmp_path / "bin_shards")  # else stage "lm" would begin with random weights, without a word


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tiny_llm, tmp_path, content):
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert has_weights(tmp_path)
    with says(tmp_path / "model.safetensors.index.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("weights_file", ["model.safetensors", "pytorch_model.bin"])
def test_bin_is_fetched_only_where_the_hub_has_no_safetensors(tmp_path, monkeypatch, weights_file):
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns=None):
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
        raise weights.SafetensorError("Error while serializing: I/O error: Out of room (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError) as error:
        weights.write_params(tmp_path, llm.config, llm.params)
    assert is_disk_full(error.value)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', '{"model": 3}'])
def test_a_broken_tokenizer_is_named(tiny_llm, tmp_path, content):
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text(content)
    with says("tokenizer", tmp_path):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_sentencepiece_alone(tiny_llm, tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with says(tmp_path / "spiece.model", "pip install sentencepiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tiny_llm / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text((tiny_llm / "tokenizer_config.json").read_text())
    monkeypatch.undo()
    assert load_tokenizer(tmp_path)("w3", add_special_tokens=False)["input_ids"] == [5]


def test_a_space_before_a_text_is_not_doubled(tmp_path):
    """As tokenizer.json of Mistral 7B v0.1 has it; ours is that of SentencePiece, and stays so when it is saved."""
    from tokenizers import Tokenizer, models, normalizers

    pieces = ["<unk>", "▁", "w", "1", "▁w", "▁w1", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "w"), ("▁w", "1"), ("▁", "▁")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    read = load_tokenizer(tmp_path)
    read.save_pretrained(tmp_path / "again")
    shutil.copyfile(tmp_path / "config.json", tmp_path / "again" / "config.json")
    write_tokenizer(tmp_path / "written", tmp_path)
    stock = [tokenizer_files.load(tmp_path / name) for name in ("again", "written")]
    for tokenizer in (read, load_tokenizer(tmp_path / "again"), *stock):
        said = [
            tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
            for text in (" w1", "w1", " w1 w1", "  w1", "w1\n  w1")
        ]
        assert said == [["▁w1"], ["▁w1"], ["▁w1", "▁w1"], ["▁", "▁w1"], ["▁w1", "<unk>", "▁", "▁w1"]]


def test_half_precision_files_are_read(llm, torch_llm, tmp_path):
    torch = pytest.importorskip("torch")
    import copy

    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        copy.deepcopy(torch_llm).to(dtype).save_pretrained(folder)
        ours = load_model(folder).params
        rounded = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}[str(dtype).removeprefix("torch.")]
        wanted = jax.tree.map(lambda leaf, rounded=rounded: leaf.astype(rounded).astype(jnp.float32), llm.params)
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, wanted))


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda t: t | {"transformer.h.9.ln_1.bias": t[LN]}, ["transformer.h.9.ln_1.bias", "2-layer gpt2"]),
        (lambda t: t | {"classifier.weight": t[LN]}, ["classifier.weight", "2-layer gpt2"]),
        (lambda t: t | {"wte.weight": t[WTE]}, ["wte.weight twice"]),
        (lambda t: {name: tensor for name, tensor in t.items() if name != LN}, ["lacks ln_f.bias"]),
        (lambda t: t | {WTE: t[WTE][:-1]}, ["transformer.wte.weight", "shape (63, 32)", "asks for (64, 32)"]),
    ],
)
def test_keys_that_do_not_fit_are_refused_by_name(tiny_llm, tmp_path, change, facts):
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    save_file(change(load_file(tiny_llm / "model.safetensors")), tmp_path / "model.safetensors")
    with says(*facts):
        load_model(tmp_path)


def test_a_key_in_two_shards_is_refused(tiny_llm, tmp_path):
    tensors = load_file(tiny_llm / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({LN: tensors[LN]}, tmp_path / "b.safetensors")
    index = {"weight_map": {**dict.fromkeys(tensors, "a.safetensors"), LN: "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with says(tmp_path, "ln_f.bias twice"):
        load_model(tmp_path)


def test_damaged_files_are_named(tiny_llm, tmp_path):
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    whole = (tiny_llm / "model.safetensors").read_bytes()
    for content in (whole[:-100], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with says(tmp_path / "model.safetensors"):
            load_model(tmp_path)


def test_an_arbitrary_pickle_is_never_run(tiny_llm, tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with says(tmp_path / "pytorch_model.bin"):
        load_model(tmp_path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smollm2-135m", "smollm2-135m-instruct"),
        ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m-instruct"),
        ("gemma-3-270m", "gemma3-270m"),
        ("gpt2-large", None),
        ("smollm2-360m", None),
        ("g", None),
    ],
)
def test_a_name_like_a_packaged_one_asks_whether_that_is_meant(name, meant, monkeypatch):
    def no_such_name(*_, **__):
        raise OSError("no such name")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_such_name)
    with says(name, "no such name", f"did you mean {meant}?" if meant else "check the name"):
        load_llm(name)


def test_settings_are_known_of_models_on_this_machine_alone(tiny_llm, tmp_path, monkeypatch):
    """A folder, and what the hub's cache holds; nothing is asked of the hub, not even for a name that it may have."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--someone--mine"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    shutil.copy(tiny_llm / "config.json", cached / "snapshots" / "1")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    known = from_hf_config(tiny_llm)
    assert settings_here(tiny_llm) == settings_here("someone/mine") == known
    for path in ("someone/other", tmp_path / "not there", "./not/there", "a b/c", tmp_path / "damaged"):
        assert settings_here(path) is None
