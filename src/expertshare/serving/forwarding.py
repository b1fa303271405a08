"""A request as a value for another process, and the response of whichever replica lives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

from expertshare.errors import ExpertShareError
from expertshare.serving.middleware import replay
from expertshare.serving.responses import DONE, UNAVAILABLE, Refusal, as_event

REPLICA_HEADER = b"x-expertshare-replica"
"""Who has answered, for the proxy, which keeps it to itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """An HTTP request with its whole body."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


async def answer_call(app: ASGIApp, call: Call) -> AsyncGenerator[Message]:
    """The messages of the application's response. A caller that stops iterating is, to it, a client that left.

    Raises what the application raises before its response is complete.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    named = {"method": call.method, "path": call.path, "query_string": call.query}
    scope = {"type": "http", "http_version": "1.1", **named, "headers": list(call.headers)}

    async def receive() -> Message:
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, replay(call.body, receive), sent.put)
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


class ReplicaLostError(ExpertShareError):
    """The process that was answering has ended."""


class Forwarding:
    """One response. attempt: asks some replica, from the beginning. retried: whether a second one was asked; lost:
    whether the client was told of a loss."""

    def __init__(self, attempt: Callable[[], AsyncGenerator[Message]]) -> None:
        self._attempt = attempt
        self._head: Message | None = None
        self._head_sent = self._told = self._refused_late = False
        self._openings: list[Message] = []
        self.retried = self.lost = False

    async def messages(self) -> AsyncGenerator[Message]:
        """What the client gets. Raises ReplicaLostError where part of a response that is no stream of events has been
        passed on: then its connection is to be closed."""
        while True:
            try:
                async with aclosing(self._attempt()) as answer:
                    async for message in answer:
                        for passed in self._pass(message):
                            yield passed
                return
            except ReplicaLostError:
                if self._told or self.retried:
                    break
                self.retried = True
        self.lost = True
        for message in self._loss():
            yield message

    def _pass(self, message: Message) -> Iterator[Message]:
        """Hold back the head and chunks without text: a second replica's would differ."""
        if message["type"] == "http.response.start":
            self._openings = []
            if not self._head_sent:
                self._head = message
            self._refused_late = self._head_sent and message["status"] != 200
            return
        body = message.get("body", b"")
        if self._refused_late:  # its head cannot be sent any more; its body can, as an event
            self._told = True
            yield {"type": "http.response.body", "body": b"data: " + body + b"\n\n" + DONE, "more_body": False}
        elif self._told:
            yield message
        elif self._streams() and body.startswith(b":"):  # keeps the connection alive, and is nobody's
            yield from self._send_head()
            yield message
        elif not message.get("more_body", False) or self._answers(body):
            self._told = True
            yield from self._send_head()
            yield from self._openings
            yield message
        else:
            self._openings.append(message)

    def _send_head(self) -> Iterator[Message]:
        if not self._head_sent and self._head is not None:
            self._head_sent = True
            yield self._head

    def _streams(self) -> bool:
        headers = dict(self._head.get("headers", [])) if self._head is not None else {}
        return bytes(headers.get(b"content-type", b"")).startswith(b"text/event-stream")

    def _answers(self, body: bytes) -> bool:
        return holds_answer(body) if self._streams() else bool(body)

    def _loss(self) -> Iterator[Message]:
        text, headers = "the replica that was answering has ended: ask again", {"Retry-After": "1"}
        refusal = Refusal(503, text, kind=UNAVAILABLE, code="replica_lost", headers=headers)
        if not self._head_sent:
            response = refusal.response()
            yield {"type": "http.response.start", "status": refusal.status, "headers": response.raw_headers}
            yield {"type": "http.response.body", "body": bytes(response.body), "more_body": False}
        elif self._streams():
            # `error` is what OpenAI's clients look for, the others what the live page does
            event = as_event({**refusal.to_json(), "type": "error", "message": str(refusal)})
            yield {"type": "http.response.body", "body": event + DONE, "more_body": False}
        else:
            raise ReplicaLostError(str(refusal))


def holds_answer(events: bytes) -> bool:
    """Whether server-sent events say more than that a chat's answer begins."""
    lines = [line.removeprefix(b"data:").strip() for line in events.splitlines() if line.startswith(b"data:")]
    return any(_tells(line) for line in lines)


def _tells(data: bytes) -> bool:
    try:
        value: Any = json.loads(data)
        choices = value["choices"]
        return not choices or any(
            choice.get("text") or choice.get("finish_reason") or choice.get("delta", {}).get("content")
            for choice in choices
        )
    except (ValueError, KeyError, TypeError, AttributeError):  # [DONE], an error, the live page: no chunk of a chat
        return True
