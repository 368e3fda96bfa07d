"""The server over real sockets: its packs and its answers, in which company changes nothing; its metrics and pages."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import states

pytest.importorskip("fastapi")
import tokenizer_files  # noqa: E402
from serving_client import (  # noqa: E402
    DEMOS,
    FILE,
    LINES,
    OBJECTS,
    OPTIONS,
    Together,
    held,
    make_engine,
    running,
    score,
    wait_until,
)

import mend_jax  # noqa: E402
from mend_jax.generation.generate import Wanted  # noqa: E402
from mend_jax.llm.encoder_decoder import EncoderDecoderLLM  # noqa: E402
from mend_jax.models import encoder_decoder  # noqa: E402
from mend_jax.models.families import from_hf_config  # noqa: E402
from mend_jax.prefixes import Chunked  # noqa: E402
from mend_jax.prefixes.prefix import Prefix  # noqa: E402
from mend_jax.scoring.tasks import programs_compiled  # noqa: E402
from mend_jax.serving import pages  # noqa: E402
from mend_jax.serving.engine import Asked, Before, Engine  # noqa: E402
from mend_jax.serving.examples import Example  # noqa: E402
from mend_jax.serving.kept import Kept  # noqa: E402
from mend_jax.serving.limits import Limits  # noqa: E402
from mend_jax.serving.service import bytes_of  # noqa: E402


@pytest.fixture(scope="module")
def llm(serving_models):
    return serving_models[0]


@pytest.fixture(scope="module")
def client(serving_models):
    with running(make_engine(serving_models)) as made:
        yield made


@pytest.fixture(scope="module")
def pack(client):
    """The id of a pack that is there."""
    return client.post("/packs", OBJECTS)["id"]


# Packs


def test_the_same_demonstrations_are_one_pack(client, packs, llm, tmp_path):
    status, made, _ = client.ask("POST", "/packs", OBJECTS[1:3])
    assert (status, made["num_vectors"], made["num_demonstrations"], made["template"]) == (201, 4, 2, "space")
    lines = "\r\n".join(map(json.dumps, [row | {"task": "t"} for row in OBJECTS[1:3]])) + "\n\n"
    assert client.ask("POST", "/packs", b"\xef\xbb\xbf" + lines.encode(), LINES)[:2] == (200, made)
    assert client.ask("GET", f"/packs/{made['id']}")[:2] == (200, made)
    status, content, _ = client.ask("GET", f"/packs/{made['id']}/file")
    (tmp_path / "a.safetensors").write_bytes(content)
    read = mend_jax.load_pack(tmp_path / "a.safetensors", llm)
    np.testing.assert_allclose(read.vectors, packs[1].vectors, rtol=1e-5, atol=1e-6)
    packs[1].save(tmp_path / "b.safetensors")
    status, taken, _ = client.ask("POST", "/packs", (tmp_path / "b.safetensors").read_bytes(), FILE)
    assert status == 201 and taken["id"] != made["id"] and taken | {"id": made["id"]} == made
    names = [one["id"] for one in client.ask("GET", "/packs")[1]["packs"]]
    assert names[:2] == [taken["id"], made["id"]]  # used last, used before
    for status in (204, 404):
        assert client.ask("DELETE", f"/packs/{taken['id']}")[0] == status
    assert client.ask("GET", f"/packs/{taken['id']}")[0] == 404


def test_packs_make_room_and_are_made_again(serving_models, packs):
    one = bytes_of(packs[0])
    with running(make_engine(serving_models, pack_bytes=one, cache_bytes=1)) as client:
        first = client.post("/packs", OBJECTS)["id"]
        before = score(client, pack=first)["answers"]
        second = client.post("/packs", OBJECTS[:1])["id"]
        status, said, _ = client.ask("POST", "/score", {"input": "w4", "options": OPTIONS, "pack": first})
        assert status == 404
        states(said["error"], repr(first), "upload")
        assert client.ask("GET", f"/packs/{second}")[0] == 200
        assert client.post("/packs", OBJECTS)["id"] == first and score(client, pack=first)["answers"] == before
        metrics = client.ask("GET", "/metrics")[1].decode()
        assert "mend_packs_evicted 2.0" in metrics and "mend_packs 1.0" in metrics and "mend_cache_bytes 0.0" in metrics
    with running(make_engine(serving_models, pack_bytes=one - 1)) as client:
        status, said, _ = client.ask("POST", "/packs", OBJECTS)
        assert status == 413
        states(said["error"], f"{one:,} bytes", "--pack_bytes")


def test_what_is_used_least_recently_goes_first():
    kept = Kept(10, len)
    assert kept.put("a", "aaaa") and kept.put("b", "bbbb") and kept.get("a")
    assert kept.put("c", "cccc") and kept.get("b") is None and (kept.bytes, kept.evicted, len(kept)) == (8, 1, 2)
    assert not kept.put("d", "d" * 11) and [key for key, _ in kept.items()] == ["c", "a"]
    assert kept.put("c", "cc") and kept.bytes == 6 and kept.remove("c") and not kept.remove("c") and kept.bytes == 4


# Answers


def padded(prefix):
    """To the columns that the server pads to, so that it shares the compiled programs of what it is compared with."""
    return Prefix(jnp.pad(prefix.embeds, ((0, 0), (0, 16 - prefix.embeds.shape[1]), (0, 0))), prefix.length)


def test_scores_are_those_of_python(client, pack, packs, llm):
    for fields, prefix, length in (
        ({"pack": pack}, packs[0].prefix, 4),
        ({"demonstrations": OBJECTS}, mend_jax.demonstrations_prefix(llm, DEMOS), 11),
        ({"template": "newline"}, None, 0),
    ):
        found = score(client, **fields)
        [answer] = found["answers"]
        assert (found["prefix_positions"], answer["positions"]) == (length, 2)
        given = padded(prefix) if prefix else mend_jax.no_prefix(1, 32)
        wanted = mend_jax.score_options(llm, given, "w4 w8", OPTIONS, fields.get("template"))
        assert list(answer["scores"].values()) == pytest.approx(wanted, abs=1e-5)
        assert answer["prediction"] == OPTIONS[int(np.argmax(wanted))]


def test_answers_are_those_of_python(client, pack, packs, llm):
    asked = {"input": ["w4 w8", "w7"], "pack": pack, "max_tokens": 6}
    tiny = client.post("/generate", asked | {"temperature": 1e-300})["answers"]
    assert tiny == client.post("/generate", asked)["answers"]  # so small that the device has 0
    for fields in ({}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}):
        found = client.post("/generate", asked | fields)["answers"]
        wanted = mend_jax.generate_text(llm, padded(packs[0].prefix), asked["input"], 6, **fields)
        assert found == [
            {"positions": n, "text": one.text, "finish": one.finish, "tokens": len(one.tokens)}
            for n, one in zip((2, 1), wanted, strict=True)
        ]
    word = wanted[0].text.split()[2]
    cut = client.post("/generate", asked | fields | {"stop": [word]})["answers"][0]
    assert cut["finish"] == "stop" and word not in cut["text"]


def assert_company_changes_nothing(answer, asked):
    """Each request alone, as in one batch of them all."""
    for together, one in zip(answer(asked), asked, strict=True):
        [alone] = answer([one])
        assert together[:2] == alone[:2]
        for value, wanted in zip(together.found, alone.found, strict=True):
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(value, wanted, atol=2e-6)
            else:
                assert value == wanted


def test_company_changes_no_answer(serving_models, packs):
    """Of whatever stands before the query; also of what is drawn, in more passes than one, and after what was kept."""
    engine, space = make_engine(serving_models, batch_size=4), packs[0].template
    before = [Before(space, one, key=str(i)) for i, one in enumerate(packs)]
    before += [Before(space, demos=tuple(DEMOS[:2])), Before(space, demos=tuple(DEMOS[2:])), Before(space, key="")]
    inputs = ["w4", "w1 w2 w3 w4 w5", "w8 w9"]
    asked = [Asked(one, [inputs[i % 3]], OPTIONS[: 1 + i % 2]) for i, one in enumerate(before)]
    assert_company_changes_nothing(engine.score, [*asked, Asked(before[1], inputs, OPTIONS)])
    assert_company_changes_nothing(engine.score, asked[:2])
    wanted = [Wanted(5 + i // 2, 0.5 + i / 10, 1 - i / 20, (), i, " ") for i in range(3)]
    asked = [Asked(one, [x], wanted=how) for one, x, how in zip(before[:3], inputs, wanted, strict=True)]
    assert_company_changes_nothing(engine.generate, [*asked, Asked(before[0], inputs[:2], wanted=wanted[1])])


def test_company_changes_no_answer_of_an_encoder_decoder(llm, packs):
    config = from_hf_config(tokenizer_files.T5 | {"d_model": 32, "vocab_size": llm.config.vocab_size})
    shapes = jax.eval_shape(lambda: encoder_decoder.init_params(config, 0))
    params = jax.tree.map(lambda one: jnp.asarray(0.3 * np.random.randn(*one.shape), jnp.float32), shapes)
    engine = Engine(EncoderDecoderLLM(config, params, llm.tokenizer, "t5", "float32"), None, {}, 8, Limits())
    before = [Before(one.template, one, key=str(i)) for i, one in enumerate(packs)]
    asked = [Asked(one, [x], OPTIONS) for one, x in zip(before, ("w4", "w1 w2 w3"), strict=True)]
    assert_company_changes_nothing(engine.score, asked)


def test_who_waits_together_is_answered_together(client, pack):
    """And one whose query does not fit spoils nothing."""
    asked = [{"pack": pack}, {"demonstrations": OBJECTS}, {}, {"pack": pack, "input": " ".join(["w1"] * 100)}]
    alone = [score(client, **fields)["answers"] for fields in asked[:3]]
    with held(client.service) as hold:
        first = Together(score, (client,))
        hold.until_begun()
        rest = Together(
            lambda fields: client.ask("POST", "/score", {"input": "w4 w8", "options": OPTIONS} | fields),
            *[(one,) for one in asked],
        )
        wait_until(lambda: client.service.worker.waiting == 4)
        hold.release()
        first.answers()
    *good, (status, said, _) = rest.answers()
    assert status == 422 and "96" in said["error"]
    for (status, found, _), wanted in zip(good, alone, strict=True):
        assert status == 200 and found["together"] == 4
        for one, other in zip(found["answers"], wanted, strict=True):
            assert list(one["scores"].values()) == pytest.approx(list(other["scores"].values()), abs=2e-6)


def test_a_request_that_fails_fails_alone(client, capfd):
    """A defect, or a device that is out of memory."""
    answer = client.service.worker._answer

    def broken(kind, asked):
        if any(one.inputs == ["w13"] for one in asked):
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return answer(kind, asked)

    with held(client.service) as hold:
        first = Together(score, (client,))
        hold.until_begun()
        client.service.worker._answer = broken
        rest = Together(lambda x: client.ask("POST", "/score", {"input": x, "options": OPTIONS}), ("w13",), ("w12",))
        wait_until(lambda: client.service.worker.waiting == 2)
        hold.release()
        first.answers()
        (status, said, _), (other, found, _) = rest.answers()
    assert (status, other) == (500, 200) and found["answers"]
    states(said["error"], "log")


# The edge


def test_what_is_no_http_and_other_hosts(client):
    with client.raw(b"\x16\x03\x01 hello\r\n\r\n") as raw:
        said = raw.makefile("rb").read()
    assert said.startswith(b"HTTP/1.1 400") and b'{"error":' in said
    status, said, _ = client.ask("GET", "/health", Host="evil.example")
    assert status == 421
    states(said["error"], "localhost")
    for host in ("localhost:1", "[::1]:80", "127.0.0.1"):
        assert client.ask("GET", "/health", Host=host)[0] == 200
    status, said, _ = client.ask("PUT", "/score")
    assert status == 405 and said.keys() == {"error"}


def test_metrics_count_what_was_asked(client, pack):
    score(client, pack=pack)
    client.ask("POST", "/score", b"{")
    text = client.ask("GET", "/metrics")[1].decode()
    for line in (
        'mend_requests_total{endpoint="score",status="200"}',
        'mend_requests_total{endpoint="score",status="400"}',
    ):
        assert float(text.partition(line)[2].split()[0]) >= 1
    assert "mend_batch_requests_count" in text and "mend_request_seconds_bucket" in text and "mend_waiting 0.0" in text


def test_pages_load_nothing_from_elsewhere(client):
    openapi = client.ask("GET", "/openapi.json")[1]
    _, docs, headers = client.ask("GET", "/docs")
    paths = {
        "/packs",
        "/packs/{pack_id}",
        "/packs/{pack_id}/file",
        "/score",
        "/generate",
        "/health",
        "/info",
        "/metrics",
    }
    assert openapi["paths"].keys() == paths and all(path in docs.decode() for path in paths)
    assert "only the likeliest tokens".lower() in docs.decode().lower() and "max_tokens" in docs.decode()
    for page, sent in ((docs, headers), client.ask("GET", "/")[1:]):
        text = page.decode()
        assert not [word for word in ("http://", "https://", "src=", "@import", "url(") if word in text]
        assert "default-src 'none'" in sent["Content-Security-Policy"] and sent["X-Content-Type-Options"] == "nosniff"
    assert client.ask("GET", "/info")[1]["window"] == 96


@pytest.mark.parametrize("join, each", [(None, False), ("concat", True), ("mean", False)])
def test_info_says_whether_there_are_so_many_vectors_of_each_chunk(join, each, serving_models):
    llm, distiller, workdir = serving_models
    models = llm, Chunked.around(distiller, join, chunk_demos=1) if join else distiller, workdir
    with running(make_engine(models)) as client:
        info = client.ask("GET", "/info")[1]
    assert (info["vectors"], info["of_each_chunk"]) == (4, each)
    assert "info.of_each_chunk" in pages.home().html


def test_the_reference_escapes_what_it_shows():
    said = {"description": "<script>alert(1)</script>"}
    page = pages.reference({"paths": {"/<b>": {"get": {"responses": {"400": said}} | said}}})
    assert (
        "<script>" not in page.html
        and "/<b>" not in page.html
        and "script-src 'none'" in page.headers["Content-Security-Policy"]
    )


def test_a_question_like_the_example_compiles_nothing_after_the_warm_up(serving_models, capsys):
    """Programs of other tests are dropped before."""
    jax.clear_caches()
    engine = make_engine(serving_models)
    engine.warm_up(Example(DEMOS, "w4", OPTIONS))
    assert [key for key, _ in engine.caches.items()] == [""]
    said = capsys.readouterr().err  # what the user sees of it
    assert "packs: 2 of 2 packs in" in said and re.search(r"answers: (\d+) of \1 questions in", said)
    with running(engine) as client:
        before, pack = programs_compiled(), client.post("/packs", OBJECTS)["id"]
        for fields in ({"pack": pack}, {"demonstrations": OBJECTS}, {}):
            assert score(client, **fields, input="w5")["answers"]
            assert client.post("/generate", fields | {"input": "w5", "max_tokens": 16})["answers"]
        assert programs_compiled() == before
