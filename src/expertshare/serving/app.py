"""The application: routes over an engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import expertshare
from expertshare.errors import ExpertShareError
from expertshare.serving.completions import Completions
from expertshare.serving.engine import Engine
from expertshare.serving.logs import LOGGER
from expertshare.serving.metrics import ServerMetrics
from expertshare.serving.middleware import RequestChecks
from expertshare.serving.refusals import Refusal, refusal_of
from expertshare.serving.requests import LONGEST_QUOTE, ChatRequest, CompletionRequest
from expertshare.serving.settings import ServerSettings
from expertshare.serving.text import Codec

OPEN_PATHS = ("/health", "/ready", "/metrics")
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for status, text in (
        (400, "Unusable request"),
        (401, "No or wrong API key"),
        (404, "Unknown model or path"),
        (408, "Deadline exceeded"),
        (413, "Body too large"),
        (429, "Queue full"),
        (503, "Shutting down"),
    )
}


def create_app(
    engine: Engine,
    settings: ServerSettings | None = None,
    *,
    extra_routers: Sequence[APIRouter] = (),
    open_paths: Iterable[str] = (),
) -> FastAPI:
    """An application that serves `engine`, which starts and closes with it.

    extra_routers: included as they are, for example the live page's; their requests pass the same checks. open_paths:
    paths of theirs that need no API key. Raises InputError for a model without a tokenizer.
    """
    settings = settings or ServerSettings()
    metrics = ServerMetrics(engine)
    name = settings.model_name or engine.loaded.path.resolve().name
    completions = Completions(engine, Codec(engine.loaded), settings, metrics, name)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield

    app = FastAPI(
        title="expertshare",
        version=expertshare.__version__,
        lifespan=life,
        docs_url=None,  # those pages would load scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(_state_routes(engine, metrics))
    app.include_router(_openai_routes(completions))
    for router in extra_routers:
        app.include_router(router)
    add_handlers(app)
    app.add_middleware(RequestChecks, settings=settings, metrics=metrics, open_paths=(*OPEN_PATHS, *open_paths))
    return app


def _openai_routes(completions: Completions) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI API"], responses=_REFUSALS)
    card = {"id": completions.model_name, "object": "model", "created": int(time.time()), "owned_by": "expertshare"}

    @router.post("/chat/completions", response_model=None)
    async def create_chat_completion(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as server-sent events, block by block."""
        return await completions.chat(asked, request)

    @router.post("/completions", response_model=None)
    async def create_completion(asked: CompletionRequest, request: Request) -> Response:
        """Go on with a text, or several, without a chat template."""
        return await completions.complete(asked, request)

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        """The model that this server has."""
        return {"object": "list", "data": [card]}

    @router.get("/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> dict[str, Any]:
        """The same, by its name."""
        if model_id != completions.model_name:
            raise completions.unknown_model(model_id)
        return card

    return router


def _state_routes(engine: Engine, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter(tags=["state"])

    @router.get("/health", response_model=None)
    async def health() -> Response:
        """Whether the process is worth keeping: 503 once its engine has failed."""
        return JSONResponse({"status": engine.state}, status_code=503 if engine.state == "broken" else 200)

    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether new requests are taken: 503 while draining."""
        return JSONResponse({"status": engine.state}, status_code=200 if engine.state == "ready" else 503)

    @router.get("/metrics", response_model=None)
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def add_handlers(app: FastAPI) -> None:
    """Every error becomes a refusal as OpenAI's clients know it, and none tells how the server is made."""

    @app.exception_handler(ExpertShareError)
    async def refuse(_request: Request, error: ExpertShareError) -> Response:
        return refusal_of(error).response()

    @app.exception_handler(RequestValidationError)
    async def refuse_shape(_request: Request, error: RequestValidationError) -> Response:
        return _unusable(error).response()

    @app.exception_handler(HTTPException)
    async def refuse_path(_request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return Refusal(error.status_code, str(error.detail), headers=headers).response()

    @app.exception_handler(Exception)
    async def fail(_request: Request, error: Exception) -> Response:
        LOGGER.error("a request failed", exc_info=error)
        return Refusal(500, "this server made a mistake; its log says which", kind="server_error").response()


def _unusable(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong with a body; nothing of what it held."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refusal(400, "the body is not JSON: send a JSON object", code="invalid_json")
    place = [str(part) for part in first["loc"] if part != "body"]
    where = ".".join(place)[:LONGEST_QUOTE]
    message = f"{where}: {first['msg']}" if where else f"the body: {first['msg']} (sent as application/json?)"
    return Refusal(400, message, param=place[0] if place else None, code="invalid_value")
