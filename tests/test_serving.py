"""The server over real sockets: what it answers, that company changes no answer, and what each bad request gets."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, ROOT
from facts import says, states

pytest.importorskip("fastapi")
import tokenizer_files  # noqa: E402
from serving_client import (  # noqa: E402
    DEMOS,
    FILE,
    JSON,
    LINES,
    NOTHING,
    Client,
    Together,
    held,
    make_engine,
    make_models,
    running,
    wait_until,
)

import mend_jax  # noqa: E402
from mend_jax import benchmark, serve  # noqa: E402
from mend_jax.cli import command_line  # noqa: E402
from mend_jax.cli.errors import UserError  # noqa: E402
from mend_jax.data.templates import TEMPLATES  # noqa: E402
from mend_jax.generation.generate import Answer, Wanted  # noqa: E402
from mend_jax.llm.encoder_decoder import EncoderDecoderLLM  # noqa: E402
from mend_jax.measure import serving  # noqa: E402
from mend_jax.models import encoder_decoder  # noqa: E402
from mend_jax.models.families import from_hf_config  # noqa: E402
from mend_jax.packs import make  # noqa: E402
from mend_jax.packs.pack import Pack  # noqa: E402
from mend_jax.prefixes.prefix import Prefix  # noqa: E402
from mend_jax.serving import pages, worker  # noqa: E402
from mend_jax.serving.engine import Answered, Asked, Before, Engine  # noqa: E402
from mend_jax.serving.http import Server, bound  # noqa: E402
from mend_jax.serving.kept import Kept  # noqa: E402
from mend_jax.serving.limits import Limits  # noqa: E402
from mend_jax.serving.service import bytes_of  # noqa: E402

OBJECTS = [{"input": x, "output": y} for x, y in DEMOS]
OPTIONS = ["w50", "w51"]
BAD_LIMITS = {"max_body": 4000, "max_file": 20_000, "max_demonstrations": 6, "max_inputs": 3, "max_options": 3}
BAD_LIMITS |= {"max_query_tokens": 40, "max_tokens": 20}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def llm(models):
    return models[0]


@pytest.fixture(scope="module")
def packs(models):
    """Of two sets of demonstrations."""
    llm, distiller, workdir = models
    return make.make_packs(llm, distiller, [DEMOS, DEMOS[1:3]], workdir)


@pytest.fixture(scope="module")
def engine(models):
    return make_engine(models, **BAD_LIMITS)


@pytest.fixture(scope="module")
def client(engine):
    with running(engine) as made:
        yield made


@pytest.fixture(scope="module")
def pack(client):
    """The id of a pack that is there."""
    return client.post("/packs", OBJECTS)["id"]


def score(client, **fields):
    return client.post("/score", {"input": "w4 w8", "options": OPTIONS} | fields)


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


def test_packs_make_room_and_are_made_again(models, packs):
    one = bytes_of(packs[0])
    with running(make_engine(models, pack_bytes=one, cache_bytes=1)) as client:
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
    with running(make_engine(models, pack_bytes=one - 1)) as client:
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


def test_company_changes_no_answer(models, packs):
    """Of whatever stands before the query; also of what is drawn, in more passes than one, and after what was kept."""
    engine, space = make_engine(models, batch_size=4), packs[0].template
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
    asked = [{"pack": pack}, {"demonstrations": OBJECTS}, {}, {"pack": pack, "input": " ".join(["w1"] * 50)}]
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
    assert status == 422 and "50" in said["error"]
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


# Bad requests


def changed_pack(packs, **facts):
    from safetensors.numpy import save

    return save({"vectors": packs[0].vectors}, packs[0].metadata() | facts)


QUESTION = {"input": "w1", "options": OPTIONS}
DEEP = b'{"input": ' + b"[" * 1500 + b"]" * 1500 + b"}"
BAD = {  # name: (path, body, content type, status, facts)
    "no JSON": ("/score", b"{", JSON, 400, ("JSON",)),
    "nothing": ("/score", b"", JSON, 400, ("JSON",)),
    "NaN": ("/generate", b'{"input": "w1", "temperature": NaN}', JSON, 400, ("JSON",)),
    "Infinity": ("/generate", b'{"input": "w1", "temperature": 1e999}', JSON, 422, ("temperature", "finite")),
    "not UTF-8": ("/score", b'{"input": "\xe4"}', JSON, 400, ("UTF-8", "byte 11")),
    "half a character": ("/score", rb'{"input": "\ud800", "options": ["w1"]}', JSON, 400, ("JSON",)),
    "deep": ("/score", DEEP, JSON, 400, ("recursion",)),
    "no object": ("/score", [1], JSON, 422, ("The body",)),
    "content type": ("/score", b"input=w1", "application/x-www-form-urlencoded", 415, (JSON, "urlencoded")),
    "text as a browser sends it": ("/score", json.dumps(QUESTION).encode(), "text/plain", 415, (JSON,)),
    "no input": ("/score", {"options": OPTIONS}, JSON, 422, ("input", "required")),
    "unknown field": ("/score", QUESTION | {"inputs": "w1"}, JSON, 422, ("inputs",)),
    "another type": ("/score", QUESTION | {"input": ["w1", 3]}, JSON, 422, ("input[1]", "string")),
    "a path as id": ("/score", QUESTION | {"pack": "../../etc/passwd"}, JSON, 404, ("../../etc/passwd", "upload")),
    "empty query": ("/score", QUESTION | {"input": " "}, JSON, 422, ("Input 1", "empty")),
    "query of no tokens": ("/score", QUESTION | {"input": NOTHING}, JSON, 422, ("empty",)),
    "no queries": ("/score", QUESTION | {"input": []}, JSON, 422, ("inputs",)),
    "many queries": ("/score", QUESTION | {"input": ["w1"] * 4}, JSON, 422, ("3", "inputs")),
    "long query": ("/score", QUESTION | {"input": "w1 " * 41}, JSON, 422, ("41", "40")),
    "beyond the window": ("/score", QUESTION | {"demonstrations": [{"input": "w1 " * 95, "output": "w2"}]}, JSON, 422, ("97", "96")),
    "demonstrations beyond the window": ("/score", QUESTION | {"demonstrations": [{"input": "w1 " * 100, "output": "w2"}]}, JSON, 422, ("101", "96")),
    "answer beyond the window": ("/generate", {"input": "w1", "max_tokens": 20, "demonstrations": [{"input": "w1 " * 80, "output": "w2"}]}, JSON, 422, ("102", "96")),
    "no options": ("/score", QUESTION | {"options": []}, JSON, 422, ("options",)),
    "many options": ("/score", QUESTION | {"options": ["w1", "w2", "w3", "w4"]}, JSON, 422, ("3", "options")),
    "empty option": ("/score", QUESTION | {"options": ["w1", " "]}, JSON, 422, ("Option 2",)),
    "option of no tokens": ("/score", QUESTION | {"options": ["w1", NOTHING]}, JSON, 422, ("option", "empty")),
    "option twice": ("/score", QUESTION | {"options": ["w1", "w1"]}, JSON, 422, ("'w1'", "twice")),
    "pack and demonstrations": ("/score", QUESTION | {"pack": "a", "demonstrations": OBJECTS}, JSON, 422, ("one of them",)),
    "unknown template": ("/score", QUESTION | {"template": "no"}, JSON, 422, ("template", "newline")),
    "no demonstrations": ("/score", QUESTION | {"demonstrations": []}, JSON, 422, ("demonstrations",)),
    "many tokens": ("/generate", {"input": "w1", "max_tokens": 21}, JSON, 422, ("21", "20")),
    "no tokens": ("/generate", {"input": "w1", "max_tokens": 0}, JSON, 422, ("max_tokens",)),
    "top_p": ("/generate", {"input": "w1", "top_p": 1.5}, JSON, 422, ("top_p",)),
    "seed": ("/generate", {"input": "w1", "seed": 2**31}, JSON, 422, ("seed",)),
    "many stop strings": ("/generate", {"input": "w1", "stop": list("abcd")}, JSON, 422, ("3", "stop")),
    "upload of a question": ("/packs", QUESTION, JSON, 422, ("list",)),
    "upload of numbers": ("/packs", [1], JSON, 422, ("Demonstration 1",)),
    "upload of nothing": ("/packs", [], JSON, 422, ("demonstrations",)),
    "upload of no line": ("/packs", b"\n\n", LINES, 422, ("demonstrations",)),
    "upload without an output": ("/packs", [OBJECTS[0], {"input": "w1"}], JSON, 422, ("Demonstration 2", "output")),
    "upload of too many": ("/packs", OBJECTS * 2, JSON, 422, ("6", "demonstrations")),
    "a bad line": ("/packs", b'{"input": "a", "output": "b"}\n{', LINES, 400, ("Line 2", "JSON")),
    "a line that is not UTF-8": ("/packs", b'\n{"input": "\xff"}', LINES, 400, ("Line 2", "UTF-8", "byte 11")),
    "upload of no type": ("/packs", b"[]", "", 415, (JSON, LINES, FILE)),
    "a demonstration beyond the window": ("/packs", [{"input": "w1 " * 120, "output": "w2"}], JSON, 422, ("121", "w1 w1")),
    "no pack": ("/packs", b"PK\x03\x04 no pack at all", FILE, 422, ("make it again",)),
    "a pickle": ("/packs", b"\x80\x04\x95" + bytes(40), FILE, 422, ("make it again",)),
    "a path": ("/packs/..%2f..%2fetc%2fpasswd", b"", JSON, 404, ("/docs",)),
    "no such path": ("/nothing", b"", JSON, 404, ("/docs",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_one_sentence(client, name):
    path, body, kind, status, facts = BAD[name]
    found, said, headers = client.ask("POST", path, body, kind)
    assert (found, said.keys(), headers.get_content_type()) == (status, {"error"}, JSON), said
    states(said["error"], *facts)


def test_files_that_are_no_packs_for_this_llm(client, packs, llm, tmp_path):
    whole = packs[0].to_bytes()
    other = dataclasses.replace(packs[0], llm="another", llm_fingerprint="0" * 16).to_bytes()
    texts = json.dumps(["w1 " * 400, "", " "])
    for content, facts in (
        (whole[:-9], ("make it again",)),
        (b"", ("make it again",)),
        (whole[:8] + b"[" * (len(whole) - 8), ("make it again",)),
        (changed_pack(packs, pack_format="2"), ("format 2", "up to 1", "update")),
        (changed_pack(packs, template=r'["\ud800", "", " "]'), ("make it again",)),
        (changed_pack(packs, template=texts), ("template", "1,000")),
        (changed_pack(packs, num_vectors="5"), ("5", "4")),
        (other, ("another", "0" * 16, llm.path)),
    ):
        status, said, _ = client.ask("POST", "/packs", content, FILE)
        assert status == 422
        states(said["error"], *facts)
    assert not list(tmp_path.iterdir())


def test_a_server_without_a_distiller_takes_files(llm, packs):
    with running(Engine(llm, None, {}, 8, Limits())) as client:
        status, said, _ = client.ask("POST", "/packs", OBJECTS)
        assert status == 409
        states(said["error"], "--distiller")
        made = client.post("/packs", packs[0].to_bytes(), FILE)
        assert score(client, pack=made["id"])["prefix_positions"] == 4
        assert client.ask("GET", "/info")[1]["distiller"] is None or made["kind"] == "distiller"


# Sizes, times, crowds


def test_what_is_too_large_is_refused(client):
    limit = f"{BAD_LIMITS['max_body']:,}"
    status, said, _ = client.ask("POST", "/score", b" " * 5000)
    assert status == 413
    states(said["error"], limit)
    status, said, _ = client.ask("POST", "/packs", b" " * 30_000, FILE)
    assert status == 413
    states(said["error"], "20,000")
    chunks = b"".join(b"%x\r\n%s\r\n" % (1000, b" " * 1000) for _ in range(6)) + b"0\r\n\r\n"
    with client.raw(b"POST /score HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks) as raw:
        assert b"413" in raw.recv(1000)


def test_who_is_slow_is_not_waited_for(models):
    with running(make_engine(models, body_seconds=0.2)) as client:
        head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        with client.raw(head + b'{"input"') as body, client.raw(b"POST /score HTT") as start, client.raw(b"") as silent:
            said = body.makefile("rb").read()  # to the end of the connection
            assert said.startswith(b"HTTP/1.1 408") and b"0.2 seconds" in said
            assert start.recv(100) == silent.recv(100) == b""
        assert client.ask("GET", "/health")[0] == 200


def occupied(client, hold):
    """The device has begun with a job, which is returned."""
    job = client.service.worker.submit(("score",), 1, Asked(Before(TEMPLATES["space"], key=""), ["w4"], OPTIONS))
    hold.until_begun()
    return job


def test_a_crowd_is_told_to_come_again(models):
    limits = {"max_waiting": 1, "max_connections": 2, "body_seconds": 60.0}
    with running(make_engine(models, **limits)) as client, held(client.service) as hold:
        first = occupied(client, hold)
        second = occupied(client, hold)  # which waits
        status, said, headers = client.ask("POST", "/score", QUESTION)
        assert (status, headers["Retry-After"]) == (429, "1")
        states(said["error"], "1 requests")
        hold.release()
        assert first.future.result(60).value.found and second.future.result(60).value.found
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
        with client.raw(head), client.raw(head):
            wait_until(lambda: client.server.config.app.open == 2)
            assert client.ask("GET", "/health")[0] == 503
        wait_until(lambda: client.server.config.app.open == 0)


def test_who_waits_too_long_is_told_so(models, monkeypatch):
    """One that did not begin is not computed later; of one that began, nobody reads the answer."""
    with running(make_engine(models, max_seconds=0.2)) as client, held(client.service) as hold:
        occupied(client, hold)
        status, said, headers = client.ask("POST", "/score", QUESTION)
        assert (status, headers["Retry-After"], client.service.worker.waiting) == (503, "1", 0)
        states(said["error"], "0.2 seconds", "did not begin")
    with running(make_engine(models, max_seconds=0.2)) as client, held(client.service) as hold:
        submit = client.service.worker.submit

        def begun(*asked):
            job = submit(*asked)
            hold.until_begun()
            return job

        monkeypatch.setattr(client.service.worker, "submit", begun)
        status, said, _ = client.ask("POST", "/score", QUESTION)
        assert status == 504
        states(said["error"], "0.2 seconds", "less")


def test_the_work_of_who_hangs_up_is_dropped(client):
    def waiting():
        return client.service.worker.waiting

    body = json.dumps(QUESTION).encode()
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with held(client.service) as hold:
        first = Together(score, (client,))
        hold.until_begun()
        gone, stays = client.raw(head % len(body) + body), Together(score, (client,))
        wait_until(lambda: waiting() == 2)
        gone.close()
        wait_until(lambda: waiting() == 1)
        hold.release()
        assert all(found["answers"] for found in [*first.answers(), *stays.answers()])
    assert score(client)["answers"]  # and the server goes on


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


def test_pages_load_nothing_from_elsewhere(client, engine):
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


def test_the_reference_escapes_what_it_shows():
    said = {"description": "<script>alert(1)</script>"}
    page = pages.reference({"paths": {"/<b>": {"get": {"responses": {"400": said}} | said}}})
    assert (
        "<script>" not in page.html
        and "/<b>" not in page.html
        and "script-src 'none'" in page.headers["Content-Security-Policy"]
    )


# The end


def test_a_server_that_stops_finishes_what_it_accepted(models):
    with running(make_engine(models)) as client:
        client.post("/packs", OBJECTS)
        with held(client.service) as hold:
            first = Together(score, (client,), (client,))
            wait_until(lambda: client.server.config.app.open == 2)
            client.server.handle_exit(signal.SIGTERM, None)
            wait_until(lambda: refuses(client))
            hold.release()
            assert all(found["answers"] for found in first.answers())


def refuses(client: Client) -> bool:
    try:
        client.raw(b"").close()
    except OSError:
        return True
    return False


def test_a_second_signal_ends_at_once(monkeypatch, capsys):
    server, ended = Server.__new__(Server), []
    server.should_exit = False
    monkeypatch.setattr("mend_jax.serving.http.os._exit", ended.append)
    server.handle_exit(signal.SIGINT, None)
    assert server.should_exit and not ended
    server.handle_exit(signal.SIGINT, None)
    assert ended == [130] and "Stopping" in capsys.readouterr().err


def test_the_command_answers_until_it_is_told_to_stop(models):
    workdir = models[2]
    command = [sys.executable, "-m", "mend_jax.serve", f"--distiller={workdir}", "--port=0", "--warm_up=none"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | ONE_DEVICE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        line = process.stdout.readline()
        client = Client(int(line.partition(";")[0].rpartition(":")[2]))
        assert client.ask("GET", "/info")[1]["llm"] == models[0].path
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not out and "Stopping" in err, err


def command(*flags):
    with pytest.raises(SystemExit) as ended:
        command_line.run(serve.serve, ["serve", *flags])
    return ended.value.code


def test_bad_flags_are_one_sentence(models, monkeypatch, capsys):
    monkeypatch.setattr(serve, "load_llm", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, facts in (
            ([], ("--llm",)),
            ([f"--distiller={models[2]}", "--bos=true"], ("--bos",)),
            (["--llm=x", "--max_body=0"], ("--max_body", "above 0")),
            (["--llm=x", "--max_seconds=nan"], ("--max_seconds",)),
            (["--llm=x", "--batch_size=0"], ("--batch_size",)),
            (["--llm=x", f"--port={port}"], (port,)),
            (["--llm=x", "--port=70000"], ("70000",)),
            (["--llm=x", "--host=no.such.host.invalid"], ("no.such.host.invalid",)),
        ):
            assert command(*flags) == 2
            states(capsys.readouterr().err.rstrip(), *facts)


def test_missing_packages_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with says("uvicorn", "pip install"):
        serve.serve(llm="x")


def test_an_llm_without_a_tokenizer_serves_nothing(llm, monkeypatch):
    monkeypatch.setattr(serve, "load_llm", lambda *_, **__: dataclasses.replace(llm, tokenizer=None))
    with says("x", "tokenizer"):
        serve._engine("x", "", "float32", "full", "", 8, Limits())


def test_a_stopped_worker_takes_nothing():
    made = worker.Worker(lambda kind, asked: [one + 1 for one in asked], 4, 9, lambda _: None)
    jobs = [made.submit("a", 1, n) for n in range(3)]
    made.stop(10)
    assert [job.future.result().value for job in jobs] == [1, 2, 3] and not made.busy
    with pytest.raises(Exception, match="stopping"):
        made.submit("a", 1, 0)
    with pytest.raises(UserError):
        bound("127.0.0.1", -1)


# The load test


@pytest.fixture(scope="module")
def stub(models):
    """An engine whose answers cost nothing; what it was asked is in `asked`."""
    engine = make_engine(models)
    engine.asked = []

    def answers(*found):
        def answer(some):
            engine.asked.extend(some)
            return [
                Answered(len(one.before.demos) or 4, [3] * len(one.inputs), list(found) * len(one.inputs))
                for one in some
            ]

        return answer

    engine.distil = lambda sets: packs_like(models, len(sets))
    engine.score, engine.generate = answers(np.array([-1.0, -2.0])), answers(Answer("w1", [1], "length"))
    return engine


def test_the_load_test_asks_the_same_with_vectors_and_demonstrations(stub, monkeypatch, capsys, tmp_path):
    """Its server is one of this process."""
    stub.asked.clear()
    with running(stub) as client:
        monkeypatch.setattr(serving, "_server", lambda _: contextlib.nullcontext(f"http://127.0.0.1:{client.port}"))
        asked = {"clients": "1,2", "seconds": 0.05, "repeats": 1, "packs": 2, "out": str(tmp_path / "a.json")}
        assert benchmark.benchmark("serving", distiller="x", **asked) == 0
        info = client.ask("GET", "/info")[1]
        questions = serving._questions(f"http://127.0.0.1:{client.port}", info, "score", 2)
    report, text = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    cells = [(row["kind"], row["clients"]) for row in report["rows"]]
    assert cells == [("score", 1), ("score", 2), ("generate", 1), ("generate", 2)]
    for row in report["rows"]:
        for found in row["modes"].values():
            assert found["requests"] > 0 and found["p95_ms"] >= found["p50_ms"] > 0 and found["per_second"] > 0
    assert report["compiled"] == 0 and "requests/s" in text and "16 tokens" in text
    modes = {(one.before.pack is not None, one.before.key is not None) for one in stub.asked}
    assert modes == {(True, True), (False, False), (False, True)}
    for asked in zip(*questions.values(), strict=True):
        vectors, anew, kept = (json.loads(body) for _, body in asked)
        assert vectors.pop("pack") and kept.pop("keep") and len(anew["demonstrations"]) == 16
        assert kept == anew and vectors == {name: anew[name] for name in ("input", "options")}


def packs_like(models, count):
    llm, distiller, workdir = models
    facts = make.facts_of(llm, distiller, workdir)
    return [Pack(np.zeros((4, 32), np.float32), **facts, num_demonstrations=8) for _ in range(count)]


def test_the_load_test_needs_a_distiller():
    with says("--distiller"):
        benchmark.benchmark("serving")
    with says("--clients=a"):
        benchmark.benchmark("serving", distiller="x", clients="a")
    with says("--clients", "1 or more"):
        benchmark.benchmark("serving", distiller="x", clients="0")


# What the docs say

PAGE = (ROOT / "docs" / "serving.md").read_text()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_commands_of_the_docs_run(stub, tmp_path):
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OBJECTS))
    script = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)[1]
    assert script.count("curl -s ") == script.count("curl") == 7
    with running(stub) as client:
        script = script.replace("localhost:8000", f"127.0.0.1:{client.port}").replace("curl -s", "curl -s -f -S")
        done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, text=True, capture_output=True)
        packs = client.ask("GET", "/packs")[1]
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"prediction"') == 1 and done.stdout.count('"text"') == 2
    assert packs["count"] == 1 and (tmp_path / "colours.pack.safetensors").stat().st_size > 500


def test_the_docs_have_every_limit():
    rows = dict(re.findall(r"^\| `--(\w+)` \| ([\d.]+) \|", PAGE, re.MULTILINE))
    assert rows == {name: str(value) for name, value in dataclasses.asdict(Limits()).items()}
