"""What the routing tests run over: router rules, settings of every policy, and random scores.

Random scores lie on a coarse dyadic grid: sums of them are exact in any order, and ties are frequent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from hypothesis import strategies as st
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.types import RouterScores, RoutingPolicy

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

# Values worth trying of each numeric knob, by its name; a knob that is not listed keeps its default.
_NUMBERS: dict[str, Callable[[RouterSpec, int], tuple[Any, ...]]] = {
    "budget": lambda spec, least: (least, (least + spec.num_experts) // 2, 1.0),
    "guard": lambda spec, least: (least, spec.num_experts),
    "top_p_experts": lambda _spec, _least: (0.125, 0.6, 1.0),
    "skip_share": lambda _spec, _least: (0.0, 0.5, 0.9),
    "experts_per_token": lambda spec, _least: (1, spec.top_k),
    "experts_per_vote": lambda spec, _least: (2, spec.top_k),
    "saturation": lambda _spec, _least: (0.125, 1.0),
    "reuse": lambda _spec, _least: (3,),
}


def policy_settings(kind: type[Any], spec: RouterSpec) -> list[RoutingPolicy]:
    """Settings of one policy, bound to `spec`: every choice of words, times its defaults and each listed number."""
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    worded = {name: get_args(hints[name]) for name in names if get_origin(hints[name]) is Literal}
    bound: list[RoutingPolicy] = []
    for words in itertools.product(*worded.values()):
        chosen = dict(zip(worded, words, strict=True))
        policy = kind(**chosen)
        least = spec.min_coreset_size(policy.group_limit)
        numbers = [{n: v} for n in names if n in _NUMBERS for v in _NUMBERS[n](spec, least)]
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
