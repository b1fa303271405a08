"""What every request passes first: key, size of the body, a number of its own, a line in the log."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertshare.serving.logs import log
from expertshare.serving.metrics import RequestMetrics
from expertshare.serving.refusals import Refusal
from expertshare.serving.settings import ServerSettings

NOTES = "expertshare.notes"
"""Where in the scope a route puts what the log should say of the request."""
LEFT = 499
"""Status in logs and metrics of a client that left before it was answered."""
_CLOSE = {"Connection": "close"}  # of a body that was not read to its end


class RequestChecks:
    """ASGI middleware. open_paths: need no key."""

    def __init__(
        self, app: ASGIApp, *, settings: ServerSettings, metrics: RequestMetrics, open_paths: Iterable[str]
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._open_paths = frozenset(open_paths)
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        try:
            self._check_key(scope)
            replay = await self._with_body(scope, receive)
            if replay is None:
                exchange.status = LEFT
            else:
                await self._app(scope, replay, exchange.send)
        except Refusal as refusal:
            await refusal.response()(scope, receive, exchange.send)
        finally:
            self._note(scope, exchange)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in self._open_paths:
            return
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, key = given.partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
        if not (right and scheme.lower() == "bearer"):
            raise Refusal(
                401,
                "expected this server's API key: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive | None:
        """A `receive` that gives the whole body at once; None where the client has left before its end."""
        most = self._settings.max_body_bytes
        told = Headers(scope=scope).get("content-length", "0")
        if told.isdecimal() and int(told[:20]) > most:
            raise self._too_long()
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise self._too_long()
                    more = message.get("more_body", False)
        except TimeoutError as error:
            message_text = f"the body did not come within {self._settings.body_timeout_s:g} s: send it faster"
            raise Refusal(408, message_text, code="body_timeout", headers=_CLOSE) from error
        return _Replay(bytes(body), receive)

    def _too_long(self) -> Refusal:
        most = self._settings.max_body_bytes
        return Refusal(
            413, f"the body may have {most} bytes: send a shorter one", code="body_too_large", headers=_CLOSE
        )

    def _note(self, scope: Scope, exchange: _Exchange) -> None:
        seconds, path = time.monotonic() - exchange.began, _path(scope)
        self._metrics.requests.labels(path, str(exchange.status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        log(
            "request",
            id=exchange.number,
            method=scope["method"],
            path=path,
            status=exchange.status,
            seconds=round(seconds, 6),
            **scope[NOTES],
        )


@dataclass(slots=True)
class _Exchange:
    """One request: its number, when it began, and the status that was sent (500: an error that nobody foresaw is on its
    way past the middleware)."""

    scope: Scope
    inner: Send
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    status: int = 500

    def __post_init__(self) -> None:
        self.scope[NOTES] = {}

    async def send(self, message: Message) -> None:
        """Pass a message on, with the number in the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.number.encode())]
            message = {**message, "headers": headers}
        await self.inner(message)


class _Replay:
    """Gives the body that was read, then whatever comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _path(scope: Scope) -> str:
    """The route's pattern: a label must not take any value that a client can think of."""
    route: Any = scope.get("route")
    return str(getattr(route, "path", "other"))
