"""What the server answers to bad requests, to those that are too large or too slow, and in a crowd: a code and one sentence."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest
from facts import states

pytest.importorskip("fastapi")
from serving_client import (  # noqa: E402
    FILE,
    JSON,
    LINES,
    NOTHING,
    OBJECTS,
    OPTIONS,
    Together,
    held,
    make_engine,
    running,
    score,
    wait_until,
)

from mend_jax.data.templates import TEMPLATES  # noqa: E402
from mend_jax.serving.engine import Asked, Before, Engine  # noqa: E402
from mend_jax.serving.http import Edge  # noqa: E402
from mend_jax.serving.limits import Limits  # noqa: E402

BAD_LIMITS = {"max_body": 4000, "max_file": 20_000, "max_demonstrations": 6, "max_inputs": 3, "max_options": 3}
BAD_LIMITS |= {"max_query_tokens": 40, "max_tokens": 20}


@pytest.fixture(scope="module")
def llm(serving_models):
    return serving_models[0]


@pytest.fixture(scope="module")
def client(serving_models):
    with running(make_engine(serving_models, **BAD_LIMITS)) as made:
        yield made


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
    "temperature": ("/generate", {"input": "w1", "temperature": 1e308}, JSON, 422, ("temperature", "1000")),
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
        (dataclasses.replace(packs[0], vectors=np.full((4, 32), 3e38, np.float32)).to_bytes(), ("squares", "finite")),
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


def test_who_is_slow_is_not_waited_for(serving_models):
    with running(make_engine(serving_models, body_seconds=0.2)) as client:
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


def test_a_crowd_is_told_to_come_again(serving_models):
    limits = {"max_waiting": 1, "max_connections": 2, "body_seconds": 60.0}
    with running(make_engine(serving_models, **limits)) as client, held(client.service) as hold:
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


def test_who_waits_too_long_is_told_so(serving_models, monkeypatch):
    """One that did not begin is not computed later; of one that began, nobody reads the answer."""
    with running(make_engine(serving_models, max_seconds=0.2)) as client, held(client.service) as hold:
        occupied(client, hold)
        status, said, headers = client.ask("POST", "/score", QUESTION)
        assert (status, headers["Retry-After"], client.service.worker.waiting) == (503, "1", 0)
        states(said["error"], "0.2 seconds", "did not begin")
    with running(make_engine(serving_models, max_seconds=0.2)) as client, held(client.service) as hold:
        submit = client.service.worker.submit

        def begun(*asked):
            job = submit(*asked)
            hold.until_begun()
            return job

        monkeypatch.setattr(client.service.worker, "submit", begun)
        status, said, _ = client.ask("POST", "/score", QUESTION)
        assert status == 504
        states(said["error"], "0.2 seconds", "less")


def test_a_pack_that_took_too_long_is_there_for_who_asks_again(serving_models, monkeypatch):
    with running(make_engine(serving_models, max_seconds=0.2)) as client, held(client.service) as hold:
        assert client.ask("POST", "/packs", OBJECTS)[0] == 504
        hold.release()
        wait_until(lambda: len(client.service.packs) == 1)
        monkeypatch.setattr(client.service.worker, "submit", None)  # nothing is computed again
        status, made, _ = client.ask("POST", "/packs", OBJECTS)
        assert (status, made["num_demonstrations"]) == (200, len(OBJECTS))


def test_bodies_count_while_they_arrive(serving_models):
    """Those of a crowd that never ends its bodies, too; what they held is free when they are gone."""
    edge = Edge(None, Limits(max_file=1000), "0.0.0.0", lambda *_: None)
    scope = {"type": "http", "path": "/packs", "headers": [(b"content-type", FILE.encode())]}
    statuses = []

    async def client():
        parts = [{"type": "http.request", "body": b"x" * 900, "more_body": True}]

        async def receive():
            return parts.pop() if parts else await asyncio.sleep(60)

        async def send(message):
            statuses.append(message.get("status"))

        await edge(scope, receive, send)

    async def crowd():
        tasks = [asyncio.create_task(client()) for _ in range(20)]
        await asyncio.sleep(0.1)
        held = edge.held
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return held

    assert asyncio.run(crowd()) == 3600  # of HELD * 1000
    assert statuses.count(503) == 16 and edge.held == edge.open == 0


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
