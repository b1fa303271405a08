"""A request as the engine answers it, whatever protocol it came by: its choices, and the stream of their pieces."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from expertshare.decoding import DecodingOptions
from expertshare.errors import ExpertShareError, PolicyError
from expertshare.serving.engine import Engine
from expertshare.serving.responses import Refusal, refusal_of, refusal_of_failure
from expertshare.serving.scheduling import Event, Failure, Listener, Order, Progress, RowUsage
from expertshare.serving.settings import ServerSettings
from expertshare.serving.text import AnswerText, Codec

LARGEST_SEED = 2**63


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """What a client asks for. prompts: token ids; each gets `count` answers. decoding: fields of DecodingOptions that
    are not the server's defaults. policy: as text, None for the default one. stops: texts before which an answer ends.
    max_tokens: most tokens of an answer, None for the server's default. param: what the protocol calls the prompts."""

    prompts: Sequence[Sequence[int]]
    count: int = 1
    decoding: Mapping[str, Any]
    policy: str | None = None
    stops: tuple[str, ...] = ()
    max_tokens: int | None = None
    param: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What a block adds to choice `index`: text, and why the choice ends, if it does."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None


@dataclass(slots=True, kw_only=True)
class Choice:
    """One answer as it grows. most: tokens that it may have, None: as many as were ordered. answer: its text so far."""

    order: Order
    text: AnswerText
    most: int | None = None
    tokens: int = 0
    answer: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    usage: RowUsage | None = None

    def take(self, progress: Progress) -> str:
        """The text that a block adds."""
        ids, finish, self.usage = progress.token_ids, progress.finish_reason, progress.usage
        room = len(ids) if self.most is None else self.most - self.tokens
        ids, cut = ids[:room], room < len(ids)
        self.tokens += len(ids)
        text = self.text.feed(ids, last=cut or finish is not None)
        self.answer += text
        if self.text.stopped or (finish == "eos" and not cut):
            self.finish_reason = "stop"
        elif finish is not None or cut:
            self.finish_reason = "length"
        return text


class Generation:
    """The choices of one request, ordered from the engine. A client that is slow to take them holds nobody up: what it
    has not taken waits here, at most its own answers."""

    def __init__(self, engine: Engine, choices: Sequence[Choice]) -> None:
        """Raises InputError, EngineBusyError or EngineClosedError."""
        self.choices = list(choices)
        self.first_block_s: float | None = None
        self._engine, self._began = engine, time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets = engine.submit([(choice.order, self._listener(i)) for i, choice in enumerate(self.choices)])

    def cancel(self) -> None:
        """Nobody wants the rest; twice is fine."""
        self._engine.cancel([t for t, c in zip(self._tickets, self.choices, strict=True) if c.finish_reason is None])

    async def finished(self) -> list[Choice]:
        """All choices, once they have ended. Raises Refusal as `pieces` does."""
        async for _ in self.pieces():
            pass
        return self.choices

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
            if choice.finish_reason is not None:  # a stop string has been found meanwhile
                continue
            text = choice.take(event)
            if event.finish_reason is None and choice.finish_reason is not None:
                self._engine.cancel([self._tickets[index]])
            yield Piece(index=index, text=text, finish_reason=choice.finish_reason)

    def _listener(self, index: int) -> Listener:
        def hear(event: Event) -> None:
            # a loop that is closed has nobody left to tell
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return hear


@dataclass(frozen=True, slots=True)
class Generator:
    """Begins to answer requests within the bounds of the settings."""

    engine: Engine
    settings: ServerSettings
    codec: Codec

    @property
    def max_choices(self) -> int:
        """Answers of one request: as the operator says, and never more than could be queued."""
        return min(self.settings.max_choices, self.engine.max_rows + self.engine.limits.max_queue)

    def begin(self, asked: GenerationRequest) -> Generation:
        """Order all answers. Raises Refusal for what cannot be answered, or not now."""
        try:
            policy = self.engine.offered.choose(asked.policy)
        except PolicyError as error:
            raise refusal_of(error, "expert_policy") from error
        self.check_choices(asked.count * len(asked.prompts), "n")
        choices = []
        for prompt in asked.prompts:
            options = self._options(asked, len(prompt))
            for number in range(asked.count):
                seeded = replace(options, seed=(options.seed + number) % LARGEST_SEED)
                order = Order(prompt=tuple(prompt), options=seeded, policy=policy)
                text = AnswerText(self.codec.decode, asked.stops, self.codec.byte_ids)
                choices.append(Choice(order=order, text=text, most=asked.max_tokens))
        try:
            return Generation(self.engine, choices)
        except ExpertShareError as error:
            raise refusal_of(error, asked.param) from error

    def check_choices(self, count: int, param: str) -> None:
        """Raises Refusal for more answers than one request may ask for."""
        if count > self.max_choices:
            raise Refusal(400, f"at most {self.max_choices} answers at once: ask for fewer", param=param)

    def _options(self, asked: GenerationRequest, prompt_tokens: int) -> DecodingOptions:
        """The server's defaults with what the request says. Without a seed of its own, sampling gets a random one.

        Raises Refusal for what the context does not hold, before the decoder does: it would not name it as clients do.
        """
        most, defaults = self.engine.max_context, self.engine.options
        most_prompt = self.settings.max_prompt_tokens or most - 1
        if prompt_tokens > most_prompt:
            text = f"the prompt has {prompt_tokens} tokens, and this server takes {most_prompt}: shorten it"
            raise Refusal(400, text, param=asked.param, code="context_length_exceeded")
        given = dict(asked.decoding)
        if "seed" not in given and given.get("temperature", defaults.temperature) > 0:
            given["seed"] = secrets.randbelow(LARGEST_SEED)
        length = self._gen_length(asked.max_tokens, prompt_tokens)
        if prompt_tokens + length > most:
            text = (
                f"the prompt has {prompt_tokens} tokens; with {length} to generate that is {prompt_tokens + length}, "
                f"and this server takes {most}: shorten the prompt, or ask for less"
            )
            raise Refusal(400, text, param=asked.param, code="context_length_exceeded")
        return replace(defaults, gen_length=length, **given)

    def _gen_length(self, asked: int | None, prompt_tokens: int) -> int:
        """As asked; else the default, or what the context leaves. More are decoded than are returned where a model with
        full attention decodes whole blocks, and where fewer would shorten the steps: what is asked for only cuts."""
        config, defaults = self.engine.loaded.config, self.engine.options
        block = (defaults.block_length or config.block_length) if config.attention == "full" else 1
        left = (self.engine.max_context - prompt_tokens) // block * block
        if asked is not None:
            whole, steps = -(-asked // block) * block, defaults.steps_per_block or config.block_length
            enough = steps * defaults.minimal_top_k if config.shortens_steps else 0
            return max(whole, min(enough, left))
        return min(defaults.gen_length, max(left, block))
