"""What the server does with a request, between HTTP (app.py) and the device (engine.py): all of it in the thread of the event loop."""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from starlette.requests import Request

from mend_jax.cli.errors import UserError
from mend_jax.data.templates import SPACE, TEMPLATES, Template
from mend_jax.data.tokenize import fingerprint
from mend_jax.generation.generate import Wanted
from mend_jax.packs.pack import Pack
from mend_jax.serving.engine import DISTIL, GENERATE, SCORE, TAKE_IN, Asked, Before, Engine
from mend_jax.serving.http import FILE, Gone
from mend_jax.serving.kept import Kept
from mend_jax.serving.limits import Limits
from mend_jax.serving.metrics import Metrics
from mend_jax.serving.refusal import Refused, busy
from mend_jax.serving.requests import (
    TOKENS,
    GenerateRequest,
    Question,
    ScoreRequest,
    read_pairs,
    require_count,
    require_texts,
)
from mend_jax.serving.worker import Done, Worker

LINES = ("application/x-ndjson", "application/jsonl")
JSON = "application/json"
TEMPLATE_CHARACTERS = 1000  # of a pack's template, which is read with every query


class Service:
    """A server's state: packs, the queue, what is counted."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits = engine, limits
        self.packs: Kept[Pack] = Kept(limits.pack_bytes, bytes_of)
        self.metrics = Metrics(self)
        self.worker = Worker(engine.answer, engine.batch_size, limits.max_waiting, self.metrics.batch)

    @property
    def template(self) -> Template:
        """Of questions that name none."""
        return SPACE if self.engine.distiller is None else self.engine.distiller.template

    async def upload(self, request: Request) -> tuple[str, Pack, bool]:
        """(id, pack, whether it is new) of an upload: demonstrations or a pack's file."""
        kind = content_type(request)
        body = await request.body()
        if kind == FILE:
            key = fingerprint("file", body)
        elif kind in (JSON, *LINES):
            if self.engine.distiller is None:
                raise Refused(409, "This server has no distiller: upload a pack, a file, or start it with --distiller.")
            pairs = read_pairs(body, kind in LINES, self.limits.max_demonstrations)
            made_by = (self.engine.facts[name] for name in ("llm_fingerprint", "distiller_fingerprint"))
            key = fingerprint("demonstrations", *made_by, *(text for pair in pairs for text in pair))
        else:
            raise Refused(
                415,
                f"Send demonstrations as {JSON} or {LINES[0]}, or a pack's file as {FILE}: this is {kind[:60] or 'of no type'}.",
            )
        pack = self.packs.get(key)
        if pack is not None:
            return key, pack, False
        job = (TAKE_IN, body) if kind == FILE else (DISTIL, pairs)
        done = await self.ask(request, job[:1], 1, job[1], lambda late: self._keep(key, late.value))
        self._keep(key, done.value)
        return key, done.value, True

    def _keep(self, key: str, pack: Pack) -> None:
        """Keeps a pack. Raises `Refused` for one that this server does not take."""
        if max(map(len, pack.template)) > TEMPLATE_CHARACTERS:
            raise Refused(
                422, f"The file's template has more than {TEMPLATE_CHARACTERS:,} characters: it is no pack of ours."
            )
        if not self.packs.put(key, pack):
            raise Refused(
                413, f"A pack of {bytes_of(pack):,} bytes is more than this server keeps: raise --pack_bytes."
            )

    def pack(self, key: str) -> Pack:
        """A pack by its id."""
        found = self.packs.get(key)
        if found is None:
            raise Refused(404, f"There is no pack {key[:40]!r} here, or no more: upload it.")
        return found

    async def score(self, request: Request, asked: ScoreRequest) -> dict:
        """The answer to a question for the likeliest of several options."""
        before, inputs = self._read(asked)
        require_count("options", len(asked.options), self.limits.max_options)
        require_texts("Option", asked.options)
        twice = next((one for one in asked.options if asked.options.count(one) > 1), None)
        if twice is not None:
            raise Refused(422, f"The option {twice[:40]!r} stands there twice: send each once.")
        done = await self.ask(request, (SCORE,), len(inputs), Asked(before, inputs, asked.options))
        answers = []
        for values in done.value.found:
            scores = dict(zip(asked.options, map(float, values), strict=True))
            answers.append({"prediction": max(scores, key=scores.get), "scores": scores})
        return _answered(done, answers)

    async def generate(self, request: Request, asked: GenerateRequest) -> dict:
        """The answer to a question for the LLM's own words."""
        before, inputs = self._read(asked)
        most = self.limits.max_tokens
        tokens = min(TOKENS, most) if asked.max_tokens is None else asked.max_tokens
        if tokens > most:
            raise Refused(422, f"max_tokens is {tokens}, this server makes {most}: ask for fewer.")
        stop = before.template.stops if asked.stop is None else asked.stop
        stop = tuple(filter(None, [stop] if isinstance(stop, str) else stop))
        if len(stop) > self.limits.max_options:
            raise Refused(422, f"There are more than {self.limits.max_options} stop strings: send fewer.")
        temperature = float(np.float32(asked.temperature))  # which is 0 where the device would divide by 0
        wanted = Wanted(tokens, temperature, asked.top_p, stop, asked.seed, before.template.answer)
        kind = GENERATE, temperature > 0, (tokens - 1).bit_length()  # of like numbers of steps
        done = await self.ask(request, kind, len(inputs), Asked(before, inputs, wanted=wanted))
        answers = [{"text": one.text, "finish": one.finish, "tokens": len(one.tokens)} for one in done.value.found]
        return _answered(done, answers)

    async def ask(
        self,
        request: Request,
        kind: tuple[Hashable, ...],
        rows: int,
        asked: Any,
        late: Callable[[Done], None] | None = None,
    ) -> Done:
        """What the device answers. Raises `Refused`, and `Gone` where the client hangs up meanwhile.

        `late` is called with an answer for which nobody waits any more, so that who asks again finds it.
        """
        job = self.worker.submit(kind, rows, asked)
        done, gone = asyncio.wrap_future(job.future), asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait({done, gone}, timeout=self.limits.max_seconds, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                return self._answer(done)
            dropped = self.worker.drop(job)
        finally:
            gone.cancel()
        done.add_done_callback(lambda found: _take_late(found, late))
        if gone.done() and not gone.cancelled():
            raise Gone
        seconds = f"{self.limits.max_seconds:g} seconds"
        if dropped:
            raise busy(f"The request waited for {seconds} and did not begin: try again in a moment.")
        raise Refused(504, f"The request was not answered within {seconds}: ask for less at once.")

    def _answer(self, done: asyncio.Future) -> Done:
        try:
            return done.result()
        except UserError as error:
            raise Refused(422, str(error)) from None
        except Exception:
            raise Refused(500, "The request failed in the server, whose log says why.") from None

    def _read(self, asked: Question) -> tuple[Before, list[str]]:
        inputs = [asked.input] if isinstance(asked.input, str) else asked.input
        require_count("inputs", len(inputs), self.limits.max_inputs)
        require_texts("Input", inputs)
        if asked.pack is not None and asked.demonstrations is not None:
            raise Refused(422, "The request has a pack and demonstrations: send one of them, or neither.")
        if asked.pack is not None:
            if asked.template is not None:
                raise Refused(422, "The request has a template, but its pack has one of its own: leave it out.")
            pack = self.pack(asked.pack)
            return Before(pack.template, pack, key=asked.pack), inputs
        template = self.template if asked.template is None else TEMPLATES[asked.template]
        if asked.demonstrations is None:
            return Before(template, key=""), inputs
        require_count("demonstrations", len(asked.demonstrations), self.limits.max_demonstrations)
        demos = tuple((one.input, one.output) for one in asked.demonstrations)
        key = fingerprint("prompt", template, *(text for pair in demos for text in pair)) if asked.keep else None
        return Before(template, demos=demos, key=key), inputs


def bytes_of(pack: Pack) -> int:
    """What a pack takes in memory: its vectors and its texts."""
    return pack.vectors.nbytes + sum(map(sys.getsizeof, pack.metadata().values()))


def content_type(request: Request) -> str:
    """Of a request's body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _answered(done: Done, answers: list[dict]) -> dict:
    found = done.value
    return {
        "answers": [{"positions": count} | one for count, one in zip(found.queries, answers, strict=True)],
        "prefix_positions": found.prefix,
        "seconds": round(done.seconds, 6),
        "waited": round(done.waited, 6),
        "together": done.together,
    }


def _take_late(done: asyncio.Future, late: Callable[[Done], None] | None) -> None:
    """Gives an answer for which nobody waits to `late`; what failed, or is refused, is told to nobody."""
    if not done.cancelled() and done.exception() is None and late is not None:
        with contextlib.suppress(Refused):
            late(done.result())


async def _hung_up(request: Request) -> None:
    """Returns when the client hangs up; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
