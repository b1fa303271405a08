"""Selection in two kernels against routing's own functions: indices to the bit, for every policy and router rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.errors import ConfigError
from expertshare.kernels.triton.route import MOST_EXPERTS, route_layer_triton, select_and_assign
from expertshare.routing import POLICIES, RoutingPolicy, SharingRule, count_load, make_policy, route, route_layer
from expertshare.types import Coreset, Routed, RouterScores
from routing.cases import BY_RULE, SPECS, dyadic, policy_settings

INTERPRETED_SETTINGS = 2
"""Of a policy under one router rule: the interpreter takes 0.1 s for each. The rules take turns; a GPU runs all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruled(RoutingPolicy):
    """Any rule."""

    name: ClassVar[str] = "ruled"
    fixed: SharingRule

    def rule(self, spec: RouterSpec) -> SharingRule:
        return self.fixed


@dataclass(frozen=True, kw_only=True, slots=True)
class Unruled(RoutingPolicy):
    """Chooses by itself."""

    name: ClassVar[str] = "unruled"

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        return Coreset(torch.arange(spec.num_experts, device=scores.live_GL.device).expand(2, -1) % 3 > 0)


def chosen_settings(policy_name: str, spec_name: str, device: torch.device) -> list[RoutingPolicy]:
    spec = SPECS[spec_name]
    settings = policy_settings(POLICIES[policy_name], spec)
    if device.type != "cpu" or len(settings) <= INTERPRETED_SETTINGS:
        return settings
    first = 2 * list(SPECS).index(spec_name)
    return [settings[(first + step * len(settings) // 2) % len(settings)] for step in range(INTERPRETED_SETTINGS)]


def tied_scores(spec: RouterSpec, seed: int, *, groups: int = 3, length: int = 5, live: float = 0.7) -> RouterScores:
    """Few distinct values and negative biases, so that ties and negative votes are frequent; the last group is dead."""
    generator = torch.Generator().manual_seed(seed)
    affinity = dyadic((groups, length, spec.num_experts), 1, (1, 2, 5, 63)[seed % 4], generator)
    bias_E = dyadic((spec.num_experts,), -64, (-32, 0, 64)[seed % 3], generator)
    live_GL = torch.rand(groups, length, generator=generator) < live
    live_GL[-1] = False
    masked_GL = None if seed % 2 else torch.rand(groups, length, generator=generator) < 0.4
    return RouterScores(affinity, affinity + bias_E if spec.has_bias else affinity, live_GL, masked_GL)


def smooth_scores(spec: RouterSpec, seed: int, *, groups: int = 2, length: int = 8) -> RouterScores:
    """As a router gives them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(groups, length, spec.num_experts, generator=generator)
    affinity = logits.softmax(-1) if spec.activation == "softmax" else logits.sigmoid()
    bias_E = 0.1 * torch.randn(spec.num_experts, generator=generator)
    live_GL = torch.ones(groups, length, dtype=torch.bool)
    return RouterScores(affinity, affinity + bias_E if spec.has_bias else affinity, live_GL)


def moved(scores: RouterScores, device: torch.device) -> RouterScores:
    parts = (scores.affinity_GLE, scores.choice_GLE, scores.live_GL, scores.masked_GL)
    return RouterScores(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]


def selected(
    scores: RouterScores,
    policy: RoutingPolicy,
    spec: RouterSpec,
    device: torch.device,
    scale_E: Tensor | None = None,
    previous: Coreset | None = None,
) -> Routed:
    scale_E = None if scale_E is None else scale_E.to(device)
    previous = None if previous is None else Coreset(previous.member_GE.to(device))
    scores = moved(scores, device)
    return select_and_assign(scores, spec, policy.rule(spec), previous=previous, expert_scale_E=scale_E)


def member(found: Routed) -> Tensor:
    assert found.coreset is not None
    return found.coreset.member_GE


def check(
    scores: RouterScores,
    policy: RoutingPolicy,
    spec: RouterSpec,
    device: torch.device,
    previous: Coreset | None = None,
) -> None:
    scale_E = torch.linspace(0.5, 2.0, spec.num_experts) if spec.has_expert_scale else None
    coreset, plan = route(scores, policy, spec, previous=previous, expert_scale_E=scale_E)
    load_E, unique_G = count_load(plan, len(scores.live_GL))
    found = selected(scores, policy, spec, device, scale_E, previous)
    pairs = {
        "coreset": (member(found), coreset.member_GE),
        "ids": (found.plan.expert_ids_TK, plan.expert_ids_TK),
        "active": (found.plan.active_E, plan.active_E),
        "load": (found.load_E, load_E),
        "unique": (found.group_experts_G, unique_G),
    }
    different = [name for name, (ours, theirs) in pairs.items() if not torch.equal(ours.cpu(), theirs)]
    assert not different, (policy, different)
    torch.testing.assert_close(found.plan.weights_TK.cpu(), plan.weights_TK, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("policy_name", BY_RULE)
def test_equals_the_policy(policy_name: str, spec_name: str, device: torch.device) -> None:
    spec = SPECS[spec_name]
    for number, policy in enumerate(chosen_settings(policy_name, spec_name, device)):
        seed = 7 * number + list(SPECS).index(spec_name)
        check(tied_scores(spec, seed) if number % 2 == 0 else smooth_scores(spec, seed), policy, spec, device)


FEW_EXPERTS = RouterSpec(
    num_experts=12, top_k=3, activation="sigmoid", renormalise=True, num_groups=3, kept_groups=2, has_bias=True
)
RULES = (
    SharingRule(ranking="votes", size=5, protected=2, prefix_share=0.4, ballots="grouped", voters="masked", reuse=2),
    SharingRule(ranking="votes", size=2, protected=9, keep_protected=True, prefix_share=0.2, group_limit="ignore"),
    SharingRule(ranking="votes", size=4, prefix_share=1.0, drop_share=0.3, experts_per_token=2),
    SharingRule(ranking="highest", size=4, voters="masked", drop_share=0.0),
    SharingRule(ranking="coverage", size=7, saturation=0.125, ballots="grouped", voters="masked"),
    SharingRule(ranking="coverage", size=12, saturation=1.0, group_limit="ignore"),
    SharingRule(experts_per_token=1, drop_share=0.9),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.ranking)
@pytest.mark.parametrize("with_previous", [False, True])
def test_equals_the_rule(rule: SharingRule, with_previous: bool, device: torch.device) -> None:
    """Rules that no built-in policy makes; coresets of the step before, an empty one among them."""
    for seed in (0, 1, 2):
        scores = tied_scores(FEW_EXPERTS, seed)
        member_GE = torch.rand(3, 12, generator=torch.Generator().manual_seed(seed)) < torch.tensor(
            [[0.5], [0.0], [0.2]]
        )
        check(scores, Ruled(fixed=rule), FEW_EXPERTS, device, Coreset(member_GE) if with_previous else None)


def test_a_layer_from_hidden_states(device: torch.device) -> None:
    """The whole signature, by kernels and, for a policy that no rule expresses, by torch."""
    spec = SPECS["sigmoid groups 64"]
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 24, generator=generator), torch.randn(64, 24, generator=generator)
    bias, live = torch.randn(64, generator=generator) / 8, torch.rand(2, 5, generator=generator) < 0.8
    masked = torch.rand(2, 5, generator=generator) < 0.5
    for policy in (make_policy("coverage", {"voters": "masked"}).bind(spec), Unruled()):
        told = (weight.to(device), bias.to(device), policy, spec, live.to(device))
        found = route_layer_triton(x.to(device), *told, masked_GL=masked.to(device))
        expected = route_layer(x.to(device), *told, masked_GL=masked.to(device))
        assert torch.equal(member(found), member(expected))
        assert torch.equal(found.plan.expert_ids_TK, expected.plan.expert_ids_TK)
        again = route_layer_triton(x.to(device), *told, previous=found.coreset)
        assert torch.equal(member(again), member(found))


@pytest.mark.parametrize("policy_name", ["vanilla", "des-vote", "block-top-p", "protected-vote"])
def test_a_released_shape(policy_name: str, device: torch.device) -> None:
    """LLaDA2.0-mini's router, two blocks of 32 tokens, the second one partial: more tokens than a program holds."""
    spec = SPECS["sigmoid groups 256"]
    scores = smooth_scores(spec, 3, length=32)
    scores.live_GL[1, 20:] = False
    check(scores, make_policy(policy_name).bind(spec), spec, device)


@pytest.mark.parametrize(("num_experts", "length"), [(3, 1), (4, 3), (48, 17)])
def test_odd_sizes(num_experts: int, length: int, device: torch.device) -> None:
    """Fewer lanes than keys are compared at a time, numbers that are no power of two, blocks of any length."""
    spec = RouterSpec(num_experts=num_experts, top_k=2, activation="softmax", renormalise=True)
    for name in ("des-seq", "block-top-p"):
        check(smooth_scores(spec, 1, length=length), make_policy(name).bind(spec), spec, device)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_share_on_the_edge(share: float, device: torch.device) -> None:
    """Four experts with a quarter of the votes each: the prefix ends exactly where the share says."""
    spec = RouterSpec(num_experts=8, top_k=4, activation="softmax", renormalise=False)
    row_E = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0])
    scores = RouterScores(row_E.expand(1, 4, 8), row_E.expand(1, 4, 8), torch.ones(1, 4, dtype=torch.bool))
    check(scores, make_policy("block-top-p", {"top_p_experts": share}).bind(spec), spec, device)
    check(scores, make_policy("skip", {"skip_share": share}).bind(spec), spec, device)


def test_what_stands_in_padding_is_not_read(device: torch.device) -> None:
    spec = SPECS["sigmoid groups 64"]
    scores, policy = tied_scores(spec, 5), make_policy("block-top-p").bind(spec)
    clean = selected(scores, policy, spec, device)
    dead = ~scores.live_GL.unsqueeze(-1)
    poisoned = RouterScores(
        scores.affinity_GLE.masked_fill(dead, torch.nan), scores.choice_GLE.masked_fill(dead, torch.nan), scores.live_GL
    )
    found = selected(poisoned, policy, spec, device)
    assert torch.equal(member(found), member(clean))
    assert torch.equal(found.plan.expert_ids_TK, clean.plan.expert_ids_TK)
    assert torch.equal(found.plan.weights_TK, clean.plan.weights_TK)


def test_an_expert_at_minus_infinity_is_never_chosen(device: torch.device) -> None:
    spec = SPECS["sigmoid groups 64"]
    scores = smooth_scores(spec, 2)
    scores.choice_GLE[..., ::3] = -torch.inf
    for name in ("vanilla", "des-vote", "block-max"):
        check(scores, make_policy(name).bind(spec), spec, device)


def test_no_groups_at_all(device: torch.device) -> None:
    spec = SPECS["softmax plain"]
    empty = torch.empty(0, 4, spec.num_experts)
    scores = RouterScores(empty, empty, torch.empty(0, 4, dtype=torch.bool))
    found = selected(scores, make_policy("vanilla"), spec, device)
    assert found.plan.expert_ids_TK.shape == (0, spec.top_k)
    assert not found.plan.active_E.any()


def test_two_kernels_and_no_more(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cpu":
        pytest.skip("counted in the interpreter")
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []
    call = GridExecutor.__call__

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        launched.append(self.fn.__name__)
        return call(self, *arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    spec = SPECS["sigmoid groups 64"]
    selected(smooth_scores(spec, 0), make_policy("des-vote").bind(spec), spec, device)
    assert launched == ["coreset_kernel", "plan_kernel"]


def test_what_it_cannot_take_is_said_clearly(device: torch.device) -> None:
    spec = SPECS["softmax plain"]
    scores = moved(smooth_scores(spec, 0), device)
    with pytest.raises(ConfigError, match=r"float32 and live in bool, got torch\.float64"):
        select_and_assign(replace(scores, choice_GLE=scores.choice_GLE.double()), spec, SharingRule())
    with pytest.raises(ConfigError, match=f"at most {MOST_EXPERTS}, got 64"):
        select_and_assign(scores, replace(spec, num_experts=32), SharingRule())
