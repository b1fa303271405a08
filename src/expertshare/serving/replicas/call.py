"""A request as a value that can be sent to another process, and an application's answer to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """An HTTP request with its whole body."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


async def answer_call(app: ASGIApp, call: Call) -> AsyncGenerator[Message]:
    """The messages of the application's response. Whoever stops asking for more is to it a client that has left.

    Raises what the application raises before its response is complete.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    unread = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(_scope(call), receive, sent.put)
        finally:
            sent.put_nowait(None)

    running = asyncio.create_task(run())
    complete = False
    try:
        while not complete and (message := await sent.get()) is not None:
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            yield message
        if not complete:
            await running
    finally:
        left.set()
        if not complete:
            running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _scope(call: Call) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
    }
