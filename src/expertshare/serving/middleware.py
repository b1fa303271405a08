"""What every request passes first: key, size of the body, a number of its own, a line in the log."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertshare.serving.responses import Refusal
from expertshare.serving.settings import ServerSettings
from expertshare.serving.telemetry import RequestMetrics, log

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
        number, began = uuid.uuid4().hex, time.monotonic()
        status = 500  # where nothing is sent: an error that nobody foresaw is on its way past this
        scope[NOTES] = {}

        async def send_numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", number.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            self._check_key(scope)
            body = await self._read_body(scope, receive)
            if body is None:
                status = LEFT
            else:
                await self._app(scope, replay(body, receive), send_numbered)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send_numbered)
        finally:
            seconds, path = time.monotonic() - began, _path(scope)
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(seconds)
            asked = {"id": number, "method": scope["method"], "path": path}
            log("request", **asked, status=status, seconds=round(seconds, 6), **scope[NOTES])

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in self._open_paths:
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
        if not (right and scheme.lower() == "bearer"):
            raise Refusal(
                401,
                "expected this server's API key: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client has left before its end."""
        most, seconds = self._settings.max_body_bytes, self._settings.body_timeout_s
        told = Headers(scope=scope).get("content-length", "0")
        body, more, too_long = bytearray(), True, told.isdecimal() and int(told[:20]) > most
        try:
            async with asyncio.timeout(seconds):
                while more and not too_long:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more, too_long = message.get("more_body", False), len(body) > most
        except TimeoutError as error:
            text = f"the body did not come within {seconds:g} s: send it faster"
            raise Refusal(408, text, code="body_timeout", headers=_CLOSE) from error
        if too_long:
            text = f"the body may have {most} bytes: send a shorter one"
            raise Refusal(413, text, code="body_too_large", headers=_CLOSE)
        return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, then whatever comes."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return unread.pop() if unread else await receive()

    return receive_again


def _path(scope: Scope) -> str:
    """The route's pattern: a label must not take any value that a client can think of."""
    return str(getattr(scope.get("route") or scope.get("endpoint"), "path", "other"))
