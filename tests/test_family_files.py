"""Folders of every decoder-only family: byte for byte in and out, and what is said where config.json and weights disagree."""

import json
import re

import jax
import numpy as np
import pytest
from facts import says
from family_rows import COMMON, IDS, ROWS, make_row, tokens, torch_model
from safetensors.numpy import load_file, save_file

from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import load_llm
from mend_jax.models.families import from_hf_config, to_hf_config
from mend_jax.models.folders import load_model, save_model
from mend_jax.prefixes.nothing import no_prefix

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=ROWS)
def row(request, tmp_path_factory):
    return make_row(request.param, tmp_path_factory.mktemp(request.param))


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
    free |= {"attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx"}
    assert {k: v for k, v in before.items() if k not in free} == {k: v for k, v in after.items() if k not in free}
    ids = torch.from_numpy(tokens(1, 30)).long()
    with torch.no_grad():
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(ids).logits
        assert torch.equal(again(ids).logits, kept)


def test_settings_survive_the_round_trip(row):
    assert from_hf_config(to_hf_config(row.llm.config)) == row.llm.config


@pytest.mark.parametrize(
    ("name", "change", "facts"),
    [
        (
            "opt-125m",
            {"max_position_embeddings": 62},
            ["embed_positions.weight", "shape (66, 24)", "asks for (64, 24)"],
        ),
        ("opt-125m", {"enable_bias": False}, ["bias", "2-layer opt"]),
        ("opt-350m", {"word_embed_proj_dim": 24}, [re.compile(r"embed_tokens\.weight|project_in\.weight")]),
        ("llama-2", {"num_key_value_heads": 2}, ["k_proj.weight", "shape (24, 24)", "asks for (12, 24)"]),
        ("llama-2", {"tie_word_embeddings": True}, ["lm_head.weight", "token table", "tie_word_embeddings"]),
        ("llama-3", {"tie_word_embeddings": False}, ["lacks lm_head.weight"]),
        ("qwen2", {"model_type": "llama"}, [re.compile(r"[qkv]_proj\.bias"), "2-layer llama"]),
        ("qwen3", {"head_dim": 6}, [re.compile(r"self_attn\.\w+\.weight"), "shape"]),
    ],
)
def test_a_config_that_disagrees_with_its_weights_is_named(tmp_path, name, change, facts):
    torch_model(ROWS[name]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with says(tmp_path, *facts):
        load_model(tmp_path)


def test_a_missing_shard_is_named(row, tmp_path):
    row.torch.save_pretrained(tmp_path, max_shard_size="10KB")
    whole = load_model(tmp_path).params
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, row.llm.params))
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with says(shard, "model.safetensors.index.json"):
        load_model(tmp_path)


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


def test_the_text_part_of_a_model_that_sees_images(tmp_path):
    """Under the names of the hub's files, which transformers saves, and under those that its modules have."""
    torch = pytest.importorskip("torch")
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    eyes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    text = COMMON | IDS | ROWS["gemma3"]
    fields = {"text_config": text, "vision_config": eyes | {"patch_size": 14}, "mm_tokens_per_image": 4}
    model = Gemma3ForConditionalGeneration(Gemma3Config(**fields, image_token_index=60)).eval()
    model.save_pretrained(tmp_path)
    ids = tokens(1, 30)
    ids[ids == 60] = 0
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids).long()).logits.numpy()
    stored = load_file(tmp_path / "model.safetensors")
    assert any("vision_tower" in name for name in stored)
    [now] = {name.partition("embed_tokens")[0] for name in stored if "embed_tokens" in name}
    for prefix in (now, "model.language_model."):
        renamed = {name.replace(now, prefix): tensor for name, tensor in stored.items()}
        save_file(renamed, tmp_path / "model.safetensors")
        llm = load_llm(tmp_path)
        assert llm.config.family == "gemma3_text"
        query = Query(ids, np.array([30]), np.zeros(1, np.int32))
        ours = llm.logits(llm.params, llm.states(llm.params, no_prefix(1, llm.config.width), query))
        assert np.abs(ours - wanted).max() < 1e-4
