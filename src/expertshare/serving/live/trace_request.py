"""The body of POST /live/trace, read strictly, and what the operator allows there."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from expertshare.errors import ConfigError, InputError, nearest
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
        """Longest request body: the prompt with every character escaped as a surrogate pair, and space for the rest."""
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
        return cls(
            prompt=_prompt(value.get("prompt"), limits),
            policies=_policies(value.get("policies"), limits),
            max_tokens=_whole("max_tokens", value.get("max_tokens", limits.tokens_first), 1, limits.max_tokens),
            seed=_whole("seed", value.get("seed", 0), 0, MAX_SEED),
            tokens_per_step=_tokens_per_step(value.get("tokens_per_step"), limits),
        )


_EXAMPLE = '{"prompt": "Solve 3x + 5 = 17.", "policies": ["vanilla", "des-vote"], "max_tokens": 64, "seed": 0}'


def schema(limits: LiveLimits) -> dict[str, Any]:
    """The body as JSON Schema, for the OpenAPI description."""
    policy = {"type": "string", "enum": list(limits.policies)}
    return {
        "type": "object",
        "required": ["prompt", "policies"],
        "additionalProperties": False,
        "properties": {
            "prompt": {"type": "string", "minLength": 1, "maxLength": limits.max_prompt_chars},
            "policies": {"type": "array", "items": policy, "minItems": 1, "maxItems": 2},
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": limits.max_tokens},
            "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
            "tokens_per_step": {"type": ["integer", "null"], "minimum": 1, "maximum": limits.max_tokens},
        },
        "example": json.loads(_EXAMPLE),
    }


def _prompt(value: object, limits: LiveLimits) -> str:
    if not isinstance(value, str):
        raise InputError(f"prompt must be a string, got {_kind(value)}. Write what the model should answer.")
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


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{name} must be a whole number in {least}..{most}, got {str(value)[:80]}. Change {name}.")
    return value


def _tokens_per_step(value: object, limits: LiveLimits) -> int | None:
    return None if value is None else _whole("tokens_per_step", value, 1, limits.max_tokens)


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
