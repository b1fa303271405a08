"""The application: routes over an engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
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
from expertshare.serving.middleware import RequestChecks
from expertshare.serving.requests import ChatRequest, CompletionRequest
from expertshare.serving.responses import error_responses, refusal_of
from expertshare.serving.settings import ServerSettings
from expertshare.serving.telemetry import RequestMetrics, ServerMetrics

OPEN_PATHS = ("/health", "/ready", "/metrics")
_REFUSALS = {
    400: "Unusable request",
    401: "No or wrong API key",
    404: "Unknown model or path",
    408: "Deadline exceeded",
    413: "Body too large",
    429: "Queue full",
    503: "Shutting down",
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
    completions = Completions(engine, settings, metrics)

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
    add_common(app, settings, metrics, lambda: ({"status": engine.state}, engine.state != "broken"), open_paths)
    for router in (_openai_routes(completions), *extra_routers):
        app.include_router(router)
    return app


def _openai_routes(completions: Completions) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI API"], responses=error_responses(_REFUSALS))
    card = {"id": completions.model_name, "object": "model", "created": int(time.time()), "owned_by": "expertshare"}

    @router.post("/chat/completions", response_model=None)
    async def create_chat_completion(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as server-sent events, block by block."""
        return await completions.answer(asked, request)

    @router.post("/completions", response_model=None)
    async def create_completion(asked: CompletionRequest, request: Request) -> Response:
        """Go on with a text, or several, without a chat template."""
        return await completions.answer(asked, request)

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


Status = Callable[[], tuple[dict[str, Any], bool]]
"""Looks up what /health and /ready say, with the state as "status", and whether the server is worth keeping. It may
block for a moment."""


def add_common(
    app: FastAPI, settings: ServerSettings, metrics: RequestMetrics, status: Status, open_paths: Iterable[str]
) -> None:
    """What every server has: the routes of its state, the checks of requests, and errors as OpenAI's clients know them.
    open_paths: beside those of the state, that need no API key."""
    router = APIRouter(tags=["state"])

    @router.get("/health", response_model=None)
    def health() -> Response:
        """Whether the process is worth keeping: 503 once its engine has failed, or while no replica answers."""
        body, healthy = status()
        return JSONResponse(body, 200 if healthy else 503)

    @router.get("/ready", response_model=None)
    def ready() -> Response:
        """Whether new requests are taken: 503 while draining."""
        body, healthy = status()
        return JSONResponse(body, 200 if healthy and body["status"] == "ready" else 503)

    @router.get("/metrics", response_model=None)
    def show_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def refuse(_request: Request, error: Exception) -> Response:
        return refusal_of(error).response()

    app.include_router(router)
    for kind in (ExpertShareError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_middleware(RequestChecks, settings=settings, metrics=metrics, open_paths=(*OPEN_PATHS, *open_paths))
