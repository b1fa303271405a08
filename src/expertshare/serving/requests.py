"""What clients may send: OpenAI's parameters as far as a block-diffusion model has a meaning for them, ours, and what
the live page asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from expertshare.errors import InputError, nearest
from expertshare.serving.generation import GenerationRequest
from expertshare.serving.responses import LONGEST_QUOTE, Refusal
from expertshare.serving.settings import LiveLimits
from expertshare.serving.text import Prompt

MAX_STOPS = 16

HARMLESS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"})
"""Accepted and without effect: they say nothing about the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Not supported, but accepted where the value asks for nothing."""

_Text = Annotated[str, Field(max_length=1 << 22)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """include_usage: end the stream with a chunk that counts tokens."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Sampling(_Strict):
    """What both kinds of request have. threshold, top_k and expert_policy are ours."""

    prompt_param: ClassVar[str]
    """What the prompts are called."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    expert_policy: Annotated[str, Field(max_length=1000)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, value: Any) -> Any:
        """Raises Refusal for a parameter that is not supported, by its name."""
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, given in value.items():
            if name in cls.model_fields:
                kept[name] = given
            elif given is not None and name not in HARMLESS and not _is_neutral(name, given):
                raise Refusal(
                    400,
                    f"unsupported parameter: {name[:LONGEST_QUOTE]!r}. Leave it out; supported are "
                    f"{', '.join(cls.model_fields)}.",
                    param=name[:LONGEST_QUOTE],
                    code="unsupported_parameter",
                )
        return kept

    def generation(self, prompts: Sequence[Sequence[int]]) -> GenerationRequest:
        """What is asked of the engine. prompts: token ids."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "threshold", "seed")}
        return GenerationRequest(
            prompts=prompts,
            count=self.n or 1,
            decoding={name: value for name, value in given.items() if value is not None},
            policy=self.expert_policy,
            stops=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            max_tokens=self.max_tokens,
            param=self.prompt_param,
        )


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: _Text


class Message(_Strict):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, value: Any) -> Any:
        """An answer that is sent back has fields such as refusal: null."""
        if not isinstance(value, dict):
            return value
        return {name: given for name, given in value.items() if name in cls.model_fields or given not in (None, [])}

    @property
    def text(self) -> str:
        """The whole content of the message as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Sampling):
    """The body of POST /v1/chat/completions."""

    prompt_param = "messages"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """The conversation, which is one prompt."""
        return [[{"role": message.role, "content": message.text} for message in self.messages]]

    @property
    def said(self) -> list[str]:
        """The texts of the prompt, for the log."""
        return [message.text for message in self.messages]

    @model_validator(mode="after")
    def _have_one_length(self) -> Self:
        """max_tokens is the older name. Raises Refusal for two that differ."""
        given = {count for count in (self.max_tokens, self.max_completion_tokens) if count is not None}
        if len(given) > 1:
            text = "expected max_completion_tokens or max_tokens, got both: leave one out"
            raise Refusal(400, text, param="max_tokens")
        self.max_tokens = next(iter(given), None)
        return self


_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(_Sampling):
    """POST /v1/completions. prompt: text or token ids, or a list of either."""

    prompt_param = "prompt"
    prompt: _Text | _Ids | Annotated[list[_Text], Field(min_length=1)] | Annotated[list[_Ids], Field(min_length=1)]

    @property
    def prompts(self) -> list[Prompt]:
        """Each of them by itself."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)

    said = prompts


def _is_neutral(name: str, given: Any) -> bool:
    """0 is no false: logprobs=0 asks for log probabilities."""
    return any(
        given == neutral and isinstance(given, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(name, ())
    )


MAX_SEED = 2**53 - 1
"""The largest whole number that JavaScript holds exactly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequest:
    """One prompt, one or two policies, how many tokens, and the seed of sampling. tokens_per_step: None writes what is
    surer than the server's threshold."""

    prompt: str
    policies: tuple[str, ...]
    max_tokens: int
    seed: int = 0
    tokens_per_step: int | None = None

    @classmethod
    def read(cls, body: bytes, limits: LiveLimits) -> TraceRequest:
        """Raises InputError for anything that is not such a request, or that goes beyond the limits."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the body is not JSON in UTF-8: {error}. Send an object like {_EXAMPLE}") from error
        if not isinstance(value, dict):
            raise InputError(f"expected a JSON object, got {type(value).__name__}. Send one like {_EXAMPLE}")
        known = [field.name for field in fields(cls)]
        for key in value:
            if key not in known:
                raise InputError(f"unknown key {key[:80]!r}. {nearest(key[:80], known)}")
        steps = value.get("tokens_per_step")
        return cls(
            prompt=_prompt(value.get("prompt"), limits),
            policies=_policies(value.get("policies"), limits),
            max_tokens=_whole("max_tokens", value.get("max_tokens", limits.tokens_first), limits),
            seed=_whole("seed", value.get("seed", 0), limits),
            tokens_per_step=None if steps is None else _whole("tokens_per_step", steps, limits),
        )


_EXAMPLE = '{"prompt": "Solve 3x + 5 = 17.", "policies": ["vanilla", "des-vote"], "max_tokens": 64, "seed": 0}'


def _numbers(limits: LiveLimits) -> dict[str, dict[str, Any]]:
    """The bounds of numbers, as JSON Schema."""
    return {
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": limits.max_tokens},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
        "tokens_per_step": {"type": ["integer", "null"], "minimum": 1, "maximum": limits.max_tokens},
    }


def trace_schema(limits: LiveLimits) -> dict[str, Any]:
    """The body as JSON Schema, for the OpenAPI description."""
    policy = {"type": "string", "enum": list(limits.policies)}
    return {
        "type": "object",
        "required": ["prompt", "policies"],
        "additionalProperties": False,
        "properties": {
            "prompt": {"type": "string", "minLength": 1, "maxLength": limits.max_prompt_chars},
            "policies": {"type": "array", "items": policy, "minItems": 1, "maxItems": 2},
            **_numbers(limits),
        },
        "example": json.loads(_EXAMPLE),
    }


def _prompt(value: object, limits: LiveLimits) -> str:
    if not isinstance(value, str):
        kind = "nothing" if value is None else type(value).__name__
        raise InputError(f"prompt must be a string, got {kind}. Write what the model should answer.")
    if not value.strip():
        raise InputError("prompt must hold some text, got an empty one. Write what the model should answer.")
    if len(value) > limits.max_prompt_chars:
        raise InputError(
            f"prompt may hold {limits.max_prompt_chars} characters on this server, got {len(value)}. Shorten it."
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError("prompt holds half of a surrogate pair, which is no text. Send it as plain UTF-8.")
    return value


def _policies(value: object, limits: LiveLimits) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 2 or not all(isinstance(name, str) for name in value):
        raise InputError('policies must be a list of one or two strings, e.g. ["vanilla", "des-vote"].')
    for name in value:
        if name not in limits.policies:
            raise InputError(f"policy {name[:80]!r} is not offered here. {nearest(name[:80], limits.policies)}")
    return tuple(value)


def _whole(name: str, value: object, limits: LiveLimits) -> int:
    least, most = (_numbers(limits)[name][bound] for bound in ("minimum", "maximum"))
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{name} must be a whole number in {least}..{most}, got {str(value)[:80]}. Change {name}.")
    return value
