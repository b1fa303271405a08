"""What the operator of a server decides: bounds, policies, replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
        _at_least(1, max_batch=self.max_batch, max_context=self.max_context)
        _at_least(0, max_queue=self.max_queue)
        _positive(timeout_s=self.timeout_s)


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
        _at_least(
            1,
            max_body_bytes=self.max_body_bytes,
            max_prompt_tokens=self.max_prompt_tokens,
            max_choices=self.max_choices,
        )
        _positive(body_timeout_s=self.body_timeout_s, send_timeout_s=self.send_timeout_s)
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("expected an API key of some characters, got an empty one: give one, or none at all")


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}: change it")


def _positive(**values: float) -> None:
    for name, value in values.items():
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
