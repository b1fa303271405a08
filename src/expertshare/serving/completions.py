"""OpenAI's chat completions and completions: from a request's body to a generation, and back to JSON."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from expertshare.errors import InputError
from expertshare.measure.cost import FORWARD_KINDS
from expertshare.routing import policy_label
from expertshare.serving.engine import Engine
from expertshare.serving.generation import Choice, Generation, Generator
from expertshare.serving.middleware import LEFT, NOTES
from expertshare.serving.requests import ChatRequest, CompletionRequest
from expertshare.serving.responses import DONE, LONGEST_QUOTE, EventStream, Refusal, as_event, refusal_of, unless_left
from expertshare.serving.settings import ServerSettings
from expertshare.serving.telemetry import ServerMetrics
from expertshare.serving.text import Codec


class Completions:
    """Answers both kinds of request. Raises InputError for a model without a tokenizer."""

    def __init__(self, engine: Engine, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self.model_name = settings.model_name or engine.loaded.path.resolve().name
        self._settings, self._metrics, self._codec = settings, metrics, Codec(engine.loaded)
        self._generator = Generator(engine, settings, self._codec)

    async def answer(self, asked: ChatRequest | CompletionRequest, request: Request) -> Response:
        """Answer a request, whole or as server-sent events. Raises Refusal."""
        self._check(asked)
        try:
            prompts = [await self._codec.encode(prompt) for prompt in asked.prompts]
        except InputError as error:
            raise refusal_of(error, asked.prompt_param) from error
        self._remember(request, prompt=asked.said)
        generation = self._generator.begin(asked.generation(prompts))
        form = ReplyForm(
            chat=isinstance(asked, ChatRequest),
            model=self.model_name,
            prompt_tokens=sum(map(len, prompts)),
            with_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        )

        def end() -> None:
            generation.cancel()
            self._note(request, generation, form)

        if asked.stream:
            events = self._events(form.chunks(generation), request)
            return EventStream(events, on_end=end, send_timeout_s=self._settings.send_timeout_s)
        try:
            choices = await unless_left(request.receive, generation.finished())
        finally:
            end()
        return Response(status_code=LEFT) if choices is None else JSONResponse(form.whole(choices))  # LEFT: to nobody

    async def _events(self, chunks: AsyncIterator[dict[str, Any]], request: Request) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield as_event(chunk)
        except Refusal as refusal:  # the status has been sent long ago
            request.scope[NOTES]["error"] = refusal.code
            yield as_event(refusal.to_json())
        yield DONE

    def _check(self, asked: ChatRequest | CompletionRequest) -> None:
        if asked.model != self.model_name:
            raise self.unknown_model(asked.model)
        self._generator.check_choices(asked.n or 1, "n")
        if asked.stream_options is not None and not asked.stream:
            raise Refusal(400, "stream_options need stream: true; leave them out, or stream", param="stream_options")
        self._generator.check_choices(len(asked.prompts), asked.prompt_param)

    def unknown_model(self, name: str) -> Refusal:
        """The refusal of a model that is not served."""
        message = f"unknown model {name[:LONGEST_QUOTE]!r}: this server has {self.model_name!r}"
        return Refusal(404, message, param="model", code="model_not_found")

    def _remember(self, request: Request, **texts: object) -> None:
        if self._settings.log_prompts:
            request.scope[NOTES].update(texts)

    def _note(self, request: Request, generation: Generation, form: ReplyForm) -> None:
        if generation.first_block_s is not None:
            self._metrics.first_block_seconds.observe(generation.first_block_s)
        self._remember(request, answer=[choice.answer for choice in generation.choices])
        request.scope[NOTES].update(
            **form.usage(generation.choices),
            **form.costs(generation.choices),
            finish_reasons=[choice.finish_reason for choice in generation.choices],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyForm:
    """Makes the objects of one response. chat: of chat completions, else of completions."""

    chat: bool
    model: str
    prompt_tokens: int
    with_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The response to a request that is not streamed."""
        shown = [
            self._choice(index, {"message": {"role": "assistant", "content": c.answer}}, c.answer, c.finish_reason)
            for index, c in enumerate(choices)
        ]
        return {**self._head(), "choices": shown, **self._figures(choices)}

    async def chunks(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """What a stream sends: in a chat an opening of every choice; text, and the end of each; counts if asked for."""
        if self.chat:
            for index in range(len(generation.choices)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
        async for piece in generation.pieces():
            if piece.text:
                yield self._chunk(piece.index, {"content": piece.text})
            if piece.finish_reason is not None:
                costs = self.costs([generation.choices[piece.index]])
                yield {**self._chunk(piece.index, {}, piece.finish_reason), "expertshare": costs}
        if self.with_usage:
            yield {**self._head(".chunk"), "choices": [], **self._figures(generation.choices)}

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

    def _figures(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {"usage": self.usage(choices), "expertshare": self.costs(choices)}

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = self._choice(index, {"delta": delta}, delta.get("content", ""), finish_reason)
        return {**self._head(".chunk"), "choices": [choice], **({"usage": None} if self.with_usage else {})}

    def _choice(self, index: int, message: dict[str, Any], text: str, finish_reason: str | None) -> dict[str, Any]:
        """message: its content in a chat, in the place of `text`."""
        content = message if self.chat else {"text": text}
        return {"index": index, **content, "finish_reason": finish_reason, "logprobs": None}

    def _head(self, part: str = "") -> dict[str, Any]:
        prefix, kind = ("chatcmpl", f"chat.completion{part}") if self.chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model}
