"""The routes of the live page, its files, and a trace on its way to a client."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from expertshare.errors import ExpertShareError
from expertshare.routing import POLICIES
from expertshare.serving.engine import Engine
from expertshare.serving.live.trace import Event, ModelTraceSource, TraceSource
from expertshare.serving.requests import TraceRequest, trace_schema
from expertshare.serving.responses import OVERLOADED, EventStream, Refusal, error_responses, refusal_of
from expertshare.serving.settings import LiveLimits

_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
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

_REFUSALS = {
    400: "Unusable request",
    408: "Not begun in time",
    413: "Body too large",
    415: "Body is not JSON",
    429: "Another trace is running",
}


def read_page() -> Mapping[str, Response]:
    """Every file of the page by its name; a name that is not here does not exist, whatever lies on the disk."""
    page: dict[str, Response] = {}
    for entry in files(__package__).joinpath("static").iterdir():
        media_type = _MEDIA_TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            headers = {**HEADERS, "ETag": f'"{sha256(content).hexdigest()[:32]}"'}
            page[entry.name] = Response(content, headers=headers, media_type=media_type)
    return page


def page_paths() -> tuple[str, ...]:
    """Where the page and its files are: what a browser has to get before it can ask for an API key. They tell nothing
    of the model."""
    return ("/", *(f"/live/{name}" for name in read_page()))


class RunningTrace:
    """Events of one trace, made in one thread. `end` may be called at any time, and more than once."""

    def __init__(self, asked: TraceRequest, source: TraceSource, *, slot: threading.Lock, seconds: float) -> None:
        """slot: held already, released once the trace's thread is done. seconds: how long it may take."""
        self._stop, self._slot = threading.Event(), slot
        self._events = _events(asked, source, self._stop)
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._thread = ThreadPoolExecutor(1, "live-trace")
        self._ended: Future[None] | None = None
        text = f"the trace took longer than the {seconds:g} s that this server allows: ask for less"
        self._too_long = Refusal(408, text, kind="timeout_error")

    async def next(self) -> Event | None:
        """The next event, None after the last. Raises what the source raises, Refusal behind the deadline."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await asyncio.get_running_loop().run_in_executor(self._thread, next, self._events, None)
        except TimeoutError:
            raise self._too_long from None

    async def lines(self, first: Event | None) -> AsyncIterator[bytes]:
        """`first` and all events behind it, as server-sent events. What goes wrong meanwhile is the last of them."""
        event = first
        while event is not None:
            yield as_server_sent(event)
            try:
                event = await self.next()
            except ExpertShareError as error:
                yield as_server_sent({"type": "error", "message": str(error)})
                break
        # before the client hears that this was all: it may ask for another trace at once
        await asyncio.shield(asyncio.wrap_future(self.end()))

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


def _events(asked: TraceRequest, source: TraceSource, stop: threading.Event) -> Generator[Event, None, None]:
    """The trace as a generator, which begins in the thread that takes the first event and can be closed."""
    yield from source.trace(asked, stop)


def as_server_sent(event: Event) -> bytes:
    """One event of the protocol: its type by name, all of it as JSON on one line."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()


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
        return _unless_known(page["index.html"], request)

    @router.get("/live/settings")
    async def show_settings() -> JSONResponse:
        """What the page offers: policies, limits, facts of the model."""
        return JSONResponse(settings, headers={"Cache-Control": "no-store"})

    @router.get("/live/{name}", include_in_schema=False)
    async def show_file(name: str, request: Request) -> Response:
        if name not in page:
            return Refusal(404, "the live page has no such file; begin at /", kind="not_found_error").response()
        return _unless_known(page[name], request)

    @router.post(
        "/live/trace",
        response_class=Response,
        responses={
            200: {"description": "Events of the trace", "content": {"text/event-stream": {}}},
            **error_responses(_REFUSALS),
        },
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": trace_schema(limits)}}}
        },
    )
    async def trace(request: Request) -> Response:
        """Decode a prompt under one or two policies and stream every denoising step; docs/live-page.md."""
        try:
            return await _start(await _read(request, limits), source, limits, slot)
        except ExpertShareError as error:
            return refusal_of(error).response()

    return router


async def _read(request: Request, limits: LiveLimits) -> TraceRequest:
    """Raises Refusal or InputError for an unusable body; no more of it than allowed is kept."""
    # a page of another origin cannot send this type without being asked about it first
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "expected a body of type application/json: set Content-Type")
    most, body = limits.max_body_bytes, bytearray()
    async for part in request.stream():
        body.extend(part)
        if len(body) > most:
            raise Refusal(413, f"the body may hold {most} bytes on this server: send a shorter prompt")
    return TraceRequest.read(bytes(body), limits)


async def _start(asked: TraceRequest, source: TraceSource, limits: LiveLimits, slot: threading.Lock) -> Response:
    """The response of a trace that has begun. Raises Refusal, or what the source raises, for one that has not."""
    if not slot.acquire(blocking=False):
        text = "another trace is running, and this server runs one at a time: try again when it has ended"
        raise Refusal(429, text, kind=OVERLOADED, headers={"Retry-After": "2"})
    running = RunningTrace(asked, source, slot=slot, seconds=limits.max_seconds)
    try:
        lines = running.lines(await running.next())
    except BaseException:
        running.end()
        raise
    return EventStream(lines, on_end=running.end, send_timeout_s=limits.send_timeout_s)


def _unless_known(file: Response, request: Request) -> Response:
    """The file, or that it has not changed."""
    etag = file.headers["etag"]
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={**HEADERS, "ETag": etag})
    return file


def page_routes(engine: Engine, model_name: str | None = None) -> APIRouter:
    """For create_app's extra_routers. Offers the policies that requests may ask for. Raises InputError for a model
    without a tokenizer."""
    source = ModelTraceSource(
        engine.loaded,
        lock=engine.model_lock,
        name=model_name,
        options=engine.options,
        runtime=engine.runtime,
        chat=engine.chat,
    )
    offered = engine.offered
    if offered.names == frozenset(POLICIES):
        return live_routes(source)
    return live_routes(source, limits=LiveLimits(policies=offered.labels))
