"""A live page that is really served, for tests that come over the network, and a trace source that does as told."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI

from expertshare.serving.live import Event, LiveLimits, TraceSource, live_routes
from expertshare.serving.requests import TraceRequest

FACTS = {"name": "stub", "num_moe_layers": 2, "num_experts": 4, "block_length": 4}


@dataclass
class StubSource:
    """Events of a script, each as soon as it is allowed; what was asked for is kept."""

    script: Callable[[], Iterator[Event]] = lambda: iter(())
    allowed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    model: Mapping[str, Any] = field(default_factory=lambda: FACTS)
    asked: list[dict[str, Any]] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def allow(self, events: int = 1000) -> None:
        self.allowed.release(events)

    def facts(self) -> Mapping[str, Any]:
        return self.model

    def trace(self, asked: TraceRequest, stop: threading.Event) -> Iterator[Event]:
        self.asked.append(asdict(asked))
        try:
            for event in self.script():
                while not self.allowed.acquire(timeout=0.005):
                    if stop.is_set():
                        return
                yield event
        finally:
            self.closed.set()


@contextmanager
def served(source: TraceSource, limits: LiveLimits | None = None) -> Iterator[int]:
    """The page behind uvicorn; yields its port."""
    app = FastAPI()
    app.include_router(live_routes(source, limits=limits))
    with serving(app) as port:
        yield port


@contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    """The application behind uvicorn in a thread of this process; yields its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Fail unless `condition` becomes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@dataclass(frozen=True)
class Reply:
    """An answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.body)["error"]
        return found

    @property
    def events(self) -> list[Event]:
        return [parse(part) for part in self.body.decode().split("\n\n") if part]


def parse(part: str) -> Event:
    """One server-sent event; its name is its type."""
    name, data = part.split("\n")
    event: Event = json.loads(data.removeprefix("data: "))
    assert name == f"event: {event['type']}"
    return event


def ask(
    port: int, path: str, body: bytes | Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> Reply:
    """GET, or POST where there is a body."""
    connection, response = begin(port, path, body, headers)
    try:
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def begin(
    port: int, path: str, body: bytes | Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """The same, with the response's body unread."""
    sent = json.dumps(body).encode() if isinstance(body, Mapping) else body
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    method = "GET" if sent is None else "POST"
    connection.request(method, path, sent, {"Content-Type": "application/json", **(headers or {})})
    return connection, connection.getresponse()
