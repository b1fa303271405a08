"""Gradients reach the router's logits through the mixing weights, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.routing import POLICIES, RoutingPolicy, route, router_scores
from expertshare.types import RoutingPlan

from .cases import SPECS


def plan_of(
    logits: Tensor, live: Tensor, spec: RouterSpec, policy: RoutingPolicy, bias_E: Tensor | None
) -> RoutingPlan:
    return route(router_scores(logits, live, spec, bias_E), policy, spec)[1]


def weights_by_hand(logits: Tensor, ids_TK: Tensor, spec: RouterSpec) -> Tensor:
    """The weight rule with the chosen experts as constants, -1 for a slot that is not used."""
    exponentials = logits.exp()
    affinity = (
        exponentials / exponentials.sum(-1, keepdim=True) if spec.activation == "softmax" else 1 / (1 + (-logits).exp())
    )
    used = (ids_TK >= 0).float()
    chosen = affinity.flatten(0, 1).gather(-1, ids_TK.clamp_min(0)) * used
    if spec.renormalise:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * spec.scaling


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("policy_name", POLICIES)
def test_the_gradient_is_that_of_the_weights_with_the_choice_held_constant(policy_name: str, spec_name: str) -> None:
    spec = SPECS[spec_name]
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, spec.num_experts, generator=generator).requires_grad_()
    bias_E = torch.randn(spec.num_experts, generator=generator).requires_grad_() if spec.has_bias else None
    live = torch.tensor([[True] * 5, [True, True, False, True, False]])
    policy = POLICIES[policy_name]().bind(spec)
    plan = plan_of(logits, live, spec, policy, bias_E)
    assert not plan.expert_ids_TK.requires_grad
    assert not plan.active_E.requires_grad
    downstream_TK = torch.randn(plan.weights_TK.shape, generator=generator)
    (plan.weights_TK * downstream_TK).sum().backward()

    by_hand = logits.detach().clone().requires_grad_()
    (weights_by_hand(by_hand, plan.expert_ids_TK, spec) * downstream_TK).sum().backward()
    assert logits.grad is not None
    assert by_hand.grad is not None
    torch.testing.assert_close(logits.grad, by_hand.grad, rtol=1e-4, atol=1e-6)
    assert (logits.grad[~live] == 0).all()
    assert bias_E is None or bias_E.grad is None  # the bias only ever selects


def test_an_expert_that_was_not_chosen_gets_no_gradient_from_a_sigmoid_router() -> None:
    spec = SPECS["sigmoid groups 64"]
    logits = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plan = plan_of(logits, torch.ones(1, 4, dtype=torch.bool), spec, POLICIES["block-top-p"]().bind(spec), None)
    plan.weights_TK.square().sum().backward()
    assert logits.grad is not None
    for token, ids in enumerate(plan.expert_ids_TK.tolist()):
        assert set(logits.grad[0, token].nonzero().flatten().tolist()) <= set(ids)


@pytest.mark.parametrize("spec_name", ["softmax renormalised", "sigmoid groups 64"])
def test_the_gradient_agrees_with_finite_differences(spec_name: str) -> None:
    spec = SPECS[spec_name]
    policy = POLICIES["des-vote"]().bind(spec)
    live = torch.ones(1, 3, dtype=torch.bool)
    logits = torch.randn(1, 3, spec.num_experts, generator=torch.Generator().manual_seed(5)).requires_grad_()
    plan = plan_of(logits, live, spec, policy, None)
    slots = torch.linspace(-1, 1, spec.top_k)
    (plan.weights_TK * slots).sum().backward()
    assert logits.grad is not None
    step = 2**-8
    for expert in plan.expert_ids_TK[0, :3].tolist():
        nudge = torch.zeros_like(logits)
        nudge[0, 0, expert] = step
        above, below = (plan_of(logits.detach() + s * nudge, live, spec, policy, None) for s in (1, -1))
        assert torch.equal(above.expert_ids_TK, below.expert_ids_TK)  # else the difference means nothing
        slope = ((above.weights_TK - below.weights_TK) * slots).sum() / (2 * step)
        torch.testing.assert_close(slope, logits.grad[0, 0, expert], rtol=1e-2, atol=1e-4)


def test_expert_scale_gets_a_gradient() -> None:
    spec = SPECS["expert scale"]
    scores = router_scores(torch.randn(1, 2, 32), torch.ones(1, 2, dtype=torch.bool), spec, None)
    scale_E = torch.ones(32, requires_grad=True)
    plan = route(scores, POLICIES["vanilla"](), spec, expert_scale_E=scale_E)[1]
    plan.weights_TK.sum().backward()
    assert scale_E.grad is not None
    torch.testing.assert_close(
        scale_E.grad,
        torch.zeros(32).index_add(0, plan.expert_ids_TK.flatten(), plan.weights_TK.detach().flatten()),
    )
