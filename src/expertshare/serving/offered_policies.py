"""Which policies requests may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertshare.config import RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing import POLICIES, Layerwise, parse_policy, policy_label, split_policies
from expertshare.types import RoutingPolicy


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
