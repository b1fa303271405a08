"""The entrance: one HTTP server that forwards every request to a replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Protocol

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from expertshare.errors import ExpertShareError
from expertshare.serving.app import OPEN_PATHS, add_handlers
from expertshare.serving.event_stream import unless_left
from expertshare.serving.gate import NOTES, Gate
from expertshare.serving.logs import log
from expertshare.serving.refusals import refusal_of
from expertshare.serving.replicas.call import Call
from expertshare.serving.replicas.door import Door
from expertshare.serving.replicas.entrance_metrics import EntranceMetrics
from expertshare.serving.replicas.forwarding import Forwarding, ReplicaLostError
from expertshare.serving.replicas.replica import REPLICA_HEADER
from expertshare.serving.settings import ServerSettings

_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/{path:path}")
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_OWN_HEADERS = frozenset({REPLICA_HEADER, b"x-request-id"})  # the entrance gives a number of its own


class Replicas(Protocol):
    """Whoever answers."""

    def answer(self, call: Call) -> AsyncGenerator[Message]:
        """The messages of some replica's response. Raises ReplicaLostError if that replica ends meanwhile, and
        EngineBusyError where too many requests wait."""
        ...

    def states(self) -> Mapping[str, int]:
        """How many replicas are in each state; blocks for a moment."""
        ...


RUNNING = "running"
"""The state of replicas that answer."""


def create_entrance(
    replicas: Replicas, door: Door, settings: ServerSettings, *, open_paths: Iterable[str] = ()
) -> FastAPI:
    """An application that asks `replicas` for everything but /health, /ready and /metrics. open_paths: of theirs, that
    need no API key either."""
    metrics = EntranceMetrics()
    # without an OpenAPI description of its own: the replicas' one is asked for like anything else
    app = FastAPI(title="expertshare", openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(_state_routes(replicas, door, metrics))

    async def forward(request: Request) -> Response:
        call = Call(
            method=request.method,
            path=request.scope["path"],  # as the gate has seen it: a URL is put together with the Host header
            query=request.scope["query_string"],
            headers=tuple(request.scope["headers"]),
            body=await request.body(),
        )
        return Forwarded(call, replicas, door, metrics, settings.send_timeout_s)

    for path in _PATHS:
        app.add_api_route(path, forward, methods=_METHODS, response_model=None)
    add_handlers(app)
    app.add_middleware(Gate, settings=settings, metrics=metrics, open_paths=(*OPEN_PATHS, *open_paths))
    return app


class Forwarded(Response):
    """A replica's response, on its way to the client."""

    def __init__(
        self, call: Call, replicas: Replicas, door: Door, metrics: EntranceMetrics, send_timeout_s: float
    ) -> None:
        super().__init__()
        self._call, self._replicas, self._door, self._metrics = call, replicas, door, metrics
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the response; a client that leaves, or takes nothing, ends the work in the replica."""
        forwarding = Forwarding(lambda: self._replicas.answer(self._call))
        try:
            async with self._door.passage():
                await unless_left(receive, self._relay(forwarding, scope, send))
        except ExpertShareError as error:
            await self._refuse(error, scope, receive, send)
        finally:
            if forwarding.retried:
                self._metrics.retried.inc()
                scope[NOTES]["retried"] = True
            if forwarding.lost:
                self._metrics.lost.inc()
                scope[NOTES]["error"] = "replica_lost"

    async def _relay(self, forwarding: Forwarding, scope: Scope, send: Send) -> None:
        messages = forwarding.messages()
        try:
            async for message in messages:
                async with asyncio.timeout(self._send_timeout_s):
                    await send(_outward(message, scope))
        except TimeoutError:
            log("client too slow", seconds=self._send_timeout_s)  # the server closes what is not complete
        except ReplicaLostError:
            log("response cut off", path=scope["path"])  # likewise
        finally:
            await messages.aclose()

    async def _refuse(self, error: ExpertShareError, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = refusal_of(error)
        scope[NOTES]["error"] = refusal.code
        await refusal.response()(scope, receive, send)


def _outward(message: Message, scope: Scope) -> Message:
    """Without what only the log should know."""
    if message["type"] != "http.response.start":
        return message
    headers = list(message.get("headers", []))
    named = dict(headers)
    scope[NOTES]["replica"] = bytes(named.get(REPLICA_HEADER, b"")).decode("latin-1")
    scope[NOTES]["replica_request"] = bytes(named.get(b"x-request-id", b"")).decode("latin-1")
    return {**message, "headers": [pair for pair in headers if pair[0] not in _OWN_HEADERS]}


def _state_routes(replicas: Replicas, door: Door, metrics: EntranceMetrics) -> APIRouter:
    router = APIRouter(tags=["state"])

    @router.get("/health", response_model=None)
    async def health() -> Response:
        """503 while no replica answers, with the number of replicas in each state."""
        states = await asyncio.to_thread(replicas.states)
        status = 200 if states.get(RUNNING) else 503
        return JSONResponse({"status": door.state, "replicas": dict(states)}, status_code=status)

    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether new requests are taken."""
        states = await asyncio.to_thread(replicas.states)
        status = 200 if door.state == "ready" and states.get(RUNNING) else 503
        return JSONResponse({"status": door.state, "replicas": dict(states)}, status_code=status)

    @router.get("/metrics", response_model=None)
    async def show_metrics() -> Response:
        """For Prometheus."""
        states = await asyncio.to_thread(replicas.states)
        text = metrics.text(running=door.num_running, ready=door.state == "ready", replicas=states)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
