"""What clients are sent: errors as OpenAI's clients know them, and events to a client that may be slow, or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from expertshare.errors import ExpertShareError
from expertshare.serving.scheduling import EngineBusyError, EngineClosedError, Failure
from expertshare.serving.telemetry import LOGGER, log

LONGEST_QUOTE = 200
"""Characters of what a client sent that an error says again."""

INVALID, OVERLOADED, UNAVAILABLE = "invalid_request_error", "rate_limit_error", "server_unavailable"
_FAILURES = {
    "deadline": (408, "timeout_error", "deadline_exceeded"),
    "shutdown": (503, UNAVAILABLE, "shutting_down"),
    "numerics": (500, "server_error", "numerics"),
    "memory": (503, UNAVAILABLE, "expert_memory"),
    "broken": (500, "server_error", "engine_failed"),
}
DONE = b"data: [DONE]\n\n"
_ALIVE = b": waiting\n\n"
_ALIVE_EVERY_S = 15.0
_T = TypeVar("_T")


def error_responses(descriptions: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """Refusals by status, for the OpenAPI description."""
    text, maybe_text = {"type": "string"}, {"type": ["string", "null"]}
    fields = {"message": text, "type": text, "param": maybe_text, "code": maybe_text}
    error = {"type": "object", "required": list(fields), "properties": fields}
    schema = {"type": "object", "required": ["error"], "properties": {"error": error}}
    content = {"application/json": {"schema": schema}}
    return {status: {"description": words, "content": content} for status, words in descriptions.items()}


class Refusal(ExpertShareError):
    """A request that gets no answer. param: the parameter at fault; code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole HTTP response, in ASCII: a message may quote a lone surrogate, which UTF-8 does not have."""
        body = json.dumps(self.to_json(), allow_nan=False)
        return Response(body, self.status, self.headers, "application/json")


def refusal_of(error: Exception, param: str | None = None) -> Refusal:
    """What the engine, the decoder or FastAPI objects to, as a refusal. None tells how the server is made."""
    match error:
        case Refusal():
            return error
        case EngineBusyError():
            headers = {"Retry-After": str(error.retry_after_s)}
            return Refusal(429, str(error), kind=OVERLOADED, code="queue_full", headers=headers)
        case EngineClosedError():
            return Refusal(503, str(error), kind=UNAVAILABLE, code="not_ready", headers={"Retry-After": "5"})
        case ExpertShareError():
            return Refusal(400, str(error), param=param)
        case RequestValidationError():
            return _unusable(error)
        case HTTPException():
            return Refusal(error.status_code, str(error.detail), headers=error.headers)
    LOGGER.error("a request failed", exc_info=error)
    return Refusal(500, "this server made a mistake; its log says which", kind="server_error")


def _unusable(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong with a body; nothing of what it held."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refusal(400, "the body is not JSON: send a JSON object", code="invalid_json")
    place = [str(part) for part in first["loc"] if part != "body"]
    where = ".".join(place)[:LONGEST_QUOTE]
    message = f"{where}: {first['msg']}" if where else f"the body: {first['msg']} (sent as application/json?)"
    return Refusal(400, message, param=place[0] if place else None, code="invalid_value")


def refusal_of_failure(failure: Failure) -> Refusal:
    """Why an answer got no further. A client must not repeat by itself what ran into its deadline."""
    status, kind, code = _FAILURES[failure.kind]
    headers = {"x-should-retry": "false"} if failure.kind == "deadline" else {}
    return Refusal(status, failure.message, kind=kind, code=code, headers=headers)


class TooSlowError(Exception):
    """The client takes nothing more."""


def in_time(send: Send, seconds: float) -> Send:
    """`send`, which raises TooSlowError, and logs it, where a client does not take a message within `seconds`."""

    async def send_in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(seconds):
                await send(message)
        except TimeoutError as error:
            log("client too slow", seconds=seconds)
            raise TooSlowError from error

    return send_in_time


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
            with suppress(TooSlowError):  # the server closes what is not complete
                await unless_left(receive, self._send_all(in_time(send, self._send_timeout_s)))
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        event: bytes | None = b""
        while event is not None:
            coming = asyncio.ensure_future(anext(self._events, None))
            try:
                while not (await asyncio.wait({coming}, timeout=_ALIVE_EVERY_S))[0]:
                    await send({"type": "http.response.body", "body": _ALIVE, "more_body": True})
                event = coming.result()
            finally:
                coming.cancel()
            await send({"type": "http.response.body", "body": event or b"", "more_body": event is not None})


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
