"""What stands before every prefix: the LLM's BOS or nothing, decided in one place."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import says
from tiny_training import VOCAB, RandomBatches, config, model_folder

import mend_jax
from mend_jax import train
from mend_jax.cli.errors import UserError
from mend_jax.data.bos import bos_token
from mend_jax.data.query import Query
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run import build, reporting, resume, saved_config
from mend_jax.scoring.options import cache_prefix
from mend_jax.step import make_loss_fn

BOS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer begins every text with w7."""
    from tokenizers import Tokenizer, processors

    made = model_folder(tmp_path_factory.mktemp("bos") / "model")
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"w{BOS} $A", special_tokens=[(f"w{BOS}", BOS)])
    tokenizer.save(str(made / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": f"w{BOS}"}
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture(scope="module")
def plain(folder):
    return mend_jax.load_llm(folder)


@pytest.fixture(scope="module")
def llm(folder):
    return mend_jax.load_llm(folder, bos="auto")


class Tokenizer:
    """As transformers' are: it puts `front` before a text and `end` behind it."""

    def __init__(self, bos, front=(), end=()):
        self.bos_token_id, self.front, self.end = bos, list(front), list(end)

    def __call__(self, text):
        return {"input_ids": [*self.front, *map(ord, text), *self.end]}


@pytest.mark.parametrize(
    ("tokenizer", "auto", "true"),
    [
        (Tokenizer(2, front=[2]), 2, 2),  # Gemma, Llama, OPT
        (Tokenizer(2), None, 2),  # GPT-2
        (Tokenizer(None), None, UserError),  # Qwen
        (Tokenizer(None, end=[1]), None, UserError),  # T5
        (Tokenizer(1, end=[1]), None, 1),
        (None, None, UserError),
    ],
)
def test_what_the_setting_means(tokenizer, auto, true):
    assert bos_token("false", tokenizer, "folder") is None
    assert bos_token("auto", tokenizer, "folder") == auto
    if true is UserError:
        with says("folder", "BOS", "--config.data.bos=false"):
            bos_token("true", tokenizer, "folder")
    else:
        assert bos_token("true", tokenizer, "folder") == true


def behind_bos(plain, prefix):
    """The prefix with the BOS as a part of it, for the LLM that puts none before it."""
    first = plain.embed(plain.params, jnp.full((len(prefix.length), 1), BOS))
    return Prefix(jnp.concatenate([first, prefix.embeds], 1), prefix.length + 1)


def test_it_is_off_unless_asked_for_and_takes_a_position(plain, llm, folder):
    assert plain.bos is None and llm.bos == BOS == mend_jax.load_llm(folder, bos="true").bos
    assert llm.window == plain.window - 1
    with says("bos", "yes", "auto, true, false"):
        mend_jax.load_llm(folder, bos="yes")


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.slow
def test_states_behind_padded_prefixes(plain, llm, queries):
    """In training, of students and teachers alike, with one query or several behind each prefix."""
    width, lengths = llm.config.width, np.array([5, 0, 3])
    prefix = Prefix(np.random.randn(3, 5, width).astype(np.float32), lengths)
    rows = 3 * queries
    query = Query(np.random.randint(0, VOCAB, (rows, 6)), np.full(rows, 6), np.zeros(rows, np.int32))
    ours, wanted = llm.states(llm.params, prefix, query), plain.states(plain.params, behind_bos(plain, prefix), query)
    np.testing.assert_allclose(ours, wanted, atol=1e-5)
    assert np.abs(ours - plain.states(plain.params, prefix, query)).max() > 1e-2


@pytest.mark.parametrize("demos", [[], [3, 4, 5]])
@pytest.mark.slow
def test_scores_of_options(plain, llm, demos):
    """Of nothing and of demonstrations before the query; up to the last position of the window, and no further."""

    def of(reads):
        return mend_jax.demonstrations_prefix(reads, demos) if demos else mend_jax.no_prefix(1, reads.config.width)

    x, options = [1, 2], [[3, 4], [9]]
    wanted = mend_jax.score_options(plain, mend_jax.demonstrations_prefix(plain, [BOS, *demos]), x, options)
    np.testing.assert_allclose(mend_jax.score_options(llm, of(llm), x, options), wanted, atol=1e-5)
    assert int(cache_prefix(llm, of(llm)).length) == len(demos) + 1
    room = llm.window - len(demos)
    mend_jax.score_options(llm, of(llm), [1] * room, [[2], [3]])
    with says(llm.window + 1, f"at most {llm.window}"):
        mend_jax.score_options(llm, of(llm), [1] * (room + 1), [[2], [3]])


def test_a_run_reads_as_its_config_says(folder, plain, llm):
    for bos, reads in (("false", plain), ("auto", llm)):
        c = config(folder, **{"data.bos": bos})
        made = build.load(c)
        assert made.bos == reads.bos and build.readers_by_folders(c).window == reads.window
        assert build.build(c, made).bos == bos


def test_a_run_of_before_goes_on_without_it(folder, tmp_path):
    """And none goes on, or is begun from, with another setting."""
    c = config(folder)
    saved = c.to_dict()
    del saved["data"]["bos"]
    (tmp_path / saved_config.CONFIG).write_text(json.dumps(saved))
    resume.check_resume(tmp_path, c, finished=False)
    c.data.bos = "auto"
    with says(tmp_path, 'data.bos="false"', '"auto"'):
        resume.check_resume(tmp_path, c, finished=False)


ONE_STEP = {"data.bos": "auto", "train.steps": 1, "train.eval_every": 1, "train.log_every": 1}


@pytest.fixture(scope="module")
def first_losses(folder, plain, llm):
    """The first step's loss with the BOS and without it, on one device."""
    c = config(folder, **ONE_STEP)
    model, batch = build.build(c, llm), RandomBatches(c, None)[0]
    return [jax.jit(make_loss_fn(c, one, model))(model.params, one.params, batch)[1]["kd"] for one in (llm, plain)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["pmap", "mesh"])
def test_training_reads_behind_it(folder, first_losses, tmp_path, monkeypatch, parallel):
    """On several devices; the first step's loss is that of the LLM with its BOS."""
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    c = config(folder, **ONE_STEP | {"train.parallel": parallel})
    assert train.train(c, tmp_path / "run") == 0
    [found] = [line["kd"] for line in reporting.read_lines(tmp_path / "run" / "metrics.jsonl") if "kd" in line]
    wanted, other = first_losses
    assert found == pytest.approx(float(wanted), rel=1e-4) and found != pytest.approx(float(other), rel=1e-3)
