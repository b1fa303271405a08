"""One request on its way: its choices as they grow, and how OpenAI's API tells clients of them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from expertshare.measure.cost import FORWARD_KINDS
from expertshare.routing import policy_label
from expertshare.serving.engine import Engine
from expertshare.serving.refusals import refusal_of_failure
from expertshare.serving.scheduling import Event, Failure, Listener, Order, RowUsage, Ticket
from expertshare.serving.text import AnswerText

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyForm:
    """Makes the objects of one response. chat: of chat completions, else of completions."""

    chat: bool
    model: str
    prompt_tokens: int
    with_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, choices: Sequence[Choice], texts: Sequence[str]) -> dict[str, Any]:
        """The response to a request that is not streamed."""
        shown = [
            {
                "index": index,
                **({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}),
                "finish_reason": choice.finish_reason,
                "logprobs": None,
            }
            for index, (choice, text) in enumerate(zip(choices, texts, strict=True))
        ]
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": shown,
            "usage": self.usage(choices),
            "expertshare": self.costs(choices),
        }

    def opening(self, index: int) -> dict[str, Any]:
        """First chunk of a choice of a chat."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """A chunk of a stream that holds text."""
        return self._chunk(index, {"content": text}, None)

    def closing(self, index: int, choice: Choice) -> dict[str, Any]:
        """Last chunk of a choice."""
        return {**self._chunk(index, {}, choice.finish_reason), "expertshare": self.costs([choice])}

    def counting(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk with token counts that some clients ask for."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return {**head, "choices": [], "usage": self.usage(choices), "expertshare": self.costs(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Token counts; every prompt counts once, however many answers it gets."""
        completion = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    def costs(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Policy, seed of the first choice, means of unique experts over the choices, sums of forwards."""
        usages = [choice.usage for choice in choices if choice.usage is not None]
        count = max(1, len(usages))
        unique = {kind: sum(usage.unique_experts[kind] for usage in usages) / count for kind in FORWARD_KINDS}
        return {
            "policy": policy_label(choices[0].order.policy),
            "seed": choices[0].order.options.seed,
            "unique_experts": unique,
            "steps": sum(usage.steps for usage in usages),
            "forwards": sum(usage.forwards for usage in usages),
        }

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        text = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        choice = {"index": index, **text, "finish_reason": finish_reason, "logprobs": None}
        return {**head, "choices": [choice], **({"usage": None} if self.with_usage else {})}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model}
