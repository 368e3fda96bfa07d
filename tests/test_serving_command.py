"""The command that serves: its flags, how it stops, its load test, and what its docs say."""

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

import numpy as np
import pytest
from conftest import ONE_DEVICE, ROOT
from facts import says, states

pytest.importorskip("fastapi")
from serving_client import (  # noqa: E402
    OBJECTS,
    Client,
    Together,
    held,
    make_engine,
    running,
    score,
    wait_until,
)

from mend_jax import benchmark, serve  # noqa: E402
from mend_jax.cli import command_line  # noqa: E402
from mend_jax.cli.errors import UserError  # noqa: E402
from mend_jax.generation.generate import Answer  # noqa: E402
from mend_jax.measure import serving  # noqa: E402
from mend_jax.packs import make  # noqa: E402
from mend_jax.packs.pack import Pack  # noqa: E402
from mend_jax.serving import worker  # noqa: E402
from mend_jax.serving.engine import Answered  # noqa: E402
from mend_jax.serving.http import Server, bound  # noqa: E402
from mend_jax.serving.limits import Limits  # noqa: E402


@pytest.fixture(scope="module")
def llm(serving_models):
    return serving_models[0]


# The end


def test_a_server_that_stops_finishes_what_it_accepted(serving_models):
    with running(make_engine(serving_models)) as client:
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


def test_the_command_answers_until_it_is_told_to_stop(serving_models):
    workdir = serving_models[2]
    command = [sys.executable, "-m", "mend_jax.serve", f"--distiller={workdir}", "--port=0", "--warm_up=none"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | ONE_DEVICE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        line = process.stdout.readline()
        client = Client(int(line.partition(";")[0].rpartition(":")[2]))
        assert client.ask("GET", "/info")[1]["llm"] == serving_models[0].path
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not out and "Stopping" in err, err


def command(*flags):
    with pytest.raises(SystemExit) as ended:
        command_line.run(serve.serve, ["serve", *flags])
    return ended.value.code


def test_bad_flags_are_one_sentence(serving_models, monkeypatch, capsys):
    monkeypatch.setattr(serve, "load_llm", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, facts in (
            ([], ("--llm",)),
            ([f"--distiller={serving_models[2]}", "--bos=true"], ("--bos",)),
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
def stub(serving_models):
    """An engine whose answers cost nothing; what it was asked is in `asked`."""
    engine = make_engine(serving_models)
    engine.asked = []

    def answers(*found):
        def answer(some):
            engine.asked.extend(some)
            return [
                Answered(len(one.before.demos) or 4, [3] * len(one.inputs), list(found) * len(one.inputs))
                for one in some
            ]

        return answer

    engine.distil = lambda sets: packs_like(serving_models, len(sets))
    engine.score, engine.generate = answers(np.array([-1.0, -2.0])), answers(Answer("w1", [1], "length"))
    return engine


def test_the_load_test_asks_the_same_with_vectors_and_demonstrations(stub, monkeypatch, capsys, tmp_path):
    """Its server is one of this process."""
    stub.asked.clear()
    with running(stub) as client:
        monkeypatch.setattr(serving, "_server", lambda _: contextlib.nullcontext(f"http://127.0.0.1:{client.port}"))
        asked = {"clients": "1,2", "seconds": 0.05, "repeats": 1, "packs": 2, "out": str(tmp_path / "a.json")}
        assert benchmark.serving("x", **asked) == 0
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


def packs_like(serving_models, count):
    llm, distiller, workdir = serving_models
    facts = make.facts_of(llm, distiller, workdir)
    return [Pack(np.zeros((4, 32), np.float32), **facts, num_demonstrations=8) for _ in range(count)]


def test_the_load_test_needs_a_distiller():
    with says("--distiller"):
        command_line.parse(benchmark.serving, ["benchmark"])
    for clients in ("a", "0"):
        with says(f"--clients={clients}"):
            benchmark.serving("x", clients=clients)


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
