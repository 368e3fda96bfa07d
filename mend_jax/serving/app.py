"""The server's paths, with FastAPI. Each hands its request to the `Service`; what they answer is described here alone."""

import contextlib
import dataclasses
import json

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from mend_jax.packs.pack import Pack
from mend_jax.serving import metrics, pages
from mend_jax.serving.engine import Engine
from mend_jax.serving.examples import example_for
from mend_jax.serving.http import FILE, HUNG_UP, Gone
from mend_jax.serving.limits import Limits
from mend_jax.serving.refusal import Refused
from mend_jax.serving.requests import GenerateRequest, ScoreRequest, read_json, sentence_of
from mend_jax.serving.service import JSON, LINES, Service, content_type

STOPPING = 5  # seconds for what the device still computes when every request has its answer
LISTED = 100  # packs in one list
ERRORS = {
    400: "No JSON, no UTF-8.",
    404: "No such pack or path.",
    409: "Demonstrations, but the server has no distiller.",
    408: "The body did not arrive in time.",
    413: "Larger than the server takes.",
    415: "Another content type.",
    422: "Understood, but not possible; `error` says why.",
    421: "Another Host than this machine's, where the server listens to it alone.",
    429: "Too many requests wait; Retry-After says when to try again.",
    500: "The request failed in the server, whose log says why.",
    503: "Not begun in time, or too many are open; Retry-After says when to try again.",
    504: "Not answered in time.",
}
PAIR = '`{"input": ..., "output": ...}`'
LIST = {
    "type": "array",
    "items": {"type": "object", "required": ["input", "output"]},
    "description": f"A list of demonstrations, each {PAIR}.",
}
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {"schema": LIST},
            LINES[0]: {"schema": {"type": "string", "description": f"A line {PAIR} for each demonstration."}},
            FILE: {"schema": {"type": "string", "format": "binary", "description": "A pack's file."}},
        },
    }
}


class StrictRequest(Request):
    """Its JSON is read by requests.py."""

    async def json(self):
        return self.state.read


class StrictRoute(APIRoute):
    """A path that takes JSON alone, and JSON as the standard has it."""

    def get_route_handler(self):
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            request = StrictRequest(request.scope, request.receive)
            if content_type(request) != JSON:
                raise Refused(
                    415, f"Send the question as {JSON}: this is {content_type(request)[:60] or 'of no type'}."
                )
            request.state.read = read_json(await request.body())
            return await answer(request)

        return handle


def make_app(engine: Engine, limits: Limits, names: dict[str, str | None]) -> FastAPI:
    """The application; `names` are what the LLM and the distiller are called. Its `state.service` is the `Service`."""
    service = Service(engine, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        service.worker.stop(STOPPING)

    app = FastAPI(
        title="MEND-JAX", description=__doc__, version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={code: {"description": said} for code, said in ERRORS.items()},
    )  # fmt: skip
    app.state.service = service
    _answer_errors(app)
    _pack_paths(app, service)
    _question_paths(app, service)
    _other_paths(app, service, names)
    _page_paths(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Whatever goes wrong is {"error": one sentence}."""

    @app.exception_handler(Refused)
    async def refused(_, error: Refused):
        return Response(error.body, error.status, error.headers, JSON)

    @app.exception_handler(RequestValidationError)
    async def wrong(_, error: RequestValidationError):
        return Response(Refused(422, sentence_of(error.errors())).body, 422, media_type=JSON)

    @app.exception_handler(HTTPException)
    async def other(_, error: HTTPException):
        said = {
            404: "There is nothing at this path: /docs lists what there is.",
            405: "This path does not do that: see /docs.",
        }
        sentence = said.get(error.status_code, str(error.detail))
        return Response(Refused(error.status_code, sentence).body, error.status_code, error.headers, JSON)

    @app.exception_handler(Gone)
    async def gone(*_):
        return Response(status_code=HUNG_UP)

    @app.exception_handler(Exception)
    async def failed(*_):
        return Response(
            Refused(500, "The request failed in the server, whose log says why.").body, 500, media_type=JSON
        )


def _pack_paths(app: FastAPI, service: Service) -> None:
    @app.post("/packs", status_code=201, openapi_extra=UPLOAD, responses={200: {"description": "It was here already."}})
    async def upload(request: Request):
        """Upload demonstrations, which become vectors, or a pack's file. The same content has the same id."""
        key, pack, new = await service.upload(request)
        return _json(facts(key, pack), 201 if new else 200)

    @app.get("/packs")
    async def packs():
        """How many packs are here, and up to 100 of them, the most recently used first."""
        found = service.packs.items()
        return _json({"count": len(found), "packs": [facts(key, pack) for key, pack in found[:LISTED]]})

    @app.get("/packs/{pack_id}")
    async def pack(pack_id: str):
        """What a pack says of itself."""
        return _json(facts(pack_id, service.pack(pack_id)))

    @app.get("/packs/{pack_id}/file")
    async def file(pack_id: str):
        """The pack's file, for `mend_jax.load_pack` and the commands."""
        content = service.pack(pack_id).to_bytes()
        return Response(
            content, headers={"Content-Disposition": "attachment; filename=a.pack.safetensors"}, media_type=FILE
        )

    @app.delete("/packs/{pack_id}", status_code=204)
    async def delete(pack_id: str):
        """Forget a pack."""
        service.pack(pack_id)
        service.packs.remove(pack_id)
        return Response(status_code=204)


def _question_paths(app: FastAPI, service: Service) -> None:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/score", responses=_answers({"positions": 3, "prediction": "a", "scores": {"a": -0.1, "b": -2.3}}))
    async def score(request: Request, asked: ScoreRequest):
        """The mean log-probability per token of each option (natural logarithm; 0 is certain), and the likeliest."""
        return _json(await service.score(request, asked))

    @router.post("/generate", responses=_answers({"positions": 3, "text": "a", "finish": "stop", "tokens": 2}))
    async def generate(request: Request, asked: GenerateRequest):
        """Answers in the LLM's own words; `finish` says why each is over: end, stop or length."""
        return _json(await service.generate(request, asked))

    app.include_router(router)


def _answers(answer: dict) -> dict:
    """The description of what a question's path answers."""
    measured = {"prefix_positions": 8, "seconds": 0.0021, "waited": 0.0001, "together": 1}
    said = (
        "`positions` of the LLM that a query takes behind the `prefix_positions` of what stands before it; `seconds` that its batch took,"
        " after it had `waited`; `together`: requests of the batch."
    )
    return {200: {"description": said, "content": {JSON: {"example": {"answers": [answer]} | measured}}}}


def _other_paths(app: FastAPI, service: Service, names: dict[str, str | None]) -> None:
    engine, example = service.engine, example_for(service.engine.llm)

    @app.get("/health")
    async def health():
        """Whether the server answers, and how many requests wait."""
        return _json({"status": "ok", "waiting": service.worker.waiting})

    @app.get("/info")
    async def info():
        """The LLM and the distiller, the server's limits, and an example that the LLM can read."""
        template = service.template
        return _json(
            names
            | {
                "window": engine.llm.window,
                "template": template.name,
                "vectors": getattr(engine.distiller, "num_vectors", None),
                "of_each_chunk": engine.distiller is not None
                and engine.distiller.vectors_of_chunks(2) > engine.distiller.num_vectors,
            }
            | {"limits": dataclasses.asdict(service.limits)}
            | {"example": example._asdict()}
        )

    @app.get("/metrics")
    async def measured():
        """Counts and times, for Prometheus."""
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)


def _page_paths(app: FastAPI) -> None:
    home, docs = pages.home(), pages.reference(app.openapi())

    @app.get("/", include_in_schema=False)
    async def page():
        return Response(home.html, headers=home.headers, media_type="text/html")

    @app.get("/docs", include_in_schema=False)
    async def reference():
        return Response(docs.html, headers=docs.headers, media_type="text/html")


def facts(key: str, pack: Pack) -> dict:
    """What a pack says of itself, as JSON."""
    said = {
        name: getattr(pack, name)
        for name in ("num_vectors", "shorter", "num_demonstrations", "dropped", "kind", "bos", "llm", "distiller")
    }
    prints = {name: getattr(pack, name) for name in ("llm_fingerprint", "distiller_fingerprint")}
    return {"id": key} | said | prints | {"template": pack.template.name, "bytes": pack.vectors.nbytes}


def _json(value, status: int = 200) -> Response:
    return Response(json.dumps(value, allow_nan=False, ensure_ascii=False).encode(), status, media_type=JSON)
