"""One HTTP server that forwards every request to a replica."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from expertshare.errors import ExpertShareError
from expertshare.serving.app import add_common
from expertshare.serving.forwarding import REPLICA_HEADER, Call, Forwarding, ReplicaLostError
from expertshare.serving.middleware import NOTES
from expertshare.serving.ray_application import RayReplicas
from expertshare.serving.responses import TooSlowError, in_time, refusal_of, unless_left
from expertshare.serving.settings import ServerSettings
from expertshare.serving.telemetry import RequestMetrics, log
from expertshare.serving.uvicorn_server import Drainable


class Admission(Drainable):
    """Lets requests in until `drain`; they wait in their replica. Threads may wait for what the event loop does."""

    def __init__(self) -> None:
        super().__init__("ready")
        self._running = 0

    @property
    def num_running(self) -> int:
        """Number of requests that were admitted and are not finished."""
        return self._running

    def _has_work(self) -> bool:
        return self._running > 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, from its first byte to its last. Raises EngineClosedError once the admission is shut."""
        with self._changed:
            self._check_ready()
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """For good; requests that still run are cut off with the server."""
        with self._changed:
            self._state = "closed"


class ProxyMetrics(RequestMetrics):
    """Of a server in front of several engines, by the names of docs/serving.md."""

    def __init__(self, replicas: RayReplicas, admission: Admission) -> None:
        super().__init__()
        self._replicas, self._admission = replicas, admission
        self.retried = Counter(
            "expertshare_retried_requests", "Requests that a second replica was asked.", registry=self.registry
        )
        self.lost = Counter(
            "expertshare_lost_requests", "Requests that were told that their replica ended.", registry=self.registry
        )

    def collect(self) -> Iterator[Metric]:
        """What is looked up when somebody asks."""
        ready = int(self._admission.state == "ready")
        yield GaugeMetricFamily("expertshare_running", "Requests on their way.", self._admission.num_running)
        yield GaugeMetricFamily("expertshare_ready", "1 where new requests are taken.", ready)
        by_state = GaugeMetricFamily("expertshare_replicas", "Replicas by state.", labels=["state"])
        for state, count in self._replicas.states().items():
            by_state.add_metric([state], count)
        yield by_state


_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/{path:path}")
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_OWN_HEADERS = frozenset({REPLICA_HEADER, b"x-request-id"})  # the proxy gives a number of its own


RUNNING = "running"
"""The state of replicas that answer."""


def create_proxy(
    replicas: RayReplicas, admission: Admission, settings: ServerSettings, *, open_paths: Iterable[str] = ()
) -> FastAPI:
    """An application that asks `replicas` for everything but /health, /ready and /metrics. open_paths: of theirs, that
    need no API key either."""
    metrics = ProxyMetrics(replicas, admission)

    def status() -> tuple[dict[str, Any], bool]:
        states = dict(replicas.states())
        return {"status": admission.state, "replicas": states}, bool(states.get(RUNNING))

    # without an OpenAPI description of its own: the replicas' one is asked for like anything else
    app = FastAPI(title="expertshare", openapi_url=None, docs_url=None, redoc_url=None)
    add_common(app, settings, metrics, status, open_paths)

    for path in _PATHS:
        forwarder = Forwarder(path, replicas, admission, metrics, settings.send_timeout_s)
        app.router.routes.append(Route(path, forwarder, methods=_METHODS))
    return app


@dataclass(frozen=True, slots=True)
class Forwarder:
    """ASGI application: answers every request by what some replica does. path: its route, for the log and metrics."""

    path: str
    replicas: RayReplicas
    admission: Admission
    metrics: ProxyMetrics
    send_timeout_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; a client that leaves, or takes nothing, ends the work in the replica."""
        call = Call(
            method=scope["method"],
            path=scope["path"],  # as RequestChecks has seen it: a URL is put together with the Host header
            query=scope["query_string"],
            headers=tuple(scope["headers"]),
            body=await Request(scope, receive).body(),
        )
        forwarding = Forwarding(lambda: self.replicas.answer(call))
        try:
            with self.admission.request():
                await unless_left(receive, self._relay(forwarding, scope, in_time(send, self.send_timeout_s)))
        except ExpertShareError as error:
            refusal = refusal_of(error)
            scope[NOTES]["error"] = refusal.code
            await refusal.response()(scope, receive, send)
        finally:
            if forwarding.retried:
                self.metrics.retried.inc()
                scope[NOTES]["retried"] = True
            if forwarding.lost:
                self.metrics.lost.inc()
                scope[NOTES]["error"] = "replica_lost"

    async def _relay(self, forwarding: Forwarding, scope: Scope, send: Send) -> None:
        try:
            async with aclosing(forwarding.messages()) as messages:
                async for message in messages:
                    await send(_outward(message, scope))
        except TooSlowError:
            pass  # the server closes what is not complete
        except ReplicaLostError:
            log("response cut off", path=scope["path"])  # likewise


def _outward(message: Message, scope: Scope) -> Message:
    """Without what only the log should know."""
    if message["type"] != "http.response.start":
        return message
    headers = list(message.get("headers", []))
    named = dict(headers)
    scope[NOTES]["replica"] = bytes(named.get(REPLICA_HEADER, b"")).decode("latin-1")
    scope[NOTES]["replica_request"] = bytes(named.get(b"x-request-id", b"")).decode("latin-1")
    return {**message, "headers": [pair for pair in headers if pair[0] not in _OWN_HEADERS]}
