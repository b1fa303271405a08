"""A stream to a client that stalls, leaves, or waits for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from expertshare.serving import responses
from expertshare.serving.responses import EventStream, as_event


class Client:
    """The two ends of an ASGI connection. most: bytes that it takes before it stalls."""

    def __init__(self, most: float = float("inf")) -> None:
        self.taken, self.most, self.complete = b"", most, False
        self.left = asyncio.Event()

    async def send(self, message: dict[str, Any]) -> None:
        body = message.get("body", b"")
        if len(self.taken) + len(body) > self.most:
            await asyncio.Event().wait()
        self.taken += body
        self.complete = message["type"] == "http.response.body" and not message["more_body"]

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


async def numbers(count: int, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    for number in range(count):
        await asyncio.sleep(pause_s)
        yield as_event(number)


def run(client_of: Any, events: AsyncIterator[bytes], leave_after_s: float | None = None) -> tuple[Client, int]:
    ends: list[int] = []

    async def go() -> Client:
        client = client_of()
        stream = EventStream(events, on_end=lambda: ends.append(1), send_timeout_s=0.05)
        if leave_after_s is not None:
            asyncio.get_running_loop().call_later(leave_after_s, client.left.set)
        async with asyncio.timeout(10):
            await stream({}, client.receive, client.send)
        return client

    return asyncio.run(go()), len(ends)


def test_all_events_and_an_end() -> None:
    client, ends = run(Client, numbers(3))
    assert client.taken == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert client.complete
    assert ends == 1


def test_a_client_that_stalls_is_given_up() -> None:
    client, ends = run(lambda: Client(most=20), numbers(1000))
    assert len(client.taken) <= 20
    assert not client.complete
    assert ends == 1


def test_a_client_that_leaves_ends_the_stream_at_once() -> None:
    client, ends = run(Client, numbers(1000, pause_s=0.01), leave_after_s=0.1)
    assert not client.complete
    assert ends == 1


def test_a_comment_keeps_a_silent_stream_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "_ALIVE_EVERY_S", 0.02)
    client, _ = run(Client, numbers(1, pause_s=0.1))
    assert client.taken.count(b": waiting\n\n") >= 2
    assert client.taken.endswith(b"data: 0\n\n")
