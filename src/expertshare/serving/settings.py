"""What the operator of a server decides: bounds, policies, replicas, the live page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expertshare.config import RouterSpec
from expertshare.errors import ConfigError, PolicyError
from expertshare.routing import POLICIES, Layerwise, RoutingPolicy, parse_policy, policy_label, split_policies


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """Bounds of the engine. max_batch: rows (answers) decoded at once, whatever their policies. max_queue: rows that
    wait for a place; more are refused. timeout_s: from asking to the last token, waiting included. max_context: tokens
    of a prompt and its answer together (None: the model's positions)."""

    max_batch: int = 16
    max_queue: int = 64
    timeout_s: float = 300.0
    max_context: int | None = None

    def __post_init__(self) -> None:
        _check(self, at_least_1=("max_batch", "max_context"), at_least_0=("max_queue",), seconds=("timeout_s",))


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Bounds and manners of the HTTP interface.

    model_name: what clients call the model (None: its directory's name). api_key: asked of every request but those for
    health and metrics (None: nobody is asked). max_body_bytes: longest request body. max_prompt_tokens: longest prompt
    (None: what the context leaves). max_choices: answers of one request. body_timeout_s: for a client to send its body;
    send_timeout_s: for a client to take a piece of its answer. log_prompts: put prompts and answers into the log.
    """

    model_name: str | None = None
    api_key: str | None = None
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_choices: int = 8
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        numbers = ("max_body_bytes", "max_prompt_tokens", "max_choices")
        _check(self, at_least_1=numbers, seconds=("body_timeout_s", "send_timeout_s"))
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("expected an API key of some characters, got an empty one: give one, or none at all")


def _check(
    settings: object, *, at_least_1: Sequence[str], at_least_0: Sequence[str] = (), seconds: Sequence[str]
) -> None:
    """Raises ConfigError for a field that is out of bounds."""
    for least, names in ((1, at_least_1), (0, at_least_0)):
        for name in names:
            value = getattr(settings, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}: change it")
    for name in seconds:
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} must be a finite number of seconds greater than 0, got {value!r}: change it")


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferedPolicies:
    """default: of requests that name none. names: policies with any knobs. settings: policies with exactly these.

    All are bound to the model's router: every knob is concrete.
    """

    spec: RouterSpec
    default: RoutingPolicy
    names: frozenset[str]
    settings: tuple[RoutingPolicy, ...] = ()

    @classmethod
    def read(cls, spec: RouterSpec, default: RoutingPolicy, offered: Sequence[str] | None = None) -> OfferedPolicies:
        """offered: lists such as "vanilla,des-vote:budget=16": a name allows every setting of it, a setting itself;
        None allows all. The default is always allowed. Raises PolicyError for what the model cannot work with."""
        if offered is None:
            return cls(spec=spec, default=default.bind(spec), names=frozenset(POLICIES))
        texts = [text for listed in offered for text in split_policies(listed)]
        if not texts:
            raise PolicyError("expected at least one policy to offer, got none: name some, or leave the list out")
        parsed = [(text, parse_policy(text)) for text in texts]
        return cls(
            spec=spec,
            default=default.bind(spec),
            names=frozenset(policy.name for text, policy in parsed if ":" not in text),
            settings=tuple(policy.bind(spec) for text, policy in parsed if ":" in text),
        )

    def choose(self, text: str | None) -> RoutingPolicy:
        """The policy that a request asks for, bound. Raises PolicyError for one that is unknown, does not work with the
        model, or is not offered."""
        if text is None:
            return self.default
        policy = parse_policy(text).bind(self.spec)
        if policy.name in self.names or policy in self.settings or policy == self.default:
            return policy
        raise PolicyError(f"this server does not offer the policy {policy_label(policy)}: it offers {self.described()}")

    @property
    def labels(self) -> tuple[str, ...]:
        """One text for each that a request can name; names stand for their default knobs. A default with a policy for
        each layer has no such text."""
        nameable = [policy for policy in (self.default, *self.settings) if not isinstance(policy, Layerwise)]
        exact = dict.fromkeys(policy_label(policy) for policy in nameable)
        named = [name for name in POLICIES if name in self.names]
        return (*named, *(label for label in exact if label.partition(":")[0] not in self.names))

    def described(self) -> str:
        """All of them, for people."""
        return ", ".join(f"{label} (any knobs)" if label in self.names else label for label in self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaScale:
    """replicas: at least so many run; max_replicas: at most so many, as load asks for (None: always `replicas`).
    ray: use Ray for a single one, too. ray_address: of a Ray cluster (None: RAY_ADDRESS, else a local Ray)."""

    replicas: int = 1
    max_replicas: int | None = None
    ray: bool = False
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas must be at least 1, got {self.replicas}: change --replicas")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(
                f"max_replicas must be at least replicas ({self.replicas}), got {self.max_replicas}: change "
                "--max-replicas or --replicas"
            )

    @property
    def on_ray(self) -> bool:
        """Whether Ray is needed: for more than one replica, or where it was asked for."""
        return self.ray or self.ray_address is not None or self.most > 1

    @property
    def most(self) -> int:
        """Replicas that may run at once."""
        return self.max_replicas or self.replicas

    @property
    def grows(self) -> bool:
        """Whether their number follows the load."""
        return self.most > self.replicas

    def threads(self, asked: int | None, cores: int) -> int:
        """Of each replica: as asked, else an equal share of a machine's cores. Raises ConfigError for fewer than 1."""
        if asked is not None and asked < 1:
            raise ConfigError(f"threads must be at least 1, got {asked}: change --threads")
        return asked or max(1, cores // self.most)


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
