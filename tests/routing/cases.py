"""What the routing tests run over: router rules, settings of every policy, and random scores.

Random scores lie on a coarse dyadic grid: sums of them are exact in any order, and ties are frequent.
"""

from __future__ import annotations

import itertools
from dataclasses import Field, dataclass, fields
from typing import Any, get_args, get_type_hints

import torch
from hypothesis import strategies as st
from torch import Tensor

from expertshare.config import GroupLimit, RouterSpec
from expertshare.routing import POLICIES, RoutingPolicy
from expertshare.routing.policy import runs_on_torch, worded_knobs
from expertshare.types import RouterScores

SPECS: dict[str, RouterSpec] = {
    "softmax plain": RouterSpec(num_experts=64, top_k=8, activation="softmax", renormalise=False),
    "softmax renormalised": RouterSpec(num_experts=128, top_k=8, activation="softmax", renormalise=True),
    "sigmoid groups 64": RouterSpec(
        num_experts=64,
        top_k=8,
        activation="sigmoid",
        renormalise=True,
        num_groups=8,
        kept_groups=4,
        has_bias=True,
    ),
    "sigmoid groups 256": RouterSpec(
        num_experts=256,
        top_k=8,
        activation="sigmoid",
        renormalise=True,
        scaling=2.5,
        num_groups=8,
        kept_groups=4,
        has_bias=True,
    ),
    "few kept groups": RouterSpec(  # 2 * kept groups < K: dropped groups may be full
        num_experts=12,
        top_k=5,
        activation="sigmoid",
        renormalise=True,
        num_groups=3,
        kept_groups=2,
        has_bias=True,
    ),
    "groups of one": RouterSpec(
        num_experts=9,
        top_k=4,
        activation="sigmoid",
        renormalise=True,
        num_groups=9,
        kept_groups=5,
        has_bias=True,
    ),
    "expert scale": RouterSpec(num_experts=32, top_k=4, activation="softmax", renormalise=True, has_expert_scale=True),
}


def numbers_to_try(knob: Field[Any], type_of_knob: Any, spec: RouterSpec, group_limit: GroupLimit) -> list[Any]:
    """Both ends and the middle of what the knob's declaration allows, and a fraction where it takes one."""
    if knob.name == "reuse":
        return [3]
    limits = knob.metadata.get("limits")
    if limits is None:
        return []
    if isinstance(limits, str):
        return [0.125, 0.6, 1.0] if limits == "(0, 1]" else [0.0, 0.5, 0.9]
    least, most = limits(spec, group_limit)
    return [least, (least + most) // 2, most, *([1.0] if float in (type_of_knob, *get_args(type_of_knob)) else [])]


BY_RULE = [name for name, kind in POLICIES.items() if not runs_on_torch(kind())]
"""Policies that fast implementations interpret: those that override `select` or `assign` stay with torch."""


def policy_settings(kind: type[Any], spec: RouterSpec) -> list[RoutingPolicy]:
    """Settings of one policy, bound to `spec`: every choice of words, times its defaults and numbers worth trying."""
    hints = get_type_hints(kind)
    worded = worded_knobs(kind)
    bound: list[RoutingPolicy] = []
    for words in itertools.product(*worded.values()):
        chosen = dict(zip(worded, words, strict=True))
        limit = kind(**chosen).group_limit
        numbers = [{f.name: n} for f in fields(kind) for n in numbers_to_try(f, hints[f.name], spec, limit)]
        bound += [kind(**chosen, **number).bind(spec) for number in [{}, *numbers]]
    return bound


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Scores of some groups, and the per-expert scale where the router has one."""

    scores: RouterScores
    scale_E: Tensor | None


def dyadic(shape: tuple[int, ...], low: int, high: int, generator: torch.Generator) -> Tensor:
    """Multiples of 1/64, from low/64 to high/64."""
    return torch.randint(low, high + 1, shape, generator=generator).float() / 64


@st.composite
def scenes(draw: st.DrawFn, spec: RouterSpec) -> Scene:
    """Random scores: many or few distinct values, biases down to -1, any pattern of padding, dead groups included."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    levels = draw(st.sampled_from((1, 2, 5, 63)))
    affinity = dyadic((groups, length, spec.num_experts), 1, levels, generator)
    bias_E = dyadic((spec.num_experts,), -64, draw(st.sampled_from((-32, 0, 64))), generator)
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    patterns = st.one_of(
        st.just([True] * length),
        st.just([False] * length),
        st.integers(0, length - 1).map(lambda one: [i == one for i in range(length)]),
        rows,
    )
    live = torch.tensor([draw(patterns) for _ in range(groups)])
    choice = affinity + bias_E if spec.has_bias else affinity
    scale_E = dyadic((spec.num_experts,), 32, 128, generator) if spec.has_expert_scale else None
    masked = draw(st.sampled_from((None, torch.rand(groups, length, generator=generator) < 0.5)))
    return Scene(scores=RouterScores(affinity, choice, live, masked), scale_E=scale_E)


def one_group(rows: list[list[float]], live: list[bool] | None = None) -> RouterScores:
    """One group from rows of scores (tokens x experts) that are written out; all live unless told otherwise."""
    affinity = torch.tensor([rows])
    return RouterScores(affinity, affinity, torch.tensor([live or [True] * len(rows)]))


def plain_spec(num_experts: int, top_k: int, **others: Any) -> RouterSpec:
    """A softmax router with no renormalisation, unless `others` say so."""
    return RouterSpec(
        **{
            "num_experts": num_experts,
            "top_k": top_k,
            "activation": "softmax",
            "renormalise": False,
            **others,
        }
    )


def members(member_E: Tensor) -> list[int]:
    """Ids that are set in a mask over experts."""
    return member_E.nonzero().flatten().tolist()
