"""The contract of every policy (tests/routing/contract.py), with selection in Triton in the place of routing.route."""

from __future__ import annotations

import pytest
import torch

from expertshare.config import RouterSpec
from expertshare.routing import POLICIES, RoutingPolicy, make_policy
from expertshare.types import Coreset, RouterScores, RoutingPlan
from routing import contract
from routing.cases import SPECS, Scene

from .test_selection import member, selected, tied_scores


@pytest.mark.parametrize("policy_name", POLICIES)
def test_selection_keeps_the_contract(policy_name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One router rule for each policy in the interpreter, all of them on a GPU."""

    def by_triton(
        scores: RouterScores, policy: RoutingPolicy, spec: RouterSpec, *, expert_scale_E: torch.Tensor | None = None
    ) -> tuple[Coreset, RoutingPlan]:
        found = selected(scores, policy, spec, device, expert_scale_E)
        plan = RoutingPlan(*(t.cpu() for t in (found.plan.expert_ids_TK, found.plan.weights_TK, found.plan.active_E)))
        return Coreset(member(found).cpu()), plan

    monkeypatch.setattr(contract, "route", by_triton)
    number = list(POLICIES).index(policy_name)
    names = list(SPECS)
    for spec_name in names if device.type == "cuda" else [names[number % len(names)]]:
        spec = SPECS[spec_name]
        policy = make_policy(policy_name).bind(spec)
        scale_E = torch.linspace(0.5, 2.0, spec.num_experts) if spec.has_expert_scale else None
        scene = Scene(scores=tied_scores(spec, number, groups=2, length=4), scale_E=scale_E)
        for check in contract.CHECKS:
            check(policy, spec, scene)
