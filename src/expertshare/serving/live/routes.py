"""The routes of the live page."""

from __future__ import annotations

import threading

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from expertshare.errors import ExpertShareError, InputError
from expertshare.serving.event_stream import EventStream
from expertshare.serving.live.limits import LiveLimits
from expertshare.serving.live.page_files import HEADERS, PageFile, read_page
from expertshare.serving.live.running_trace import Begin, RunningTrace
from expertshare.serving.live.trace_request import TraceRequest, schema
from expertshare.serving.live.trace_source import TraceSource

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {"type": "object", "properties": {"message": {"type": "string"}, "type": {"type": "string"}}}
    },
}
_REFUSED = {"content": {"application/json": {"schema": _ERROR}}}


def live_routes(source: TraceSource, *, limits: LiveLimits | None = None) -> APIRouter:
    """GET / (the page), GET /live/settings, GET /live/NAME (its files), POST /live/trace (server-sent events).

    One trace runs at a time; whoever asks meanwhile is told 429.
    """
    limits = limits or LiveLimits()
    page, slot = read_page(), threading.Lock()
    settings = {"limits": limits.to_json(), "model": dict(source.facts())}
    router = APIRouter(tags=["live page"])

    @router.get("/", include_in_schema=False)
    async def show_page(request: Request) -> Response:
        return _send(page["index.html"], request)

    @router.get("/live/settings")
    async def show_settings() -> JSONResponse:
        """What the page offers: policies, limits, facts of the model."""
        return JSONResponse(settings, headers={"Cache-Control": "no-store"})

    @router.get("/live/{name}", include_in_schema=False)
    async def show_file(name: str, request: Request) -> Response:
        if name not in page:
            return _refuse(404, "not_found_error", "the live page has no such file; begin at /")
        return _send(page[name], request)

    @router.post(
        "/live/trace",
        response_class=Response,
        responses={
            200: {"description": "Events of the trace", "content": {"text/event-stream": {}}},
            400: {"description": "Unusable request", **_REFUSED},
            408: {"description": "Not begun in time", **_REFUSED},
            413: {"description": "Body too large", **_REFUSED},
            415: {"description": "Body is not JSON", **_REFUSED},
            429: {"description": "Another trace is running", **_REFUSED},
        },
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema(limits)}}}},
    )
    async def trace(request: Request) -> Response:
        """Decode a prompt under one or two policies and stream every denoising step; docs/live-page.md."""
        # a page of another origin cannot send this type without being asked about it first
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _refuse(415, "invalid_request_error", "expected a body of type application/json: set Content-Type")
        body = await _read_body(request, limits.max_body_bytes)
        if body is None:
            text = f"the body may hold {limits.max_body_bytes} bytes on this server: send a shorter prompt"
            return _refuse(413, "invalid_request_error", text)
        try:
            asked = TraceRequest.read(body, limits)
        except InputError as error:
            return _refuse(400, "invalid_request_error", str(error))
        return await _start(asked, source, limits, slot)

    return router


async def _start(asked: TraceRequest, source: TraceSource, limits: LiveLimits, slot: threading.Lock) -> Response:
    """The response of a trace that has begun, or why it has not."""
    if not slot.acquire(blocking=False):
        text = "another trace is running, and this server runs one at a time: try again when it has ended"
        return _refuse(429, "rate_limit_error", text, {"Retry-After": "2"})
    running = RunningTrace(_begin(asked, source), slot=slot, seconds=limits.max_seconds)
    response: Response | None = None
    try:
        lines = running.lines(await running.next())
        response = EventStream(lines, on_end=running.end, send_timeout_s=limits.send_timeout_s)
    except TimeoutError:
        return _refuse(408, "timeout_error", running.too_long)
    except ExpertShareError as error:
        return _refuse(400, "invalid_request_error", str(error))
    finally:
        if response is None:
            running.end()
    return response


def _begin(asked: TraceRequest, source: TraceSource) -> Begin:
    """The trace, to be begun in the thread that decodes it."""
    return lambda stop: source.trace(
        asked.prompt,
        asked.policies,
        max_tokens=asked.max_tokens,
        seed=asked.seed,
        stop=stop,
        tokens_per_step=asked.tokens_per_step,
    )


async def _read_body(request: Request, most: int) -> bytes | None:
    """The body, None where it is longer than `most`; no more than that is kept."""
    body = bytearray()
    async for part in request.stream():
        body.extend(part)
        if len(body) > most:
            return None
    return bytes(body)


def _send(file: PageFile, request: Request) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _refuse(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status, headers=headers)
