"""What the operator allows on the live page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from expertshare.errors import ConfigError
from expertshare.routing import POLICIES

_FIRST = ("vanilla", "des-vote")
POLICIES_SHOWN = (*_FIRST, *(name for name in POLICIES if name not in _FIRST))

EXAMPLES = (
    "Tom has 12 apples. He finds 7 more. He sells 4. How many apples does Tom have now?",
    "Solve 3x + 5 = 17.",
    "Write g(a) that returns a modulo 46. Then write f(data) that returns g of each of data.",
)
"""Prompts to start from: of the kinds that the reference model knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveLimits:
    """Bounds of one trace. policies: what can be chosen, as `expertshare generate --policy` takes it; the page starts
    with the first two. max_prompt_chars, max_tokens: longest prompt and answer. max_seconds: a trace is stopped then.
    send_timeout_s: for a client to take an event; one that takes longer is given up.
    """

    policies: tuple[str, ...] = POLICIES_SHOWN
    examples: tuple[str, ...] = EXAMPLES
    max_prompt_chars: int = 4000
    max_tokens: int = 256
    default_tokens: int = 64
    max_seconds: float = 300.0
    send_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.policies:
            raise ConfigError("expected at least one policy for the live page, got none: name some, e.g. vanilla")
        for name in ("max_prompt_chars", "max_tokens", "default_tokens", "max_seconds", "send_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be greater than 0, got {getattr(self, name)}: raise it")

    @property
    def tokens_first(self) -> int:
        """Longest answer where a request does not say."""
        return min(self.default_tokens, self.max_tokens)

    @property
    def max_body_bytes(self) -> int:
        """Longest request body: the prompt with every character escaped as a surrogate pair, and room for the rest."""
        return 12 * self.max_prompt_chars + 4096

    def to_json(self) -> dict[str, Any]:
        """What the page needs to know of them."""
        return {
            "policies": list(self.policies),
            "examples": list(self.examples),
            "max_prompt_chars": self.max_prompt_chars,
            "max_tokens": self.max_tokens,
            "default_tokens": self.tokens_first,
        }
