"""Sentence encoders: BERT's family through sentence-transformers, as config.evaluate.encoder."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ONE_DEVICE, ROOT
from evaluation_world import make_config, write_tasks
from facts import says

from mend_jax.data import metaicl
from mend_jax.data.evaluation import load_tasks
from mend_jax.data.retrieval import read_pool
from mend_jax.llm.decoder_only import load_llm
from mend_jax.llm.embeddings import encoder_of
from mend_jax.llm.sentence_encoder import is_sentence_encoder, sentence_encoder
from mend_jax.run.checks import check_encoder

TEXTS = ["w1 w2 w3", "w4", "w1 w2 w3 w5 w6"]
library = pytest.importorskip("sentence_transformers")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder as the hub's BERT models are: no word of sentence-transformers in it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(40))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    named.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


def test_it_is_the_mean_of_its_states(bert):
    from transformers import AutoTokenizer, BertModel

    assert is_sentence_encoder(bert)
    name, encode = sentence_encoder(bert)
    found, model, tokenizer = encode(TEXTS), BertModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    assert found.dtype == np.float32 and found.shape == (3, 16)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(vector, states.mean(0).numpy(), atol=1e-5)


def test_a_folder_says_how_states_become_an_embedding(bert, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Normalize

    models = library.SentenceTransformer(str(bert), device="cpu")
    models.append(Normalize())
    models.save(str(tmp_path))
    name, encode = sentence_encoder(tmp_path)
    np.testing.assert_allclose(np.linalg.norm(encode(TEXTS), axis=1), 1, atol=1e-5)
    assert name != sentence_encoder(bert)[0]  # neighbours are kept by what the folder says
    for file in tmp_path.glob("*_Pooling/config.json"):
        file.write_text(file.read_text().replace("mean", "max"))
    assert name != sentence_encoder(tmp_path)[0]


def test_neighbours_by_its_embeddings(bert, tiny_llm, tmp_path):
    llm, config = load_llm(tiny_llm), make_config(write_tasks(tmp_path), tiny_llm)
    config.data.cache, config.evaluate.seeds = str(tmp_path / "cache"), (13,)
    config.evaluate.demos, config.data.k, config.evaluate.encoder = "dense", 1, str(bert)
    check_encoder(bert)
    name, encode = encoder_of(config, llm)
    [task, _], _ = load_tasks(config, llm, "test", (name, encode))
    pool = read_pool(config.data.tasks, task.task)
    items = metaicl.read_examples(config.data.tasks, task.task, 4, 13, "test")
    centred = [
        part - encode([one.input for one in pool]).mean(0)
        for part in (encode([one.input for one in pool]), encode([one.input for one in items]))
    ]
    for item, asked, example in zip(task.items, centred[1], items, strict=True):
        cosines = centred[0] @ asked / np.linalg.norm(centred[0], axis=1)
        own = [one.input == example.input for one in pool]
        best = pool[int(np.argmax(np.where(own, -np.inf, cosines)))]
        [shown] = [task.texts[i] for i in item.shown]
        assert best.input in shown[0]


@pytest.mark.slow
def test_a_command_which_hides_pytorch_reads_it(bert, tiny_llm, tmp_path):
    folder = write_tasks(tmp_path)
    fields = {
        "llm.path": tiny_llm,
        "data.tasks": folder,
        "data.partition": "tiny",
        "data.k": 2,
        "data.cache": tmp_path / "c",
    }
    fields |= {"evaluate.demos": "dense", "evaluate.encoder": bert, "evaluate.methods": "icl,", "evaluate.seeds": "13,"}
    fields |= {"data.max_demo_tokens": 48, "data.demo_buckets": "48,", "data.query_buckets": "32,"}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [
        sys.executable,
        "-m",
        "mend_jax.evaluate",
        "--config=configs/base.py",
        f"--workdir={tmp_path}/run",
        *flags,
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ONE_DEVICE, capture_output=True, text=True)
    assert done.returncode == 0 and "icl" in done.stdout, done.stderr


def test_what_cannot_be_read_is_one_sentence(bert, tmp_path, monkeypatch):
    shutil.copytree(bert, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with says(tmp_path / "cut", "sentence-transformers"):
        sentence_encoder(tmp_path / "cut")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with says(bert, "pip install sentence-transformers", "evaluate.encoder"):
        check_encoder(bert)
