"""The routes of the live page, its files, and a trace on its way to a client."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from expertshare.errors import ExpertShareError, InputError
from expertshare.routing import POLICIES
from expertshare.serving.engine import Engine
from expertshare.serving.event_stream import EventStream
from expertshare.serving.live.trace_request import LiveLimits, TraceRequest, schema
from expertshare.serving.live.trace_source import ModelTraceSource, TraceSource
from expertshare.serving.live.watched_run import Event

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing is loaded from anywhere else, nothing inline is run, nobody frames the page; caches ask for changes."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str


def read_page() -> Mapping[str, PageFile]:
    """Every file of the page by its name; a name that is not here does not exist, whatever lies on the disk."""
    page: dict[str, PageFile] = {}
    for entry in files(__package__).joinpath("static").iterdir():
        suffix = entry.name[entry.name.rfind(".") :]
        if suffix in _MEDIA_TYPES:
            content = entry.read_bytes()
            page[entry.name] = PageFile(content, _MEDIA_TYPES[suffix], f'"{sha256(content).hexdigest()[:32]}"')
    return page


def page_paths() -> tuple[str, ...]:
    """Where the page and its files are: what a browser has to get before it can ask for an API key. They tell nothing
    of the model."""
    return ("/", *(f"/live/{name}" for name in read_page()))


Begin = Callable[[threading.Event], Iterator[Event]]
"""Begins a trace, which ends soon after the event that it is given is set."""


class RunningTrace:
    """Events of one trace, made in one thread. `end` may be called at any time, and more than once."""

    def __init__(self, begin: Begin, *, slot: threading.Lock, seconds: float) -> None:
        """slot: held already, released once the trace's thread is done. seconds: how long it may take."""
        self._stop, self._slot = threading.Event(), slot
        self._events = _events(begin, self._stop)
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds
        self._thread = ThreadPoolExecutor(1, "live-trace")
        self._ended: Future[None] | None = None

    async def next(self) -> Event | None:
        """The next event, None after the last. Raises what the source raises, TimeoutError behind the deadline."""
        async with asyncio.timeout_at(self._deadline):
            return await asyncio.get_running_loop().run_in_executor(self._thread, next, self._events, None)

    async def lines(self, first: Event | None) -> AsyncIterator[bytes]:
        """`first` and all events behind it, as server-sent events. What goes wrong meanwhile is the last of them."""
        event = first
        while event is not None:
            yield as_server_sent(event)
            try:
                event = await self.next()
            except TimeoutError:
                yield as_server_sent({"type": "error", "message": self.too_long})
                break
            except ExpertShareError as error:
                yield as_server_sent({"type": "error", "message": str(error)})
                break
        # before the client hears that this was all: it may ask for another trace at once
        await asyncio.shield(asyncio.wrap_future(self.end()))

    @property
    def too_long(self) -> str:
        """What to say behind the deadline."""
        return f"the trace took longer than the {self._seconds:g} s that this server allows: ask for less"

    def end(self) -> Future[None]:
        """Stop the work, at the latest after the step that is being decoded, then free the slot; done when it is."""
        if self._ended is None:
            self._stop.set()
            # the one thread takes this up when it has left `next`, so that the generator is not closed while it runs
            self._ended = self._thread.submit(self._finish)
            self._thread.shutdown(wait=False)
        return self._ended

    def _finish(self) -> None:
        try:
            self._events.close()
        finally:
            self._slot.release()


def _events(begin: Begin, stop: threading.Event) -> Generator[Event, None, None]:
    """The trace as a generator, which can be closed whatever `begin` returns."""
    yield from begin(stop)


def as_server_sent(event: Event) -> bytes:
    """One event of the protocol: its type by name, all of it as JSON on one line."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()


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

    One trace runs at a time; a request meanwhile is told 429.
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


def page_routes(engine: Engine, model_name: str | None = None) -> APIRouter:
    """For create_app's extra_routers. Offers the policies that requests may ask for. Raises InputError for a model
    without a tokenizer."""
    source = ModelTraceSource(
        engine.loaded,
        lock=engine.model_lock,
        name=model_name,
        options=engine.options,
        backend=engine.runtime.backend.name,
        store=engine.runtime.store,
        chat=engine.chat,
    )
    offered = engine.offered
    if offered.names == frozenset(POLICIES):
        return live_routes(source)
    return live_routes(source, limits=LiveLimits(policies=offered.labels))
