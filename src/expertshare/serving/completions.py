"""Chat completions and completions: from a request to rows in the engine, and back."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from expertshare.decoding import DecodingOptions
from expertshare.errors import ExpertShareError, InputError, PolicyError
from expertshare.serving.engine import Engine
from expertshare.serving.event_stream import DONE, EventStream, as_event, unless_left
from expertshare.serving.metrics import ServerMetrics
from expertshare.serving.middleware import LEFT, NOTES
from expertshare.serving.refusals import Refusal, refusal_of
from expertshare.serving.replies import Choice, ReplyForm, RunningRequest
from expertshare.serving.requests import LONGEST_QUOTE, ChatRequest, CompletionRequest
from expertshare.serving.scheduling import Order
from expertshare.serving.settings import ServerSettings
from expertshare.serving.text import AnswerText, Codec

LARGEST_SEED = 2**63


class Completions:
    """Answers both kinds of request. Raises Refusal."""

    def __init__(
        self, engine: Engine, codec: Codec, settings: ServerSettings, metrics: ServerMetrics, model_name: str
    ) -> None:
        self._engine, self._codec, self._settings, self._metrics = engine, codec, settings, metrics
        self.model_name = model_name

    @property
    def _most_choices(self) -> int:
        """Answers of one request: as the operator says, and never more than could be queued."""
        return min(self._settings.max_choices, self._engine.most_at_once)

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """Answer a request to POST /v1/chat/completions."""
        self._check(asked)
        try:
            prompt = await self._codec.encode_chat(asked.messages)
        except InputError as error:
            raise refusal_of(error, "messages") from error
        self._remember(request, prompt=[message.text for message in asked.messages])
        return await self._answer(asked, [prompt], request)

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        """Answer a request to POST /v1/completions."""
        self._check(asked)
        given = asked.prompts
        if len(given) > self._most_choices:
            raise self._too_many("prompt")
        try:
            prompts = [await self._codec.encode_text(p) if isinstance(p, str) else p for p in given]
        except InputError as error:
            raise refusal_of(error, "prompt") from error
        self._remember(request, prompt=given)
        return await self._answer(asked, prompts, request)

    async def _answer(
        self, asked: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]], request: Request
    ) -> Response:
        chat = isinstance(asked, ChatRequest)
        choices = self._choices(asked, prompts, "messages" if chat else "prompt")
        running = RunningRequest(self._engine, choices)
        form = ReplyForm(
            chat=chat,
            model=self.model_name,
            prompt_tokens=sum(len(prompt) for prompt in prompts),
            with_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        )
        try:
            running.submit()
        except ExpertShareError as error:
            raise refusal_of(error, "messages" if chat else "prompt") from error

        def end() -> None:
            running.cancel()
            self._note(request, running, form)

        if asked.stream:
            events = self._events(running, form, request)
            return EventStream(events, on_end=end, send_timeout_s=self._settings.send_timeout_s)
        try:
            texts = await unless_left(request.receive, self._texts(running))
        finally:
            end()
        if texts is None:
            return Response(status_code=LEFT)  # to nobody
        self._remember(request, answer=texts)
        return JSONResponse(form.whole(running.choices, texts))

    async def _texts(self, running: RunningRequest) -> list[str]:
        texts = [""] * len(running.choices)
        async for piece in running.pieces():
            texts[piece.index] += piece.text
        return texts

    async def _events(self, running: RunningRequest, form: ReplyForm, request: Request) -> AsyncIterator[bytes]:
        texts = [""] * len(running.choices)
        if form.chat:
            for index in range(len(running.choices)):
                yield as_event(form.opening(index))
        try:
            async for piece in running.pieces():
                texts[piece.index] += piece.text
                if piece.text:
                    yield as_event(form.piece(piece.index, piece.text))
                if piece.finish_reason is not None:
                    yield as_event(form.closing(piece.index, running.choices[piece.index]))
            if form.with_usage:
                yield as_event(form.counting(running.choices))
        except Refusal as refusal:  # the status has been sent long ago
            request.scope[NOTES]["error"] = refusal.code
            yield as_event(refusal.to_json())
        self._remember(request, answer=texts)
        yield DONE

    def _check(self, asked: ChatRequest | CompletionRequest) -> None:
        if asked.model != self.model_name:
            raise self.unknown_model(asked.model)
        if asked.n is not None and asked.n > self._most_choices:
            raise self._too_many("n")
        if asked.stream_options is not None and not asked.stream:
            raise Refusal(400, "stream_options need stream: true; leave them out, or stream", param="stream_options")

    def unknown_model(self, name: str) -> Refusal:
        """The refusal of a model that is not served."""
        message = f"unknown model {name[:LONGEST_QUOTE]!r}: this server has {self.model_name!r}"
        return Refusal(404, message, param="model", code="model_not_found")

    def _too_many(self, param: str) -> Refusal:
        return Refusal(400, f"at most {self._most_choices} answers at once: ask for fewer", param=param)

    def _choices(
        self, asked: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]], param: str
    ) -> list[Choice]:
        try:
            policy = self._engine.offered.choose(asked.expert_policy)
        except PolicyError as error:
            raise refusal_of(error, "expert_policy") from error
        count = asked.n or 1
        if count * len(prompts) > self._most_choices:
            raise self._too_many("n")
        choices = []
        for prompt in prompts:
            self._check_length(prompt, param)
            options = self._options(asked, len(prompt))
            self._check_context(len(prompt), options.gen_length, param)
            for number in range(count):
                seed = (options.seed + number) % LARGEST_SEED
                order = Order(prompt=tuple(prompt), options=replace(options, seed=seed), policy=policy)
                choices.append(
                    Choice(order=order, text=AnswerText(self._codec.decode, asked.stops), most=asked.answer_tokens)
                )
        return choices

    def _check_length(self, prompt: Sequence[int], param: str) -> None:
        most = self._settings.max_prompt_tokens or self._engine.max_context - 1
        if len(prompt) > most:
            raise Refusal(
                400,
                f"the prompt has {len(prompt)} tokens, and this server takes {most}: shorten it",
                param=param,
                code="context_length_exceeded",
            )

    def _check_context(self, prompt_tokens: int, gen_length: int, param: str) -> None:
        """Before the decoder does: it would not name it as clients do."""
        total, most = prompt_tokens + gen_length, self._engine.max_context
        if total > most:
            raise Refusal(
                400,
                f"the prompt has {prompt_tokens} tokens; with {gen_length} to generate that is {total}, and this "
                f"server takes {most}: shorten the prompt, or ask for less",
                param=param,
                code="context_length_exceeded",
            )

    def _options(self, asked: ChatRequest | CompletionRequest, prompt_tokens: int) -> DecodingOptions:
        """The server's defaults with what the request says. Without a seed of its own, sampling gets a random one."""
        defaults = self._engine.options
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "threshold", "seed")
            if (value := getattr(asked, name)) is not None
        }
        if "seed" not in given and given.get("temperature", defaults.temperature) > 0:
            given["seed"] = secrets.randbelow(LARGEST_SEED)
        length = self._gen_length(asked.answer_tokens, prompt_tokens)
        return replace(defaults, gen_length=length, **given)

    def _gen_length(self, asked: int | None, prompt_tokens: int) -> int:
        """As asked; else the default, or what the context leaves. Full attention decodes whole blocks: then more are
        decoded than are returned."""
        config, defaults = self._engine.loaded.config, self._engine.options
        block = (defaults.block_length or config.block_length) if config.attention == "full" else 1
        if asked is not None:
            return -(-asked // block) * block
        left = (self._engine.max_context - prompt_tokens) // block * block
        return min(defaults.gen_length, max(left, block))

    def _remember(self, request: Request, **texts: object) -> None:
        if self._settings.log_prompts:
            request.scope[NOTES].update(texts)

    def _note(self, request: Request, running: RunningRequest, form: ReplyForm) -> None:
        if running.first_block_s is not None:
            self._metrics.first_block_seconds.observe(running.first_block_s)
        request.scope[NOTES].update(
            **form.usage(running.choices),
            **form.costs(running.choices),
            finish_reasons=[choice.finish_reason for choice in running.choices],
        )
