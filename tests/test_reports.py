"""What users of other programs of this kind have reported, tried here (docs/reliability.md lists the reports)."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from data_files import make_world, write_examples
from facts import says
from safetensors.numpy import load_file, save_file
from tiny_training import model_folder, write_tokenizer

from mend_jax.data import metaicl
from mend_jax.data.templates import chosen
from mend_jax.llm.decoder_only import load_llm
from mend_jax.models.folders import load_model
from mend_jax.packs.pack import Pack, load_pack
from mend_jax.prefixes.prefix import Prefix
from mend_jax.scoring.options import cache_prefix, score_items


def test_short_and_long_queries_after_vectors_score_as_alone(tmp_path):
    """Left-padded batches shift learned positions and part the soft prompt from its query (peft 1093, nnsight 673)."""
    llm, rng = load_llm(model_folder(tmp_path / "llm")), np.random.default_rng(0)
    vectors = rng.normal(size=(1, 4, 16)).astype(np.float32)
    cache = cache_prefix(llm, Prefix(vectors, np.asarray([4], np.int32)))
    words = lambda n: rng.integers(1, 40, n).tolist()  # noqa: E731
    items = [SimpleNamespace(x_tokens=words(n), options_tokens=[words(1), words(3)]) for n in (1, 17, 2, 30)]
    together = score_items(llm, cache, items, 4)
    for item, scores in zip(items, together, strict=True):
        np.testing.assert_allclose(score_items(llm, cache, [item], 1)[0], scores, atol=1e-5)


def test_a_part_of_the_vectors_is_not_taken_for_the_whole(tmp_path):
    """The first of a model's summary vectors alone give random answers (AutoCompressors 18)."""
    pack = Pack(np.ones((8, 16), np.float32), "gpt2", "0", "0", "m", "0", "distiller", chosen("space"), "false", 16)
    pack.save(tmp_path / "a.safetensors")
    save_file({"vectors": pack.vectors[:5]}, tmp_path / "b.safetensors", metadata=pack.metadata())
    with says(tmp_path / "b.safetensors", "8 vectors", "holds 5"):
        load_pack(tmp_path / "b.safetensors")
    assert load_pack(tmp_path / "a.safetensors").num_vectors == 8


def test_a_head_that_is_missing_is_tied_or_said(tmp_path):
    """Tied weights that a safetensors file leaves out were left as they were (transformers 38870, 43159)."""
    folder = model_folder(tmp_path / "llm")
    names = load_file(folder / "model.safetensors").keys()
    assert not [name for name in names if "lm_head" in name]
    assert "head" not in load_model(folder).params["embed"]
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": False}))
    with says(folder, "lm_head.weight"):
        load_model(folder)


def test_a_tokenizer_with_more_tokens_than_embeddings(tmp_path):
    """An added token without a row in the table ended in an index error (transformers 12763, EuroEval 52)."""
    from mend_jax.data.tokenize import check_tokenizer

    folder = model_folder(tmp_path / "llm")
    write_tokenizer(folder, [f"w{i}" for i in range(42)])
    model = load_model(folder)
    with says("ids up to 41", "40 tokens"):
        check_tokenizer(model.tokenizer, model.config.vocab_size, folder)


def test_k_that_the_files_were_not_made_for(tmp_path):
    """A number of examples that the preprocessing ignored (MetaICL 17): the first k of a larger file, or a sentence."""
    folder = make_world(tmp_path) / "metaicl"
    write_examples(
        folder / "data" / "t" / "t_16_13_train.jsonl", "t", [(f"w{i}", "w50") for i in range(16)], ["w50", "w51"]
    )
    assert [e.input for e in metaicl.read_examples(folder, "t", 8, 13, "train")] == [f"w{i}" for i in range(8)]
    with says("t_32_13_train.jsonl"):
        metaicl.read_examples(folder, "t", 32, 13, "train")


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_checkpoint_that_unpickles_runs_nothing(tmp_path):
    """Code in a .bin file that ran when it was loaded (vllm 12366, transformers 43140)."""
    torch = pytest.importorskip("torch")
    folder = model_folder(tmp_path / "llm")
    (folder / "model.safetensors").unlink()
    for old in (True, False):
        torch.save(
            {"wte.weight": Evil(tmp_path / "mark")},
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=not old,
        )
        with says(folder / "pytorch_model.bin", "PyTorch weights"):
            load_model(folder)
        assert not (tmp_path / "mark").exists()
