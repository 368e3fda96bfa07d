"""From an engine to a server that listens, and to its end."""

import os
import sys
from collections.abc import Callable

import uvicorn

from mend_jax.serving.app import make_app
from mend_jax.serving.engine import Engine
from mend_jax.serving.http import Edge, Server, bound, protocol
from mend_jax.serving.limits import Limits


def listen(make_engine: Callable[[], Engine], limits: Limits, llm: str, distiller: str, host: str, port: int) -> None:
    """Answers requests until a signal stops it. Raises UserError where the address cannot be had, before anything is loaded."""
    socket = bound(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{socket.getsockname()[1]}"
    server = make_server(make_engine(), limits, {"llm": llm, "distiller": distiller or None}, host)
    server.ready = lambda: print(f"Listening at {address}; Ctrl-C stops.", flush=True)
    server.run(sockets=[socket])
    if server.service.worker.busy:  # with a request that was given up; the interpreter is not to end around it
        sys.stdout.flush()
        os._exit(0)


def make_server(engine: Engine, limits: Limits, names: dict[str, str | None], host: str) -> Server:
    """A server that does not run yet; `names` are what the LLM and the distiller are called."""
    app = make_app(engine, limits, names)
    edge = Edge(app, limits, host, app.state.service.metrics.count)
    config = uvicorn.Config(
        edge,
        http=protocol(limits.body_seconds),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    return Server(config, app.state.service)
