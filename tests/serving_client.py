"""A server of tiny models in a thread of the test's process, and a client that asks it over a socket."""

import contextlib
import http.client
import json
import socket
import threading
import time

import numpy as np
import tokenizer_files
from test_export import make_workdir

import mend_jax
from mend_jax.packs.make import facts_of
from mend_jax.serving.engine import Engine
from mend_jax.serving.http import bound
from mend_jax.serving.limits import Limits
from mend_jax.serving.listen import make_server

JSON, LINES, FILE = "application/json", "application/x-ndjson", "application/octet-stream"
DEMOS = [("w1 w2", "w50"), ("w3", "w51"), ("w5 w6 w7", "w50"), ("w9", "w51")]
OBJECTS = [{"input": x, "output": y} for x, y in DEMOS]
OPTIONS = ["w50", "w51"]
NOTHING = "\u200b"  # a character that the tokenizer drops
SECONDS = 60  # that a test waits for what must happen


def make_models(root, **fields):
    """(llm, distiller, its workdir): words are tokens, and NOTHING is none."""
    sizes, folders = tokenizer_files.GPT2 | {"n_positions": 96}, []
    for name, width in {"llm": 32, "backbone": 16}.items():
        folder = tokenizer_files.save_model_folder(root / name, "word", sizes | {"n_embd": width}, seed=width)
        read = json.loads((folder / "tokenizer.json").read_text())
        read["normalizer"] = {"type": "Replace", "pattern": {"String": NOTHING}, "content": ""}
        (folder / "tokenizer.json").write_text(json.dumps(read))
        folders.append(folder)
    np.random.seed(0)
    llm = mend_jax.load_llm(folders[0])
    workdir = make_workdir(root / "run", llm, *folders, **{"prefix.length": 4} | fields)
    return llm, mend_jax.load_distiller(workdir, llm), workdir


def make_engine(models, batch_size=8, **limits):
    llm, distiller, workdir = models
    return Engine(llm, distiller, facts_of(llm, distiller, workdir), batch_size, Limits(**limits))


class Client:
    """Asks the server at a port; each request has a connection of its own."""

    def __init__(self, port, service=None, server=None):
        self.port, self.service, self.server = port, service, server

    def ask(self, method, path, body=None, kind=JSON, **headers):
        """(status, value of the JSON or bytes, headers) of a request; a body that is no bytes is sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": kind} | sent if body is not None else sent)
            response = connection.getresponse()
            content = response.read()
        is_json = response.headers.get_content_type() == JSON
        return response.status, json.loads(content) if is_json else content, response.headers

    def post(self, path, body, kind=JSON):
        """The value of the answer, which must be one."""
        status, value, _ = self.ask("POST", path, body, kind)
        assert status in (200, 201), value
        return value

    def raw(self, content):
        """A socket on which some bytes were sent."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        made.sendall(content)
        return made


def score(client, **fields):
    """The server's answer to a question for the likeliest of OPTIONS."""
    return client.post("/score", {"input": "w4 w8", "options": OPTIONS} | fields)


@contextlib.contextmanager
def running(engine, limits=None):
    """A `Client` of a server that runs within the block."""
    server = make_server(engine, limits or engine.limits, {"llm": "tiny", "distiller": "run"}, "127.0.0.1")
    listening, started = bound("127.0.0.1", 0), threading.Event()
    port, server.ready = listening.getsockname()[1], started.set
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        assert started.wait(SECONDS)
        yield Client(port, server.service, server)
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive() and not server.service.worker.busy


class Hold:
    """A device that has begun with a batch and does not go on."""

    def __init__(self):
        self._go, self._begun = threading.Event(), threading.Event()

    def wait(self):
        """Called by the device."""
        self._begun.set()
        assert self._go.wait(SECONDS)

    def until_begun(self):
        assert self._begun.wait(SECONDS)

    def release(self):
        self._go.set()


@contextlib.contextmanager
def held(service):
    """Within it the device answers nothing until it is released, or until the end of the block."""
    hold, answer = Hold(), service.worker._answer

    def late(*asked):
        hold.wait()
        return answer(*asked)

    service.worker._answer = late
    try:
        yield hold
    finally:
        hold.release()
        service.worker._answer = answer


class Together:
    """Requests that are sent at the same time, each by a thread; `answers()` waits for all of them."""

    def __init__(self, function, *asked):
        self.found = [None] * len(asked)
        self.threads = [threading.Thread(target=self._ask, args=(function, i, one)) for i, one in enumerate(asked)]
        for thread in self.threads:
            thread.start()

    def _ask(self, function, i, asked):
        self.found[i] = function(*asked)

    def answers(self):
        for thread in self.threads:
            thread.join(SECONDS)
        return self.found


def wait_until(holds):
    """Returns when it holds."""
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)
