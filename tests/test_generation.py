"""Answers in the LLM's own words, against transformers' `generate` and against reading everything again.

Axes: B batch, P prefix, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_t5
from facts import says
from family_rows import make_row

from mend_jax.data.templates import TEMPLATES
from mend_jax.generation import generate
from mend_jax.generation.generate import END, LENGTH, STOP, generate_text
from mend_jax.generation.sampling import choose
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.prefix import Prefix

DECODERS = ("gpt2", "opt-350m", "mistral", "gemma3")  # positions learnt, offset, by RoPE; windows in all or some layers
T5 = ("t5-small", "flan-t5-xl")
QUERIES = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17]]


@pytest.fixture(scope="module", params=[*DECODERS, *T5])
def row(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    if request.param in DECODERS:
        return make_row(request.param, folder)
    return test_t5.make_row(request.param, folder)


def vectors(llm, length=5, padding=3, seed=0):
    """A prefix of random vectors, right-padded."""
    rows = 0.3 * np.random.default_rng(seed).standard_normal((1, length + padding, llm.config.width), np.float32)
    return Prefix(jnp.asarray(rows), jnp.asarray([length]))


def theirs(row, prefix, query, max_tokens):
    """The tokens of transformers' greedy `generate` on the same embeddings."""
    torch = pytest.importorskip("torch")
    ids = torch.tensor([query])
    before = torch.from_numpy(np.asarray(prefix.embeds[:, : int(prefix.length[0])]).copy())
    embeds = torch.cat([before, row.torch.get_input_embeddings()(ids)], 1)
    encoder_decoder = row.torch.config.is_encoder_decoder
    found = row.torch.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=row.torch.config.vocab_size + 1,  # none
        pad_token_id=1,
    )[0].tolist()
    return found[1:] if encoder_decoder else found  # the start token


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(row, monkeypatch):
    """In a batch of queries of different lengths, after vectors and after nothing; over several calls of the device."""
    monkeypatch.setattr(generate, "STEPS", 8)
    for prefix in (vectors(row.llm), no_prefix(1, row.llm.config.width)):
        found = generate_text(row.llm, prefix, QUERIES, 20)
        for query, answer in zip(QUERIES, found, strict=True):
            assert answer.tokens == theirs(row, prefix, query, 20) and answer.finish == LENGTH
    assert len({tuple(answer.tokens) for answer in found}) > 1


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return load_llm(tiny_llm)


def test_each_answer_is_that_of_its_query_alone(llm):
    """Greedy or drawn: the batch, its padding and the number of tokens made in one call change nothing."""
    for drawn in ({}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}):
        alone = [generate_text(llm, vectors(llm), [q], 12, **drawn)[0] for q in QUERIES]
        assert generate_text(llm, vectors(llm), [QUERIES[0]] * 2, 12, **drawn)[0] == alone[0]
        together = generate_text(llm, vectors(llm, padding=9), QUERIES, 12, batch_size=2, **drawn)
        assert together[0] == alone[0] and (drawn or together == alone)


def test_what_is_drawn_depends_on_the_seed_and_the_row(llm):
    def drawn(seed):
        return generate_text(llm, vectors(llm), [QUERIES[0]] * 4, 12, temperature=1.0, seed=seed)

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first == again != other
    assert len({tuple(answer.tokens) for answer in first}) == 4


def test_draws_have_the_nucleus_probabilities():
    """Probabilities 0.5, 0.3, 0.15, 0.05 at a temperature of 1, raised to the power of 1/temperature."""
    shares = np.array([0.3, 0.05, 0.5, 0.15])
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(shares, jnp.float32)), (len(keys), 4))
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.81, [0, 2, 3]), (0.79, [0, 2]), (0.2, [2])):
        for temperature in (1.0, 2.0):
            raised = shares ** (1 / temperature)
            wanted = np.zeros(4)
            nucleus = _nucleus(raised / raised.sum(), top_p)
            assert temperature == 2.0 or nucleus == kept
            wanted[nucleus] = raised[nucleus] / raised[nucleus].sum()
            found = np.bincount(np.asarray(jax.jit(choose)(logits, keys, temperature, top_p)), minlength=4) / len(keys)
            assert np.abs(found - wanted).max() < 0.02 and not found[wanted == 0].any()


def _nucleus(shares, top_p):
    order, total, kept = np.argsort(-shares), 0.0, []
    for i in order:
        if total < top_p:
            kept.append(int(i))
        total += shares[i]
    return sorted(kept)


def test_a_low_temperature_is_greedy(llm):
    greedy = generate_text(llm, vectors(llm), QUERIES, 10)
    assert generate_text(llm, vectors(llm), QUERIES, 10, temperature=1e-4) == greedy


def test_an_answer_ends_before_a_stop_string_and_at_the_end_of_the_text(llm, monkeypatch):
    monkeypatch.setattr(generate, "STEPS", 3)
    whole = generate_text(llm, vectors(llm), "w1 w2", 12, stop=())
    assert len(whole.tokens) == 12 and whole.text == llm.tokenizer.decode(whole.tokens)
    words = whole.text.split()
    last = next(i for i in range(4, 12) if words[i] not in words[:i])
    cut = generate_text(llm, vectors(llm), "w1 w2", 12, stop=["never", words[last]])
    assert (cut.text.split(), cut.finish) == (words[:last], STOP)
    assert len(cut.tokens) < 12 or last > 8  # no more calls of the device than are needed
    ends = whole.tokens[last]
    monkeypatch.setattr(generate, "end_tokens", lambda _: (ends,))
    ended = generate_text(llm, vectors(llm), "w1 w2", 12, stop=())
    assert (ended.tokens, ended.finish) == (whole.tokens[:last], END)


def test_an_answer_of_any_length_is_the_beginning_of_the_one_that_stops(llm):
    """However few tokens there are, nothing of a stop string is shown: the text is what more tokens would keep."""
    whole = generate_text(llm, vectors(llm), "w1 w2", 12, stop=()).text
    words = whole.split(" ")
    stop = " " + " ".join(words[4:8])
    stopped = whole[: whole.index(stop)]
    lengths = set()
    for most in range(1, 13):
        cut = generate_text(llm, vectors(llm), "w1 w2", most, stop=[stop, "never " + stop])
        assert stopped.startswith(cut.text) and (cut.finish == STOP or len(cut.tokens) == most)
        lengths.add((len(cut.text), cut.finish))
    assert (len(stopped), LENGTH) in lengths and (len(stopped), STOP) in lengths and len(lengths) > 3


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("negative\n\nInput", ("\n\nInput:", "\nOutput:"), "negative"),
        ("negative\n", ("\n\nInput:", "\nOutput:"), "negative"),
        ("negative\n\nInto", ("\n\nInput:",), "negative\n\nInto"),  # it became something else
        ("aab", ("b b", "abc", "aabb"), ""),  # the earliest of several
        ("end", (), "end"),
        ("end", ("d",), "end"),  # a stop of one character has no half
    ],
)
def test_only_the_begun_part_of_a_stop_is_held_back(text, stops, kept):
    assert generate._without_begun_stop(text, stops) == kept


def test_the_template_stands_around_the_query_and_ends_the_answer(llm):
    """Its words are of the tokenizer: the query is as `score_options` reads it."""
    ids = llm.tokenizer("Input: w1", add_special_tokens=False)["input_ids"]
    ids += llm.tokenizer("Output:", add_special_tokens=False)["input_ids"]
    [by_ids] = generate_text(llm, vectors(llm), [ids], 6, stop=())
    assert generate_text(llm, vectors(llm), "w1", 6, template="qa").tokens == by_ids.tokens


def test_without_a_tokenizer_there_are_tokens_alone(llm, tiny_llm):
    bare = dataclasses.replace(llm, tokenizer=None)
    [answer] = generate_text(bare, vectors(llm), [[5, 6]], 4)
    assert answer.text == "" and len(answer.tokens) == 4
    assert generate_text(bare, vectors(llm), [[5, 6]], 4, template="newline") == [answer]
    with says("tokenizer", str(tiny_llm), "stop"):
        generate_text(bare, vectors(llm), [[5, 6]], 4, stop="w1")


@pytest.mark.parametrize(
    "arguments, facts",
    [
        (([""],), ("query", "empty")),
        ((["w1"], 0), ("max_tokens", "0", "at least 1")),
        ((["w1"], 95), ("97", "96", "prefix")),
        (([[99]],), ("token 99", "64")),
    ],
)
def test_mistakes_are_one_sentence(llm, arguments, facts):
    with says(*facts):
        generate_text(llm, vectors(llm, length=1), *arguments)


@pytest.mark.parametrize("field, value", [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("batch_size", 0)])
def test_numbers_out_of_their_range(llm, field, value):
    with says(field, str(value)):
        generate_text(llm, vectors(llm), "w1", 4, **{field: value})


def test_where_an_answer_ends_without_stop_strings():
    """Before the next example and before a second answer; a space is no end."""
    assert TEMPLATES["qa"].stops == ("\n\nInput:", "\nOutput:")
    assert TEMPLATES["newline"].stops == ("\n",) and TEMPLATES["space"].stops == ()
