"""One HTTP server that forwards every request to a replica."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Literal, Protocol

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import Counter, Gauge
from starlette.types import Message, Receive, Scope, Send

from expertshare.errors import ExpertShareError
from expertshare.serving.app import OPEN_PATHS, add_handlers
from expertshare.serving.event_stream import unless_left
from expertshare.serving.logs import log
from expertshare.serving.metrics import RequestMetrics
from expertshare.serving.middleware import NOTES, RequestChecks
from expertshare.serving.refusals import refusal_of
from expertshare.serving.replicas.forwarding import Call, Forwarding, ReplicaLostError
from expertshare.serving.replicas.replica import REPLICA_HEADER
from expertshare.serving.scheduling import EngineClosedError
from expertshare.serving.settings import ServerSettings

AdmissionState = Literal["ready", "draining", "closed"]


class Admission:
    """Lets requests in until `drain`. Threads may wait here for what the event loop does."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._state: AdmissionState = "ready"

    @property
    def state(self) -> AdmissionState:
        """Whether requests are taken, as the health route says."""
        return self._state

    @property
    def num_waiting(self) -> int:
        """None: requests wait in their replica."""
        return 0

    @property
    def num_running(self) -> int:
        """Number of requests that were admitted and are not finished."""
        return self._running

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """One request, from its first byte to its last. Raises EngineClosedError once the admission is shut."""
        with self._changed:
            if self._state != "ready":
                raise EngineClosedError(f"expected a server that is ready, but it is {self._state}: ask another one")
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def drain(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            if self._state == "ready":
                self._state = "draining"

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether everybody has left, after `timeout_s` seconds at most."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running == 0, timeout_s)

    def close(self) -> None:
        """For good; requests that still run are cut off with the server."""
        with self._changed:
            self._state = "closed"


class ProxyMetrics(RequestMetrics):
    """Of a server in front of several engines."""

    def __init__(self) -> None:
        super().__init__()
        self.retried = Counter(
            "expertshare_retried_requests", "Requests that a second replica was asked.", registry=self.registry
        )
        self.lost = Counter(
            "expertshare_lost_requests", "Requests that were told that their replica ended.", registry=self.registry
        )
        self._running = Gauge("expertshare_running", "Requests on their way.", registry=self.registry)
        self._ready = Gauge("expertshare_ready", "1 where new requests are taken.", registry=self.registry)
        self._replicas = Gauge("expertshare_replicas", "Replicas by state.", ["state"], registry=self.registry)

    def text(self, *, running: int, ready: bool, replicas: Mapping[str, int]) -> bytes:
        """In Prometheus' text format, with the values of now."""
        self._running.set(running)
        self._ready.set(int(ready))
        self._replicas.clear()
        for state, count in replicas.items():
            self._replicas.labels(state).set(count)
        return self.exposition()


_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/{path:path}")
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_OWN_HEADERS = frozenset({REPLICA_HEADER, b"x-request-id"})  # the proxy gives a number of its own


class Replicas(Protocol):
    """What answers requests: several engines, each in its process."""

    def answer(self, call: Call) -> AsyncGenerator[Message]:
        """The messages of some replica's response. Raises ReplicaLostError if that replica ends meanwhile, and
        EngineBusyError where too many requests wait."""
        ...

    def states(self) -> Mapping[str, int]:
        """How many replicas are in each state; blocks for a moment."""
        ...


RUNNING = "running"
"""The state of replicas that answer."""


def create_proxy(
    replicas: Replicas, admission: Admission, settings: ServerSettings, *, open_paths: Iterable[str] = ()
) -> FastAPI:
    """An application that asks `replicas` for everything but /health, /ready and /metrics. open_paths: of theirs, that
    need no API key either."""
    metrics = ProxyMetrics()
    # without an OpenAPI description of its own: the replicas' one is asked for like anything else
    app = FastAPI(title="expertshare", openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(_state_routes(replicas, admission, metrics))

    async def forward(request: Request) -> Response:
        call = Call(
            method=request.method,
            path=request.scope["path"],  # as RequestChecks has seen it: a URL is put together with the Host header
            query=request.scope["query_string"],
            headers=tuple(request.scope["headers"]),
            body=await request.body(),
        )
        return Forwarded(call, replicas, admission, metrics, settings.send_timeout_s)

    for path in _PATHS:
        app.add_api_route(path, forward, methods=_METHODS, response_model=None)
    add_handlers(app)
    app.add_middleware(RequestChecks, settings=settings, metrics=metrics, open_paths=(*OPEN_PATHS, *open_paths))
    return app


class Forwarded(Response):
    """A replica's response, on its way to the client."""

    def __init__(
        self, call: Call, replicas: Replicas, admission: Admission, metrics: ProxyMetrics, send_timeout_s: float
    ) -> None:
        super().__init__()
        self._call, self._replicas, self._admission, self._metrics = call, replicas, admission, metrics
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the response; a client that leaves, or takes nothing, ends the work in the replica."""
        forwarding = Forwarding(lambda: self._replicas.answer(self._call))
        try:
            async with self._admission.request():
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


def _state_routes(replicas: Replicas, admission: Admission, metrics: ProxyMetrics) -> APIRouter:
    router = APIRouter(tags=["state"])

    @router.get("/health", response_model=None)
    async def health() -> Response:
        """503 while no replica answers, with the number of replicas in each state."""
        states = await asyncio.to_thread(replicas.states)
        status = 200 if states.get(RUNNING) else 503
        return JSONResponse({"status": admission.state, "replicas": dict(states)}, status_code=status)

    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether new requests are taken."""
        states = await asyncio.to_thread(replicas.states)
        status = 200 if admission.state == "ready" and states.get(RUNNING) else 503
        return JSONResponse({"status": admission.state, "replicas": dict(states)}, status_code=status)

    @router.get("/metrics", response_model=None)
    async def show_metrics() -> Response:
        """For Prometheus."""
        states = await asyncio.to_thread(replicas.states)
        text = metrics.text(running=admission.num_running, ready=admission.state == "ready", replicas=states)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
