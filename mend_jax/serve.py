"""A small HTTP server: demonstrations in, answers of the LLM after their vectors out.

    python -m mend_jax.serve --distiller=runs/mine/mend/finetune
    python -m mend_jax.serve --llm=gpt2-large --distiller=exported --port=9000
    python -m mend_jax.serve --llm=gpt2-large       # packs are uploaded as files

It has no passwords and no encryption, and listens on this machine alone unless it is told otherwise. docs/serving.md shows
how it is asked; its page is at http://127.0.0.1:8000, its reference at /docs.
"""

import sys
from typing import Literal

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES
from mend_jax.data.bos import NONE
from mend_jax.interchange.trained import llm_for, load_both
from mend_jax.llm.decoder_only import load_llm
from mend_jax.packs.make import facts_of
from mend_jax.serving.engine import Engine
from mend_jax.serving.examples import example_for
from mend_jax.serving.limits import Limits


def serve(
    llm: str = "",
    distiller: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: Literal[*CHOICES["llm.dtype"]] = "float32",
    weights: Literal[*CHOICES["llm.weights"]] = "full",
    bos: Literal["", *CHOICES["data.bos"]] = "",
    batch_size: int = 32,
    warm_up: Literal["one", "all", "none"] = "one",
    max_body: int = Limits.max_body,
    max_file: int = Limits.max_file,
    max_demonstrations: int = Limits.max_demonstrations,
    max_inputs: int = Limits.max_inputs,
    max_options: int = Limits.max_options,
    max_query_tokens: int = Limits.max_query_tokens,
    max_tokens: int = Limits.max_tokens,
    max_waiting: int = Limits.max_waiting,
    max_connections: int = Limits.max_connections,
    max_seconds: float = Limits.max_seconds,
    body_seconds: float = Limits.body_seconds,
    pack_bytes: int = Limits.pack_bytes,
    cache_bytes: int = Limits.cache_bytes,
) -> None:
    """Answers until SIGTERM or SIGINT (Ctrl-C), after which what was accepted is finished; a second one ends it at once.

    Args:
        llm: the LLM: a folder, hub name or GGUF file. The workdir of a distiller knows its own.
        distiller: a training workdir, an exported folder, or smollm2-135m-instruct, of this package; "": packs are uploaded as files.
        host: the address to listen at; 0.0.0.0 is every address of this machine.
        port: 0: any that is free.
        dtype: of the arithmetic.
        weights: the LLM's: "full", or "int8": 8 bits.
        bos: without a distiller, whether the LLM's BOS stands before everything, as its packs say; "" is false.
        batch_size: queries in one pass of the LLM.
        warm_up: "one": what a single question like the page's example needs is compiled before the server listens; "all": also what
            any number of such questions at once need, up to --batch_size. The rest is compiled when it is asked.
        max_body: bytes of a request's body, at most.
        max_file: bytes of a pack's file, at most.
        max_demonstrations: of a pack or a request, at most.
        max_inputs: queries of a request, at most.
        max_options: answers to choose from, and stop strings, at most.
        max_query_tokens: tokens of a query, at most.
        max_tokens: tokens of an answer, at most.
        max_waiting: requests that may wait for the device; others are told to come again (429).
        max_connections: requests that may be open; others are told to come again (503).
        max_seconds: for a request to be answered in; then it is given up (503 if it did not begin, else 504).
        body_seconds: for a request to arrive in (408).
        pack_bytes: of the vectors of all packs that are kept; the least recently used make room.
        cache_bytes: of the LLM's keys and values of packs that are kept, likewise.
    """
    given = locals()
    _require_packages()
    from mend_jax.serving.listen import listen

    limits = Limits(**{name: value for name, value in given.items() if name in Limits.__dataclass_fields__})
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size} is too small: give 1 or more.")
    named = llm_for(distiller, llm)
    if bos and distiller:
        raise UserError(f"--bos={bos} is for a server without a distiller: the distiller decides it.")

    def make_engine() -> Engine:
        _say(f"Loading {named}")
        made = _engine(named, distiller, dtype, weights, bos, batch_size, limits)
        if warm_up != "none":
            _say("Compiling what a first question needs; other lengths are compiled when they come")
            made.warm_up(example_for(made.llm), batch_size if warm_up == "all" else 1)
        return made

    listen(make_engine, limits, named, distiller, host, port)


def _engine(named: str, distiller: str, dtype: str, weights: str, bos: str, batch_size: int, limits: Limits) -> Engine:
    model, facts = None, {}
    if distiller:
        loaded, model = load_both(distiller, named, dtype, weights)
    else:
        loaded = load_llm(named, dtype, weights=weights, bos=bos or NONE)
    if loaded.tokenizer is None:
        raise UserError(f"{named} holds no tokenizer, which a server of texts needs: put its files there.")
    if model is not None:
        facts = facts_of(loaded, model, distiller, named)
    return Engine(loaded, model, facts, batch_size, limits)


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _require_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'The server needs a package that is not here ({error.name}): pip install -e ".[serve]", or fastapi uvicorn prometheus-client.'
        ) from None


if __name__ == "__main__":
    run(serve)
