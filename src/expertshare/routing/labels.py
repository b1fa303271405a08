"""Policies as text: how a run is labelled, and how a list of policies is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from expertshare.errors import PolicyError
from expertshare.routing.layerwise import Layerwise
from expertshare.routing.table import parse_policy
from expertshare.types import RoutingPolicy


def policy_label(policy: RoutingPolicy) -> str:
    """`name:knob=value,...` with every number that is set and the words that differ; parse_policy reads it back."""
    if isinstance(policy, Layerwise):  # has no short form that parse_policy could read: its home is a policy file
        return f"{policy.name}({'; '.join(policy_label(layer) for layer in policy.layers)})"
    told: list[str] = []
    for knob in fields(policy):  # type: ignore[arg-type]
        value = getattr(policy, knob.name)
        if value is not None and (not isinstance(value, str) or value != knob.default):
            told.append(f"{knob.name}={value}")
    text = ",".join(told)
    return f"{policy.name}:{text}" if text else policy.name


def parse_policies(texts: Sequence[str]) -> list[RoutingPolicy]:
    """Policies from lists such as "vanilla,skip:skip_share=0.3,des-vote:budget=16,group_limit=ignore".

    Commas part policies as well as knobs: a part with "=" and without ":" belongs to the policy before it. Raises
    PolicyError for a list that cannot be read.
    """
    return [parse_policy(text) for listed in texts for text in split_policies(listed)]


def split_policies(listed: str) -> list[str]:
    """One text per policy of a list."""
    policies: list[str] = []
    for part in (part.strip() for part in listed.split(",")):
        if not part:
            continue
        if "=" in part and ":" not in part:
            if not policies:
                raise PolicyError(f"expected a policy before the knob {part!r} in {listed!r}, e.g. des-vote:{part}")
            policies[-1] += ("," if ":" in policies[-1] else ":") + part
        else:
            policies.append(part)
    return policies
