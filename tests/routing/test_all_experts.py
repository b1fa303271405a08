"""A coreset of all experts is the model itself, bit for bit, for every policy that shares one."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from expertshare.config import RouterSpec
from expertshare.routing import POLICIES, everything, route, router_scores
from expertshare.types import RouterScores

from .cases import SPECS
from .contract import assert_same_plan

VANILLA = POLICIES["vanilla"]()
KNOBS = {name: {f.name for f in fields(kind)} for name, kind in POLICIES.items()}
BUDGETED = [name for name, knobs in KNOBS.items() if "budget" in knobs]
SHARING = [name for name, knobs in KNOBS.items() if "group_limit" in knobs]


def random_scores(spec: RouterSpec, groups: int = 2, length: int = 32) -> RouterScores:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(groups, length, spec.num_experts, generator=generator)
    bias_E = torch.randn(spec.num_experts, generator=generator) / 4 if spec.has_bias else None
    live = torch.rand(groups, length, generator=generator) < 0.9
    return router_scores(logits, live, spec, bias_E)


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("policy_name", BUDGETED)
@pytest.mark.parametrize("budget", ["count", "fraction"])
def test_a_budget_of_all_experts_is_vanilla(policy_name: str, spec_name: str, budget: str) -> None:
    spec = SPECS[spec_name]
    kind: Any = POLICIES[policy_name]
    policy = kind(budget=spec.num_experts if budget == "count" else 1.0, group_limit="inside").bind(spec)
    scores = random_scores(spec)
    coreset, plan = route(scores, policy, spec)
    assert coreset.member_GE.all()
    assert_same_plan(plan, route(scores, VANILLA, spec)[1])


@pytest.mark.parametrize("spec_name", [name for name, spec in SPECS.items() if spec.num_groups == 1])
def test_native_block_max_at_full_capacity_is_vanilla(spec_name: str) -> None:
    """LLaDA2.2 has no expert groups: its own rule (group limit ignored) with C = E changes nothing."""
    spec = SPECS[spec_name]
    kind: Any = POLICIES["block-max"]
    scores = random_scores(spec)
    assert_same_plan(route(scores, kind(budget=spec.num_experts), spec)[1], route(scores, VANILLA, spec)[1])


@pytest.mark.parametrize("spec_name", SPECS)
def test_block_top_p_of_one_is_vanilla_once_every_expert_is_voted_for(spec_name: str) -> None:
    """Token t prefers experts t, t + 1, ... (cyclic), so that the block votes for all of them."""
    spec = SPECS[spec_name]
    experts = torch.arange(spec.num_experts)
    distance = (experts.unsqueeze(0) - experts.unsqueeze(1)) % spec.num_experts
    affinity = (1.0 / (1 + distance)).unsqueeze(0)
    scores = RouterScores(affinity, affinity, torch.ones(affinity.shape[:2], dtype=torch.bool))
    policy = POLICIES["block-top-p"](top_p_experts=1.0).bind(spec)  # type: ignore[call-arg]
    coreset, plan = route(scores, policy, spec)
    assert coreset.member_GE.all()
    assert_same_plan(plan, route(scores, VANILLA, spec)[1])


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("policy_name", SHARING)
def test_assignment_inside_all_experts_is_vanilla(policy_name: str, spec_name: str) -> None:
    spec = SPECS[spec_name]
    kind: Any = POLICIES[policy_name]
    scores = random_scores(spec)
    policy = replace(kind(), group_limit="inside").bind(spec)
    plan = policy.assign(scores, everything(scores), spec)
    assert_same_plan(plan, VANILLA.assign(scores, everything(scores), spec))


def test_per_group_coresets_may_hold_different_experts() -> None:
    """Two groups with opposite tastes share nothing: a coreset belongs to a block of a sequence, not to the batch."""
    spec = SPECS["expert scale"]
    affinity = torch.zeros(2, 3, spec.num_experts)
    affinity[0, :, :8], affinity[1, :, -8:] = 0.5, 0.5
    scores = RouterScores(affinity, affinity, torch.ones(2, 3, dtype=torch.bool))
    policy = POLICIES["des-vote"](budget=4).bind(spec)  # type: ignore[call-arg]
    coreset, plan = route(scores, policy, spec)
    assert coreset.member_GE[0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert coreset.member_GE[1].nonzero().flatten().tolist() == [24, 25, 26, 27]
    assert plan.active_E.sum() == 8
