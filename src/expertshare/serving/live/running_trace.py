"""A trace on its way to a client: decoded in a thread of its own, ended whenever the client has gone."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from expertshare.errors import ExpertShareError
from expertshare.serving.live.trace_source import Event

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
