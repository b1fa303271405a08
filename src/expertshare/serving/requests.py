"""What clients may send: OpenAI's parameters as far as a block-diffusion model has a meaning for them, and ours."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from expertshare.serving.refusals import Refusal

MAX_STOPS = 16
LONGEST_QUOTE = 200
"""Characters of what a client sent that an error says again."""

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

    supported: ClassVar[str]

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

    @property
    def stops(self) -> tuple[str, ...]:
        """As a tuple, whatever was given."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def answer_tokens(self) -> int | None:
        """Most tokens to generate; None: the server's default."""
        return self.max_tokens


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

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def answer_tokens(self) -> int | None:
        """Most tokens to generate; None: the server's default. Raises Refusal for two that differ."""
        given = {count for count in (self.max_tokens, self.max_completion_tokens) if count is not None}
        if len(given) > 1:
            raise Refusal(
                400, "expected max_completion_tokens or max_tokens, got both: leave one out", param="max_tokens"
            )
        return next(iter(given), None)


_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(_Sampling):
    """POST /v1/completions. prompt: text or token ids, or a list of either."""

    prompt: _Text | _Ids | Annotated[list[_Text], Field(min_length=1)] | Annotated[list[_Ids], Field(min_length=1)]

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one for each answer."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


def _is_neutral(name: str, given: Any) -> bool:
    """0 is no false: logprobs=0 asks for log probabilities."""
    return any(
        given == neutral and isinstance(given, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(name, ())
    )
