"""Server-sent events to a client that may be slow, or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from expertshare.serving.logs import log

DONE = b"data: [DONE]\n\n"
_ALIVE = b": waiting\n\n"
_ALIVE_EVERY_S = 15.0
_T = TypeVar("_T")


class TooSlowError(Exception):
    """The client takes nothing more."""


def as_event(value: Any) -> bytes:
    """One event with a JSON object."""
    return b"data: " + json.dumps(value, allow_nan=False).encode("ascii") + b"\n\n"


class EventStream(Response):
    """Sends `events`; calls `on_end` once when they have all been sent, or the client has left, or takes longer than
    `send_timeout_s` to take one. While none comes, a comment every 15 s keeps the connection alive."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], *, on_end: Callable[[], object], send_timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end, self._send_timeout_s = events, on_end, send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the response."""
        del scope  # says nothing that matters here
        try:
            await unless_left(receive, self._send_all(send))
        except TooSlowError:
            log("client too slow", seconds=self._send_timeout_s)  # the server closes what is not complete
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        event: bytes | None = b""
        while event is not None:
            coming = asyncio.ensure_future(anext(self._events, None))
            try:
                while not (await asyncio.wait({coming}, timeout=_ALIVE_EVERY_S))[0]:
                    await self._send_body(send, _ALIVE)
                event = coming.result()
            finally:
                coming.cancel()
            await self._send_body(send, event or b"", more=event is not None)

    async def _send_body(self, send: Send, body: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError as error:
            raise TooSlowError from error


async def unless_left(receive: Receive, work: Awaitable[_T]) -> _T | None:
    """The result of `work`; None, and `work` cancelled, once the client has left. The request's body has been read."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
