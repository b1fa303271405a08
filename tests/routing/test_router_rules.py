"""The models' router rules, against formulas written out in plain Python over float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.routing import SharingRule, assign, everything, make_policy, route, router_scores
from expertshare.types import RoutingPlan

from .cases import SPECS, plain_spec

VANILLA = make_policy("vanilla")


@dataclass(frozen=True)
class Chosen:
    ids: list[int]
    weights: list[float]


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def softmax_rule(logits: list[float], k: int, *, renormalise: bool) -> Chosen:
    """OLMoE, LLaDA-MoE (not renormalised), Qwen3-MoE, SDAR-MoE (renormalised)."""
    probabilities = softmax(logits)
    ids = sorted(range(len(logits)), key=lambda e: (-probabilities[e], e))[:k]
    weights = [probabilities[e] for e in ids]
    return Chosen(ids, [w / sum(weights) for w in weights] if renormalise else weights)


def sigmoid_rule(logits: list[float], bias: list[float], k: int, *, groups: int, kept: int, scaling: float) -> Chosen:
    """LLaDA2 / Glm4Moe: the bias ranks, a group scores its two best, the unbiased sigmoid weighs."""
    affinity = [1 / (1 + math.exp(-x)) for x in logits]
    biased = [a + b for a, b in zip(affinity, bias, strict=True)]
    size = len(logits) // groups
    group_scores = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best_groups = sorted(range(groups), key=lambda g: (-group_scores[g], g))[:kept]
    reachable = [e for e in range(len(logits)) if e // size in best_groups]
    ids = sorted(reachable, key=lambda e: (-biased[e], e))[:k]
    total = sum(affinity[e] for e in ids) + 1e-20
    return Chosen(ids, [affinity[e] / total * scaling for e in ids])


def vanilla_plan(logits_GLE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None) -> RoutingPlan:
    live = torch.ones(logits_GLE.shape[:2], dtype=torch.bool)
    return route(router_scores(logits_GLE, live, spec, bias_E), VANILLA, spec)[1]


def assert_plan(plan: RoutingPlan, expected: list[Chosen]) -> None:
    assert plan.expert_ids_TK.tolist() == [row.ids for row in expected]
    torch.testing.assert_close(plan.weights_TK, torch.tensor([row.weights for row in expected]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("experts", "k", "renormalise"), [(64, 8, False), (128, 8, True), (6, 2, True), (5, 5, False)])
def test_softmax(experts: int, k: int, renormalise: bool) -> None:
    logits = torch.randn(2, 17, experts, generator=torch.Generator().manual_seed(experts)) * 2
    plan = vanilla_plan(logits, plain_spec(experts, k, renormalise=renormalise))
    rows = logits.flatten(0, 1).tolist()
    assert_plan(plan, [softmax_rule(row, k, renormalise=renormalise) for row in rows])


@pytest.mark.parametrize("bias_shift", [0.0, -3.0], ids=["mixed bias", "all biases negative"])
@pytest.mark.parametrize(
    "spec_name", ["sigmoid groups 64", "sigmoid groups 256", "few kept groups"], ids=lambda name: name
)
def test_sigmoid_with_bias_and_groups(spec_name: str, bias_shift: float) -> None:
    spec = SPECS[spec_name]
    generator = torch.Generator().manual_seed(spec.num_experts)
    logits = torch.randn(2, 17, spec.num_experts, generator=generator) * 2
    bias_E = torch.randn(spec.num_experts, generator=generator) / 4 + bias_shift
    expected = [
        sigmoid_rule(
            row,
            bias_E.tolist(),
            spec.top_k,
            groups=spec.num_groups,
            kept=spec.kept_groups,
            scaling=spec.scaling,
        )
        for row in logits.flatten(0, 1).tolist()
    ]
    assert_plan(vanilla_plan(logits, spec, bias_E), expected)


def test_sigmoid_by_hand() -> None:
    """sigmoid(0) = .5, sigmoid(ln 3) = .75, sigmoid(-ln 3) = .25. The bias lifts e0 in; it weighs its unbiased .25."""
    ln3 = math.log(3)
    spec = RouterSpec(num_experts=4, top_k=2, activation="sigmoid", renormalise=True, scaling=2.5, has_bias=True)
    plan = vanilla_plan(torch.tensor([[[-ln3, 0.0, ln3, -ln3]]]), spec, torch.tensor([0.4, 0.0, 0.0, -0.5]))
    assert plan.expert_ids_TK.tolist() == [[2, 0]]  # ranks .75, .65, .5, -.25
    torch.testing.assert_close(plan.weights_TK, torch.tensor([[2.5 * 0.75, 2.5 * 0.25]]))


def test_saturated_sigmoids_do_not_divide_by_zero() -> None:
    """All affinities are exactly 0: 0 / (0 + 1e-20) is 0, not NaN."""
    spec = RouterSpec(num_experts=4, top_k=2, activation="sigmoid", renormalise=True, scaling=2.5)
    plan = vanilla_plan(torch.full((1, 1, 4), -200.0), spec)
    assert plan.expert_ids_TK.tolist() == [[0, 1]]
    assert plan.weights_TK.tolist() == [[0.0, 0.0]]


def test_expert_scale_multiplies_the_renormalised_weight() -> None:
    """softmax(ln 1, ln 2, ln 5) = .125 .25 .625; the best two renormalise to 5/7 and 2/7; scales 10 and 100."""
    spec = plain_spec(3, 2, renormalise=True, has_expert_scale=True)
    logits = torch.tensor([[[math.log(1), math.log(2), math.log(5)]]])
    scores = router_scores(logits, torch.ones(1, 1, dtype=torch.bool), spec, None)
    scale_E = torch.tensor([1.0, 10.0, 100.0])
    plan = assign(scores, everything(scores), SharingRule(), spec, expert_scale_E=scale_E)
    assert plan.expert_ids_TK.tolist() == [[2, 1]]
    torch.testing.assert_close(plan.weights_TK, torch.tensor([[500 / 7, 20 / 7]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_float32_whatever_the_logits_are(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name in ("softmax plain", "sigmoid groups 64"):
        scores = router_scores(logits, torch.ones(1, 4, dtype=torch.bool), SPECS[name], torch.zeros(64, dtype=dtype))
        assert scores.affinity_GLE.dtype == scores.choice_GLE.dtype == torch.float32
        exact = router_scores(logits.float(), torch.ones(1, 4, dtype=torch.bool), SPECS[name], None)
        assert torch.equal(scores.affinity_GLE, exact.affinity_GLE)
