"""The public API: `import mend_jax` is quick, every name is there, and mistakes are said in one sentence."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from facts import says

import mend_jax
from configs import base
from mend_jax.prefixes import KINDS
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.soft_prompt import SoftPrompt

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return mend_jax.load_llm(tiny_llm)


@pytest.fixture(scope="module")
def distiller(llm, tiny_backbone):
    config = base.get_config()
    config.prefix.backbone, config.prefix.length = str(tiny_backbone), 5
    return Distiller.init(config, llm, seed=0)


def test_importing_is_quick_and_every_name_is_there():
    program = """if True:
        import sys, mend_jax
        assert "jax" not in sys.modules and "torch" not in sys.modules
        assert set(mend_jax.__all__) <= set(dir(mend_jax))
        from mend_jax import *
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in mend_jax.__all__:
        assert getattr(mend_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="load_lm"):
        mend_jax.load_lm  # noqa: B018


def test_distil_one_context_several_and_texts(distiller):
    one = distiller.distill([3, 4, 5])
    assert one.embeds.shape == (1, 5, 32) and one.length.tolist() == [5]
    several = distiller.distill([[3, 4, 5], [9] * 40, (7, 8)])
    assert several.embeds.shape == (3, 5, 32)
    assert np.abs(several.embeds[0] - one.embeds[0]).max() < 1e-5
    texts = distiller.distill([("w1", "w2"), ("w3", "w0")])
    ids = distiller.distill([3, 4, 5, 2])
    assert np.array_equal(texts.embeds, ids.embeds)
    assert np.array_equal(distiller.distill(np.array([3, 4, 5])).embeds, one.embeds)


def test_demonstrations_prefix_is_the_embedded_text(llm):
    prefix = mend_jax.demonstrations_prefix(llm, [("w1", "w2")])
    assert np.array_equal(prefix.embeds[0], llm.params["embed"]["tokens"][np.array([3, 4])])
    ragged = mend_jax.demonstrations_prefix(llm, [[3, 4], [5]])
    assert ragged.embeds.shape == (2, 2, 32) and ragged.length.tolist() == [2, 1]


def test_score_options_reads_ids_and_texts(llm, distiller):
    prefix = distiller.distill([("w1", "w2")])
    scores = mend_jax.score_options(llm, prefix, "w5 w6", ["w1", "w2 w3"])
    assert scores == mend_jax.score_options(llm, prefix, [7, 8], [[3], [4, 5]])
    assert len(scores) == 2 and all(isinstance(score, float) and score < 0 for score in scores)
    assert scores != mend_jax.score_options(llm, mend_jax.no_prefix(1, 32), [7, 8], [[3], [4, 5]])
    several = mend_jax.score_options(llm, prefix, ["w5 w6", "w7"], ["w1", "w2 w3"])
    alone = mend_jax.score_options(llm, prefix, "w7", ["w1", "w2 w3"])
    assert [pytest.approx(scores, abs=1e-5), pytest.approx(alone, abs=1e-5)] == several


def test_training_losses_of_one_example(llm, distiller):
    losses = mend_jax.training_losses(llm, distiller, [3, 4, 5, 6], [7, 8], [9])
    assert set(losses) == {"kd", "pred", "clm"} and all(isinstance(value, float) for value in losses.values())
    assert losses["kd"] > 0
    option = mend_jax.score_options(llm, distiller.distill([3, 4, 5, 6]), [7, 8], [[9]])
    assert losses["pred"] == pytest.approx(-option[0], abs=1e-5)  # a score is the log-probability that L_pred raises
    assert losses == mend_jax.training_losses(llm, distiller, [("w1", "w2"), ("w3", "w4")], "w5 w6", "w7")
    longer = mend_jax.training_losses(llm, distiller, [3, 4, 5, 6], [7], [8, 9])
    assert longer["clm"] == pytest.approx(longer["pred"], abs=1e-6)  # the first token of the query carries no loss


@pytest.mark.parametrize("join", ["concat", "mean"])
@pytest.mark.slow
def test_training_losses_of_chunks(llm, distiller, join):
    """With "concat" the prefix is as long as its chunks are many, longer here than the demonstrations' 7 tokens."""
    chunked = mend_jax.Chunked.around(distiller, join, chunk_demos=1)
    demos = [("w1", "w2"), ("w3 w4", "w5"), ("w6", "w7")]
    losses = mend_jax.training_losses(llm, chunked, demos, "w5 w6", "w7")
    option = mend_jax.score_options(llm, chunked.distill(demos), "w5 w6", ["w7"])
    assert losses["pred"] == pytest.approx(-option[0], abs=1e-5) and losses["kd"] > 0
    length = 3 * 5 if join == "concat" else 7
    with says(f"{length + 96} positions", f"{length} of them"):
        mend_jax.training_losses(llm, chunked, demos, [4] * 95, [5])
    with says("one context", 2):
        mend_jax.training_losses(llm, chunked, [[1, 2], [3]], [4], [5])


@pytest.mark.slow
def test_training_losses_of_the_other_kinds(llm):
    config = base.get_config()
    config.prefix.length, config.data.template = 4, "newline"
    prompt = SoftPrompt.init(config, llm, seed=0)
    assert prompt.separator == "\n"
    nothing, shown = KINDS["nothing"].beside(llm), KINDS["demonstrations"].beside(llm)
    for model in (prompt, nothing, shown):
        losses = mend_jax.training_losses(llm, model, [3, 4, 5, 6], [7, 8], [9])
        option = mend_jax.score_options(llm, model.distill([3, 4, 5, 6]), [7, 8], [[9]])
        assert losses["pred"] == pytest.approx(-option[0], abs=1e-5)
        assert losses["kd"] > 1e-4 if model is not shown else losses["kd"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_a_bfloat16_llm(tiny_llm, distiller):
    llm = mend_jax.load_llm(tiny_llm, dtype="bfloat16")
    assert llm.params["embed"]["tokens"].dtype == jnp.bfloat16
    exact = mend_jax.load_llm(tiny_llm)
    prefix = distiller.distill([3, 4, 5])
    scores = [mend_jax.score_options(model, prefix, [7, 8], [[3], [4, 5]]) for model in (llm, exact)]
    assert scores[0] == pytest.approx(scores[1], abs=0.15)


def test_a_soft_prompt_ignores_demonstrations(llm):
    config = base.get_config()
    config.prefix.length = 4
    prompt = SoftPrompt.init(config, llm, seed=0)
    prefix = prompt.apply(prompt.params, jnp.zeros((3, 7), jnp.int32), jnp.zeros(3, jnp.int32))
    assert prefix.embeds.shape == (3, 4, 32) and np.array_equal(prefix.embeds[0], prefix.embeds[2])


@pytest.mark.parametrize(
    ("call", "facts"),
    [
        (lambda llm, d: mend_jax.load_llm("/nowhere/model"), ["/nowhere/model"]),
        (lambda llm, d: mend_jax.load_llm(llm.path, dtype="float8"), ["dtype", "'float8'"]),
        (lambda llm, d: mend_jax.load_llm(llm.path, attention="flash"), ["attention", "'flash'"]),
        (lambda llm, d: d.distill([]), ["no demonstrations"]),
        (lambda llm, d: d.distill([[], []]), ["context", "empty"]),
        (lambda llm, d: d.distill([[3, 4], []]), ["context", "empty"]),
        (lambda llm, d: d.distill([3] * 76), ["76 tokens"]),
        (lambda llm, d: d.distill([3, 64]), ["token 64"]),
        (lambda llm, d: d.distill([3, -1]), ["token -1"]),
        (lambda llm, d: d.distill("some text"), ["pairs"]),
        (lambda llm, d: d.distill(["w1", "w2"]), ["list of texts", "(input, output)"]),
        (lambda llm, d: d.distill([("w1", "w2"), {"input": "w1", "output": "w2"}]), ["a pair of texts"]),
        (lambda llm, d: d.distill({"w1": "w2"}), ["list", "(input, output)"]),
        (lambda llm, d: mend_jax.demonstrations_prefix(llm, ["w1", "w2"]), ["list of texts", "(input, output)"]),
        (lambda llm, d: mend_jax.training_losses(llm, d, ["w1", "w2"], "w3", "w4"), ["list of texts", "pairs"]),
        (lambda llm, d: mend_jax.load_prefix(llm, "runs/mine"), ["load_prefix(PATH, llm)", "not LLM"]),
        (lambda llm, d: mend_jax.load_distiller(llm, "runs/mine"), ["load_prefix(PATH, llm)", "not LLM"]),
        (lambda llm, d: mend_jax.load_prefix("runs/mine", "gpt2"), ["'gpt2'", "load_llm"]),
        (lambda llm, d: d.distill(None), ["not None"]),
        (lambda llm, d: d.distill([None]), ["whole numbers"]),
        (lambda llm, d: d.distill([3.5, 4]), ["whole numbers"]),
        (lambda llm, d: d.distill([3, [4]]), ["whole numbers"]),
        (lambda llm, d: d.distill([[3], 4]), ["whole numbers"]),
        (lambda llm, d: d.distill([("w1",)]), ["a pair of texts"]),
        (lambda llm, d: d.distill([("w1", "w2", "w3")]), ["a pair of texts"]),
        (lambda llm, d: d.distill([("w1", 3)]), ["a pair of texts"]),
        (lambda llm, d: mend_jax.score_options(llm, d.distill([3]), [4], "w5"), ["options", "'w5'"]),
        (
            lambda llm, d: mend_jax.score_options(llm, d.distill([3]), [4], [3, 4]),
            ["option", "text", "token ids", "not 3"],
        ),
        (lambda llm, d: mend_jax.score_options(llm, d.distill([3]), [-1], [[3]]), ["token -1"]),
        (lambda llm, d: mend_jax.score_options(llm, d.distill([3]), [4], [[3, -2]]), ["token -2"]),
        (lambda llm, d: mend_jax.training_losses(llm, d, [[1, 2], [3]], [4], [5]), ["one context", 2]),
        (lambda llm, d: mend_jax.demonstrations_prefix(llm, [3] * 97), ["97 tokens"]),
        (lambda llm, d: mend_jax.score_options(llm, d.distill([3]), [4], []), ["no options"]),
        (lambda llm, d: mend_jax.score_options(llm, d.distill([3]), [4] * 92, [[5]]), ["97 positions", "at most 96"]),
        (lambda llm, d: mend_jax.score_options(llm, mend_jax.no_prefix(1, 24), [4], [[5]]), ["width 24", 32]),
        (lambda llm, d: mend_jax.score_options(llm, d.distill([3]), [64], [[5]]), ["token 64"]),
        (lambda llm, d: mend_jax.training_losses(llm, d, [3] * 90, [4] * 6, [5]), ["90 tokens", "at most 75"]),
        (lambda llm, d: mend_jax.training_losses(llm, d, [3], [4], []), ["output", "empty"]),
        (lambda llm, d: mend_jax.training_losses(llm, d, [3], "w5", ""), ["output", "empty"]),
        (
            lambda llm, d: mend_jax.training_losses(dataclasses.replace(llm, tokenizer=None), d, [3], [4], "w5"),
            ["output", "tokenizer", "token ids"],
        ),
        (lambda llm, d: mend_jax.training_losses(llm, d, [3] * 80, [4], [5]), ["80 tokens"]),
    ],
)
def test_mistakes_are_one_sentence(llm, distiller, call, facts):
    with says(*facts):
        call(llm, distiller)
