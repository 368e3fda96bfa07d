"""The edge of the server: what reaches the application, how connections end, how signals stop it.

Whole bodies are read here, within limits of size and time, before the application sees a request; so nothing behind this file
waits for a client. All is made for uvicorn with h11.
"""

import asyncio
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mend_jax.cli.errors import UserError
from mend_jax.serving.limits import Limits
from mend_jax.serving.refusal import Refused, busy

FILE = "application/octet-stream"  # the type of a pack's file
HUNG_UP = 499  # counted where the client hung up, and read by nobody; nginx's number for it
HELD = 4  # files of the largest size that the bodies of all requests together may have
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Gone(Exception):
    """The client hung up."""


@dataclasses.dataclass
class _Body:
    """What has arrived of a request's body."""

    parts: list[bytes] = dataclasses.field(default_factory=list)
    size: int = 0

    def add(self, part: bytes) -> int:
        """Returns the part's bytes."""
        self.parts.append(part)
        self.size += len(part)
        return len(part)


class Edge:
    """ASGI middleware: refuses what is too large, too slow, or not for this server; counts what comes through."""

    def __init__(self, app, limits: Limits, host: str, count: Callable[[dict, int, float], None]):
        """`count(scope, status, seconds)` is called at the end of every request."""
        self.app, self.limits, self.count = app, limits, count
        self.names = {*LOOPBACK, host} if host in LOOPBACK else None
        self.open = self.held = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, body = time.perf_counter(), 0, _Body()

        async def counted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        self.open += 1
        try:
            self._require_known_host(scope)
            if self.open > self.limits.max_connections:
                raise busy(
                    f"{self.limits.max_connections} requests are open, the most that may: try again in a moment."
                )
            await self._read(body, scope, receive)
            await self.app(scope, _again(b"".join(body.parts), receive), counted)
        except Refused as refused:
            await answer(counted, refused)
        except Gone:
            status = HUNG_UP
        finally:
            self.open -= 1
            self.held -= body.size
            self.count(scope, status, time.perf_counter() - start)

    def _require_known_host(self, scope) -> None:
        """A page of another site whose name leads here (DNS rebinding) is not to read packs."""
        name = _header(scope, b"host").rpartition("@")[2]
        name = name.partition("]")[0].lstrip("[") if name.startswith("[") else name.partition(":")[0]
        if self.names is not None and name not in self.names:
            raise Refused(421, f"This server answers to {', '.join(sorted(self.names))}, not to another Host.")

    async def _read(self, body: "_Body", scope, receive) -> None:
        """Reads a whole body; each part counts as held from its arrival on."""
        file = scope["path"] == "/packs" and _header(scope, b"content-type").partition(";")[0].strip().lower() == FILE
        most, said = (self.limits.max_file if file else self.limits.max_body), _header(scope, b"content-length")
        too_large = Refused(413, f"The body has more than {most:,} bytes, the most that this server takes: send less.")
        if said.isdecimal() and int(said) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    self.held += body.add(message.get("body", b""))
                    if body.size > most:
                        raise too_large
                    if self.held > HELD * self.limits.max_file:
                        raise busy("Other requests fill the server's memory: try again in a moment.")
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            sentence = f"The body did not arrive within {self.limits.body_seconds:g} seconds: send it faster."
            raise Refused(408, sentence, {"Connection": "close"}) from None


def _header(scope, name: bytes) -> str:
    return next((value for key, value in scope["headers"] if key == name), b"").decode("latin-1")


def _again(body: bytes, receive) -> Callable[[], Awaitable[dict]]:
    """An ASGI `receive` that gives the body, then whatever comes: the end of the connection."""
    first = {"type": "http.request", "body": body, "more_body": False}

    async def received() -> dict:
        nonlocal first
        if first is not None:
            message, first = first, None
            return message
        return await receive()

    return received


async def answer(send, refused: Refused) -> None:
    """Sends a refusal by ASGI."""
    headers = {"Content-Type": "application/json", "Content-Length": str(len(refused.body)), **refused.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": refused.body})


def protocol(seconds: float) -> type[H11Protocol]:
    """The connections of a server: each closes where the head of a request takes longer than this, and says in JSON what is no HTTP."""

    class Protocol(H11Protocol):
        closing: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._wait()

        def connection_lost(self, error) -> None:
            super().connection_lost(error)
            self._wait()

        def handle_events(self) -> None:
            super().handle_events()
            self._wait()

        def _wait(self) -> None:
            """Lets a timer run while a head, or the rest of a body that was refused, is awaited."""
            answering = self.cycle is not None and not self.cycle.response_complete
            if self.closing is not None and (answering or self.transport.is_closing()):
                self.closing.cancel()
                self.closing = None
            elif self.closing is None and not answering and not self.transport.is_closing():
                self.closing = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

        def send_400_response(self, msg: str) -> None:
            text = json.dumps({"error": "This is no HTTP/1.1 request that the server understands."})
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\nconnection: close\r\n\r\n"
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write((head + text).encode())
            self.transport.close()

    return Protocol


class Server(uvicorn.Server):
    """Stops at SIGTERM and SIGINT when all that was accepted is answered, and at a second one at once."""

    def __init__(self, config: uvicorn.Config, service: Any):
        super().__init__(config)
        self.service = service
        self.ready: Callable[[], None] = lambda: None  # called when connections are accepted

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets=sockets)
        self.ready()

    def handle_exit(self, sig: int, frame) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        print("Stopping: what was accepted is answered first; stop again to end at once.", file=sys.stderr, flush=True)
        self.should_exit = True


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet. Raises UserError where there can be none."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port={port} is no port: give one from 1 to 65535, or 0 for any that is free.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--host={host} --port={port} cannot be had ({reason}): give another.") from None
    return made
