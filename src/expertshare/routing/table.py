"""Policies by their names: how they are made, read from text, written as it and described in reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from expertshare.config import ModelConfig
from expertshare.errors import PolicyError, nearest
from expertshare.routing.policies import POLICIES, BlockMax, Vanilla
from expertshare.routing.policy import Layerwise, RoutingPolicy, runs_on_torch

Knob = int | float | str


def knobs(policy: RoutingPolicy) -> dict[str, Any]:
    """The knobs of a policy by name, for reports; of a layerwise one, name and knobs of every layer's policy."""
    if isinstance(policy, Layerwise):
        return {"layers": [{"policy": layer.name, "knobs": knobs(layer)} for layer in policy.layers]}
    return {f.name: getattr(policy, f.name) for f in fields(policy)}


def policy_record(policy: RoutingPolicy) -> dict[str, Any]:
    """Name and knobs for reports; where no rule expresses the policy, that torch routed it whatever the backend."""
    layers = policy.layers if isinstance(policy, Layerwise) else (policy,)
    record = {"policy": policy.name, "knobs": knobs(policy)}
    return {**record, "routed_by": "torch"} if any(map(runs_on_torch, layers)) else record


def make_policy(name: str, settings: Mapping[str, Knob] | None = None) -> RoutingPolicy:
    """The policy called `name` with the given knobs; the others keep their defaults.

    Raises PolicyError for an unknown name, a knob of another policy, or a value of the wrong kind.
    """
    if name not in POLICIES:
        raise PolicyError(f"unknown policy {name!r}. {nearest(name, POLICIES)}")
    kind = POLICIES[name]
    known, hints = {f.name for f in fields(kind)}, get_type_hints(kind)
    for knob, value in (settings or {}).items():
        if knob not in known:
            owners = sorted(n for n, k in POLICIES.items() if knob in {f.name for f in fields(k)})
            hint = f"it belongs to {', '.join(owners)}. " if owners else ""
            raise PolicyError(
                f"{name} has no knob {knob!r}: {hint}{name} takes: {', '.join(sorted(known)) or 'no knobs'}."
            )
        whole = float not in (hints[knob], *get_args(hints[knob]))
        is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if get_origin(hints[knob]) is not Literal and not is_number:  # words are checked by the policy itself
            raise PolicyError(f"{name}: {knob} must be {'a whole number' if whole else 'a number'}, got {value!r}")
    return kind(**(settings or {}))


def parse_policy(text: str) -> RoutingPolicy:
    """Read a policy written as `name` or `name:knob=value,knob=value`, e.g. `des-vote:budget=16`."""
    name, _, rest = text.partition(":")
    settings: dict[str, Knob] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        knob, equals, value = part.partition("=")
        if not equals:
            raise PolicyError(f"expected knob=value in {text!r}, got {part!r}. Example: des-vote:budget=16")
        knob = knob.strip().replace("-", "_")
        if knob in settings:
            raise PolicyError(f"expected each knob once in {text!r}, got {knob} again: give one value")
        settings[knob] = parse_knob(value.strip())
    return make_policy(name.strip(), settings)


def parse_knob(text: str) -> Knob:
    """A knob's value from text: a whole number, a number, or else a word."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def native_policy(config: ModelConfig) -> RoutingPolicy:
    """The policy that a checkpoint was trained with: block max at its expert capacity (LLaDA2.2), else vanilla."""
    if config.expert_capacity is None:
        return Vanilla()
    return BlockMax(budget=config.expert_capacity)


def policy_label(policy: RoutingPolicy) -> str:
    """`name:knob=value,...` with every number that is set and the words that differ; parse_policy reads it back."""
    if isinstance(policy, Layerwise):  # has no short form that parse_policy could read: its home is a policy file
        return f"{policy.name}({'; '.join(policy_label(layer) for layer in policy.layers)})"
    values = [(knob, getattr(policy, knob.name)) for knob in fields(policy)]
    told = [f"{knob.name}={v}" for knob, v in values if v is not None and (not isinstance(v, str) or v != knob.default)]
    return f"{policy.name}:{','.join(told)}" if told else policy.name


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
