"""One request on its way: rows in the engine, and what is to be told to the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from expertshare.serving.answer_text import AnswerText
from expertshare.serving.engine import Engine
from expertshare.serving.orders import Event, Failure, Listener, Order, RowUsage, Ticket
from expertshare.serving.refusals import refusal_of_failure

Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What a block adds to choice `index`: text, and why the choice ends, if it does."""

    index: int
    text: str
    finish_reason: Finish | None


@dataclass(slots=True, kw_only=True)
class Choice:
    """One answer as it grows. most: tokens that it may have (None: as many as were ordered)."""

    order: Order
    text: AnswerText
    most: int | None = None
    tokens: int = 0
    finish_reason: Finish | None = None
    usage: RowUsage | None = None


class RunningRequest:
    """The choices of one request. A client that is slow to take them holds nobody up: what it has not taken waits here,
    at most its own answers."""

    def __init__(self, engine: Engine, choices: Sequence[Choice]) -> None:
        self.choices = list(choices)
        self.first_block_s: float | None = None
        self._engine = engine
        self._began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []

    def submit(self) -> Self:
        """Order all choices. Raises InputError, EngineBusyError or EngineClosedError."""
        orders = [(choice.order, self._listener(index)) for index, choice in enumerate(self.choices)]
        self._tickets = self._engine.submit(orders)
        return self

    def cancel(self) -> None:
        """Nobody wants the rest; twice is fine."""
        self._engine.cancel([t for t, c in zip(self._tickets, self.choices, strict=True) if c.finish_reason is None])

    async def pieces(self) -> AsyncIterator[Piece]:
        """Block by block until all choices have ended. Raises Refusal where one gets no further; the others are then
        given up too."""
        while any(choice.finish_reason is None for choice in self.choices):
            index, event = await self._events.get()
            if self.first_block_s is None:
                self.first_block_s = time.monotonic() - self._began
            if isinstance(event, Failure):
                self.cancel()
                raise refusal_of_failure(event)
            choice = self.choices[index]
            if choice.finish_reason is None:  # else a stop string has been found meanwhile
                yield self._take(index, choice, event.token_ids, event.finish_reason, event.usage)

    def _take(self, index: int, choice: Choice, ids: Sequence[int], finish: str | None, usage: RowUsage) -> Piece:
        choice.usage = usage
        cut = choice.most is not None and choice.tokens + len(ids) > choice.most
        if cut and choice.most is not None:
            ids = ids[: choice.most - choice.tokens]
        choice.tokens += len(ids)
        text = choice.text.feed(ids, last=cut or finish is not None)
        if choice.text.stopped or (finish == "eos" and not cut):
            choice.finish_reason = "stop"
        elif finish is not None or cut:
            choice.finish_reason = "length"
        if finish is None and choice.finish_reason is not None:
            self._engine.cancel([self._tickets[index]])
        return Piece(index=index, text=text, finish_reason=choice.finish_reason)

    def _listener(self, index: int) -> Listener:
        def hear(event: Event) -> None:
            # a loop that is closed has nobody left to tell
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return hear
