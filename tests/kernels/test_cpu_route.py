"""A layer's routing in one native call against torch on the same scores: the same bits."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertshare import native
from expertshare.config import RouterSpec
from expertshare.errors import ConfigError, PolicyError
from expertshare.kernels import cpu_route
from expertshare.kernels.cpu_route import PlanBuffers, plan_buffers, route_layer_cpu, router_scores_cpu
from expertshare.routing import POLICIES, RoutingPolicy, SharingRule, parse_policy, policy_record, route_layer
from expertshare.routing.policies import BlockTopP, DesVote, TopKCap
from expertshare.routing.route import routed
from expertshare.types import Coreset, Routed, RouterScores
from routing.cases import BY_RULE, SPECS, plain_spec, policy_settings
from routing.contract import assert_same_plan

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

ISAS = native.usable_instruction_sets() if native.available() else []
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor]


@pytest.fixture(autouse=True)
def unwritten_is_nan_everywhere(unwritten_is_nan: None) -> None:
    """Whatever the library does not write is NaN, or the largest integer, and no result equals it."""


def inputs(
    spec: RouterSpec, shape: tuple[int, int, int], *, seed: int = 0, distinct: int | None = None, dead: float = 0.2
) -> Inputs:
    """Hidden states, router weights, bias and live tokens. distinct: so many different experts, the others tie."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x.bfloat16() if seed % 2 else x
    weight = torch.randn(spec.num_experts, shape[-1], generator=generator) * shape[-1] ** -0.5
    weight = weight[torch.arange(spec.num_experts) % (distinct or spec.num_experts)]
    bias = torch.randint(-32, 32, (spec.num_experts,), generator=generator) / 64 if spec.has_bias else None
    return x, weight, bias, torch.rand(shape[:2], generator=generator) >= dead


def by_library(given: Inputs, policy: RoutingPolicy, spec: RouterSpec, **steps: Any) -> Routed:
    """Fails where the library does not take the layer."""
    x, weight, bias, live = given
    with (
        patch.object(cpu_route, "routed", side_effect=AssertionError),
        patch.object(cpu_route, "route_layer", side_effect=AssertionError),
    ):
        return route_layer_cpu(x, weight, bias, policy, spec, live, **steps)


def is_taken(given: Inputs, policy: RoutingPolicy, spec: RouterSpec) -> bool:
    try:
        by_library(given, policy, spec)
    except AssertionError:
        return False
    return True


def by_torch(
    given: Inputs,
    policy: RoutingPolicy,
    spec: RouterSpec,
    masked_GL: Tensor | None = None,
    previous: Coreset | None = None,
) -> Routed:
    """The oracle, of the library's scores."""
    return routed(replace(router_scores_cpu(*given, spec), masked_GL=masked_GL), policy, spec, previous)


def assert_same(made: Routed, expected: Routed) -> None:
    assert_same_plan(made.plan, expected.plan)
    for tensor, wanted in ((made.load_E, expected.load_E), (made.group_experts_G, expected.group_experts_G)):
        assert tensor.dtype == wanted.dtype == torch.int64
        assert torch.equal(tensor, wanted)
    assert (made.plan.expert_ids_TK.dtype, made.plan.active_E.dtype) == (torch.int64, torch.bool)
    if made.coreset is not None:
        assert expected.coreset is not None
        assert torch.equal(made.coreset.member_GE, expected.coreset.member_GE)


def assert_one_call_is_the_same(given: Inputs, policy: RoutingPolicy, spec: RouterSpec, **steps: Any) -> None:
    assert_same(by_library(given, policy, spec, **steps), by_torch(given, policy, spec, **steps))


def what_decoding_tells(groups: int, length: int, spec: RouterSpec, seed: int) -> dict[str, Any]:
    """Masked tokens and coresets of the step before: none, some or all of them, too small ones and empty ones."""
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(groups, length, generator=generator) < (0.0, 0.5, 0.9)[seed % 3]
    member = (
        torch.rand(groups, spec.num_experts, generator=generator)
        < torch.tensor([0.0, 0.05, 0.5])[torch.randint(0, 3, (groups, 1), generator=generator)]
    )
    return {
        "masked_GL": None if seed % 4 == 0 else masked,
        "previous": None if seed % 5 < 2 else Coreset(member),
    }


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("policy_name", BY_RULE)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_policy(policy_name: str, spec_name: str, data: st.DataObject) -> None:
    spec = SPECS[spec_name]
    policy = data.draw(st.sampled_from(policy_settings(POLICIES[policy_name], spec)))
    shape = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)), data.draw(st.sampled_from((8, 24, 37)))
    distinct = data.draw(st.sampled_from((1, 3, spec.num_experts)))
    dead = data.draw(st.sampled_from((0.0, 0.3, 1.0)))
    given = inputs(spec, shape, seed=data.draw(st.integers(0, 99)), distinct=distinct, dead=dead)
    steps = what_decoding_tells(shape[0], shape[1], spec, data.draw(st.integers(0, 59)))
    assert_one_call_is_the_same(given, policy, spec, **steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruled(RoutingPolicy):
    """Any rule, also one that no built-in policy makes."""

    name: ClassVar[str] = "ruled"
    fixed: SharingRule

    def rule(self, spec: RouterSpec) -> SharingRule:
        return self.fixed


@st.composite
def rules(draw: st.DrawFn, spec: RouterSpec) -> SharingRule:
    """Every combination of fields that SharingRule allows."""
    ranking = draw(st.sampled_from(("all", "votes", "highest", "coverage")))
    votes = ranking == "votes"
    return SharingRule(
        ranking=ranking,
        ballots=draw(st.sampled_from(("ungrouped", "grouped"))),
        size=draw(st.integers(1, spec.num_experts)),
        protected=draw(st.integers(0, spec.top_k + 1)) if votes else 0,
        prefix_share=draw(st.sampled_from((None, 0.0, 0.3, 0.8, 1.0))) if votes else None,
        keep_protected=draw(st.booleans()),
        saturation=draw(st.sampled_from((0.125, 0.6, 1.0))) if ranking == "coverage" else None,
        experts_per_token=draw(st.sampled_from((None, 1, 3, spec.top_k))),
        drop_share=draw(st.sampled_from((None, 0.0, 0.3, 0.9))),
        voters=draw(st.sampled_from(("all", "masked"))),
        reuse=draw(st.sampled_from((1, 3))),
        group_limit=draw(st.sampled_from(("inside", "ignore"))),
    )


@pytest.mark.parametrize("spec_name", SPECS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_rule(spec_name: str, data: st.DataObject) -> None:
    spec = SPECS[spec_name]
    policy = Ruled(fixed=data.draw(rules(spec)))
    groups, length, distinct = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    given = inputs(spec, (groups, length, 16), seed=data.draw(st.integers(0, 99)), distinct=distinct)
    steps = what_decoding_tells(groups, length, spec, data.draw(st.integers(0, 59)))
    assert_one_call_is_the_same(given, policy, spec, **steps)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 31, 40])
def test_weights_of_any_number_of_experts(top_k: int) -> None:
    """To the last bit where torch's order of summation is followed, within some units of it beyond."""
    spec = plain_spec(64, top_k, renormalise=True, scaling=2.5)
    given, policy = inputs(spec, (3, 50, 24), seed=top_k), POLICIES["vanilla"]()
    fast, exact = by_library(given, policy, spec).plan, by_torch(given, policy, spec).plan
    assert torch.equal(fast.expert_ids_TK, exact.expert_ids_TK)
    same_order = top_k <= 31 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    torch.testing.assert_close(fast.weights_TK, exact.weights_TK, rtol=0.0 if same_order else 5e-7, atol=0.0)


@pytest.mark.parametrize("experts", [1, 2, 7, 16, 17, 100, 256])
def test_awkward_scores(experts: int) -> None:
    """Biases at the ends of the floats and at both zeros, logits that tie."""
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, -3.4e38, -torch.inf])
    spec = plain_spec(experts, min(3, experts), has_bias=True)
    generator = torch.Generator().manual_seed(experts)
    bias = values[torch.randint(0, len(values), (experts,), generator=generator)]
    weight = values[torch.randint(0, 4, (experts, 6), generator=generator)]
    given = torch.eye(6).unsqueeze(0), weight, bias, torch.ones(1, 6, dtype=torch.bool)
    for size in {1, experts // 2 or 1, experts}:
        for rule in (
            SharingRule(ranking="votes", size=size),
            SharingRule(ranking="votes", size=size, protected=1, prefix_share=0.5),
            SharingRule(ranking="highest", size=size),
        ):
            assert_one_call_is_the_same(given, Ruled(fixed=rule), spec)


@pytest.mark.parametrize("policy_name", BY_RULE)
@pytest.mark.parametrize("shape", [(20, 32, 64), (3, 200, 32), (1, 600, 32), (2, 32, 2048)], ids=str)
def test_more_tokens_than_fit_at_a_time(policy_name: str, shape: tuple[int, int, int]) -> None:
    """Groups are never parted, however long."""
    spec = SPECS["sigmoid groups 256"]
    given = inputs(spec, shape, seed=shape[1])
    assert_one_call_is_the_same(given, POLICIES[policy_name]().bind(spec), spec)
    steps = what_decoding_tells(shape[0], shape[1], spec, 13)
    assert_one_call_is_the_same(given, POLICIES[policy_name]().bind(spec), spec, **steps)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("policy_name", BY_RULE)
def test_instruction_sets(monkeypatch: pytest.MonkeyPatch, isa: str, policy_name: str) -> None:
    monkeypatch.setenv("EXPERTSHARE_ISA", isa)
    for spec_name in ("sigmoid groups 64", "softmax renormalised"):
        spec = SPECS[spec_name]
        policy = POLICIES[policy_name]().bind(spec)
        for seed in (2, 3):
            assert_one_call_is_the_same(inputs(spec, (2, 33, 70), seed=seed), policy, spec)


@pytest.mark.parametrize("threads", [1, 2, 3, 20])
def test_threads_do_not_matter(threads: int) -> None:
    spec = SPECS["sigmoid groups 256"]
    given = inputs(spec, (3, 32, 1024), seed=5)
    native.set_num_threads(threads)
    for policy_name in BY_RULE:
        for _ in range(3):
            assert_one_call_is_the_same(given, POLICIES[policy_name]().bind(spec), spec)


def test_no_groups() -> None:
    spec = SPECS["softmax plain"]
    found = by_library(inputs(spec, (0, 4, 8)), POLICIES["des-vote"]().bind(spec), spec)
    assert found.plan.expert_ids_TK.shape == (0, spec.top_k)
    assert not found.plan.active_E.any()
    assert not found.load_E.any()
    assert len(found.group_experts_G) == 0


def test_what_the_library_does_not_take_is_left_to_torch() -> None:
    """Strided tokens and masks are copied; other shapes and weights are not taken."""
    spec = SPECS["softmax plain"]
    policy = POLICIES["des-vote"]().bind(spec)
    x, weight, bias, live = inputs(spec, (4, 6, 16))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert_one_call_is_the_same((strided, weight, bias, live), policy, spec)
    for refused in (
        (x.half(), weight, bias, live),
        (x, weight.double(), bias, live),
        (x, weight.t().contiguous().t(), bias, live),
        (x, weight.clone().requires_grad_(), bias, live),
    ):
        assert not is_taken(refused, policy, spec)
        made = route_layer_cpu(*refused[:3], policy, spec, live)
        assert_same(made, route_layer(*refused[:3], policy, spec, live))
    assert made.plan.weights_TK.requires_grad
    with torch.no_grad():
        assert is_taken((x, weight.requires_grad_(), bias, live), policy, spec)


def test_groups_and_slots_that_do_not_fit_are_left_to_torch() -> None:
    policy = POLICIES["vanilla"]()
    for spec, length in (
        (plain_spec(128, cpu_route.MOST_SLOTS + 1), 4),
        (plain_spec(8, 2), cpu_route.MOST_TOKENS + 1),
    ):
        given = inputs(spec, (1, length, 8))
        assert not is_taken(given, policy, spec)
        assert_same(route_layer_cpu(*given[:3], policy, spec, given[3]), by_torch(given, policy, spec))


@pytest.mark.parametrize("policy", [BlockTopP(guard=99), BlockTopP(top_p_experts=-0.5), TopKCap(experts_per_token=-1)])
def test_knobs_out_of_range_never_reach_the_library(policy: RoutingPolicy) -> None:
    """Nobody called `bind` here."""
    spec = plain_spec(8, 2)
    given = inputs(spec, (1, 4, 8))
    with pytest.raises(PolicyError):
        route_layer_cpu(*given[:3], policy, spec, given[3])


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrary(DesVote):
    """Inherits a rule, and selects something else."""

    name: ClassVar[str] = "contrary"

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        member_GE = torch.zeros(len(scores.live_GL), spec.num_experts, dtype=torch.bool)
        member_GE[:, -4:] = True
        return Coreset(member_GE)


def test_a_policy_that_overrides_select_runs_on_torch() -> None:
    """With the library's router scores, so that it is compared with others on equal ones."""
    spec = plain_spec(8, 2)
    given, policy = inputs(spec, (2, 4, 16)), Contrary(budget=4).bind(spec)
    assert not is_taken(given, policy, spec)
    made = route_layer_cpu(*given[:3], policy, spec, given[3])
    assert_same(made, by_torch(given, policy, spec))
    assert made.coreset is not None
    assert made.coreset.member_GE.sum(dim=0).tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert policy_record(policy)["routed_by"] == "torch"
    assert "routed_by" not in policy_record(DesVote())


def test_a_coreset_is_written_where_steps_reuse_it() -> None:
    spec = SPECS["softmax plain"]
    given = inputs(spec, (2, 4, 16))
    assert by_library(given, parse_policy("des-vote").bind(spec), spec).coreset is None
    policy = parse_policy("des-vote:reuse=2").bind(spec)
    first = by_library(given, policy, spec)
    assert first.coreset is not None
    other = inputs(spec, (2, 4, 16), seed=2)
    second = by_library(other, policy, spec, previous=first.coreset)
    assert second.coreset is not None
    assert torch.equal(second.coreset.member_GE, first.coreset.member_GE)


def test_what_decoding_tells_must_fit_the_tokens() -> None:
    spec = SPECS["softmax plain"]
    given, policy, experts = inputs(spec, (2, 5, 16)), DesVote(budget=8), spec.num_experts
    wrong_masks = [torch.ones(2, 4).bool(), torch.ones(3, 5).bool(), torch.ones(2, 5, 1).bool(), torch.ones(2, 5)]
    for mask in (*wrong_masks, torch.ones(2, 5).bool().to("meta")):
        with pytest.raises(ConfigError, match=r"expected masked_GL in torch.bool of shape \(2, 5\).*got"):
            by_library(given, policy, spec, masked_GL=mask)
    wrong_members = [torch.ones(1, experts), torch.ones(2, experts - 1), torch.ones(experts)]
    for member in (*[wrong.bool() for wrong in wrong_members], torch.ones(2, experts), torch.ones(2, experts).int()):
        with pytest.raises(ConfigError, match=rf"expected previous.member_GE in torch.bool of shape \(2, {experts}\)"):
            by_library(given, policy, spec, previous=Coreset(member))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 1)])
def test_a_mask_is_spread_over_the_tokens(shape: tuple[int, ...]) -> None:
    spec = SPECS["softmax plain"]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    assert_one_call_is_the_same(inputs(spec, (2, 5, 16)), DesVote(budget=8), spec, masked_GL=mask)


def test_an_instruction_set_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["softmax plain"]
    given = inputs(spec, (1, 4, 16))
    assert is_taken(given, POLICIES["vanilla"](), spec)
    monkeypatch.setenv("EXPERTSHARE_ISA", "avx9000")
    with pytest.raises(ConfigError, match="avx9000"):
        by_library(given, POLICIES["vanilla"](), spec)


def test_what_was_prepared_ends_with_what_it_was_made_of() -> None:
    """Other weights, a moved bias, another policy or rule: prepared anew."""
    spec = SPECS["sigmoid groups 64"]
    x, weight, bias, live = inputs(spec, (1, 4, 16))
    assert bias is not None
    policy = POLICIES["vanilla"]()
    for change in (
        lambda: None,
        lambda: weight.copy_(weight.flip(0)),
        lambda: bias.copy_(bias.flip(0)),
        lambda: setattr(weight, "data", weight.data.flip(0)),
        lambda: setattr(bias, "data", bias.data.flip(0)),
        lambda: setattr(weight, "data", weight.data.bfloat16()),
    ):
        change()
        assert_one_call_is_the_same((x, weight, bias, live), policy, spec)
        assert_one_call_is_the_same((x, weight, None, live), policy, spec)
        assert_one_call_is_the_same((x, weight, bias, live), POLICIES["skip"](), spec)
        assert_one_call_is_the_same((x, weight, bias, live), policy, replace(spec, scaling=2.0))


def test_what_is_prepared_does_not_keep_weights_alive() -> None:
    spec = SPECS["softmax plain"]
    x, weight, _, live = inputs(spec, (1, 4, 16))
    by_library((x, weight, None, live), POLICIES["vanilla"](), spec)
    reference = weakref.ref(weight)
    del weight
    gc.collect()
    assert reference() is None


def test_plans_share_nothing() -> None:
    """Memory for plans is made for many at a time: what one holds must not change when others are written."""
    spec = plain_spec(64, 8)
    policy = DesVote(budget=16).bind(spec)
    layers = [inputs(spec, (2, 32, 64), seed=seed) for seed in range(70)]
    found = [by_library(layer, policy, spec) for layer in layers]
    for layer, made in zip(layers, found, strict=True):
        assert_same(made, by_torch(layer, policy, spec))


def test_plans_of_inference_mode_stay_there() -> None:
    spec = plain_spec(64, 8)
    policy = DesVote(budget=16).bind(spec)
    layer = inputs(spec, (1, 32, 64))
    with torch.inference_mode():
        inside = by_library(layer, policy, spec)
    with torch.no_grad():
        outside = by_library(layer, policy, spec)
    assert inside.plan.weights_TK.is_inference()
    assert not outside.plan.weights_TK.is_inference()
    outside.plan.weights_TK.add_(1.0)


def test_buffers_of_several_threads_are_different_ones() -> None:
    found: list[PlanBuffers] = []
    with ThreadPoolExecutor(8) as pool:
        for some in pool.map(lambda _: [plan_buffers(8, 2, 16, 1) for _ in range(200)], range(8)):
            found += some
    addresses = [address for one in found for address in one.addresses]
    assert len(set(addresses)) == len(addresses) == 5 * 1600
