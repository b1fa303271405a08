"""Answers in the shapes of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from expertshare.measure.cost import FORWARD_KINDS
from expertshare.routing import policy_label
from expertshare.serving.running_request import Choice


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
        """A chunk with text."""
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
