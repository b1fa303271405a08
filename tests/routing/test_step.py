"""A whole routing step in one call against the same in pieces, native and by torch: the same bits."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertshare import native
from expertshare.config import RouterSpec
from expertshare.errors import ConfigError
from expertshare.routing import (
    POLICIES,
    LayerStep,
    blanks,
    compiled,
    count_load,
    gate_scores,
    parse_policy,
    recipe_of,
    route,
    step,
)
from expertshare.routing.base import CoresetPolicy, TokenPolicy
from expertshare.routing.block_top_p import BlockTopP
from expertshare.routing.des_vote import DesVote
from expertshare.routing.recipe import Recipe
from expertshare.routing.top_k_cap import TopKCap
from expertshare.types import Coreset, RouterScores, RoutingPlan, RoutingPolicy

from .cases import SPECS, plain_spec, policy_settings
from .contract import assert_same_plan

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

WITH_RECIPE = [name for name, kind in POLICIES.items() if hasattr(kind, "recipe")]
ISAS = native.usable_instruction_sets() if native.available() else []
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor]


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


def route_layer(
    given: Inputs, policy: RoutingPolicy, spec: RouterSpec, coreset_GE: Tensor | None = None
) -> step.Routed | None:
    x, weight, bias, live = given
    return LayerStep.of(weight, bias, policy, spec).route(x, live, coreset_GE=coreset_GE)


def in_pieces(given: Inputs, policy: RoutingPolicy, spec: RouterSpec) -> tuple[Coreset, RoutingPlan, Tensor, Tensor]:
    coreset, plan = route(gate_scores(*given, spec), policy, spec)
    return coreset, plan, *count_load(plan, len(given[3]))


def assert_one_call_is_the_same(given: Inputs, policy: RoutingPolicy, spec: RouterSpec) -> None:
    coreset_GE = torch.full((len(given[3]), spec.num_experts), True)
    routed = route_layer(given, policy, spec, coreset_GE)
    assert routed is not None
    made, made_load_E, made_unique_G = routed
    native_pieces = in_pieces(given, policy, spec)
    with patch.object(compiled, "library_for", lambda *_, **__: None):
        pieces_of_torch = in_pieces(given, policy, spec)
    for coreset, plan, load_E, unique_G in (native_pieces, pieces_of_torch):
        assert torch.equal(coreset_GE, coreset.member_GE)
        assert_same_plan(made, plan)
        assert torch.equal(made_load_E, load_E)
        assert torch.equal(made_unique_G, unique_G)
    for tensor, expected in zip(
        (made.expert_ids_TK, made.active_E, made_load_E, made_unique_G),
        (torch.int64, torch.bool, torch.int64, torch.int64),
        strict=True,
    ):
        assert tensor.dtype == expected


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("policy_name", WITH_RECIPE)
@settings(max_examples=8)
@given(st.data())
def test_every_policy(policy_name: str, spec_name: str, data: st.DataObject) -> None:
    spec = SPECS[spec_name]
    told_nothing = [p for p in policy_settings(POLICIES[policy_name], spec) if not p.needs_steps]
    policy = data.draw(st.sampled_from(told_nothing))
    shape = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)), data.draw(st.sampled_from((8, 24, 37)))
    distinct = data.draw(st.sampled_from((1, 3, spec.num_experts)))
    dead = data.draw(st.sampled_from((0.0, 0.3, 1.0)))
    given = inputs(spec, shape, seed=data.draw(st.integers(0, 99)), distinct=distinct, dead=dead)
    assert_one_call_is_the_same(given, policy, spec)


@pytest.mark.parametrize("policy_name", WITH_RECIPE)
@pytest.mark.parametrize("shape", [(20, 32, 64), (3, 200, 32), (1, 600, 32), (2, 32, 2048)], ids=str)
def test_more_tokens_than_fit_at_a_time(policy_name: str, shape: tuple[int, int, int]) -> None:
    """Groups are never parted, however long."""
    spec = SPECS["sigmoid groups 256"]
    assert_one_call_is_the_same(inputs(spec, shape, seed=shape[1]), POLICIES[policy_name]().bind(spec), spec)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("policy_name", WITH_RECIPE)
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
    try:
        native.set_num_threads(threads)
        for policy_name in WITH_RECIPE:
            for _ in range(3):
                assert_one_call_is_the_same(given, POLICIES[policy_name]().bind(spec), spec)
    finally:
        native.set_num_threads(None)


def test_no_groups() -> None:
    spec = SPECS["softmax plain"]
    routed = route_layer(inputs(spec, (0, 4, 8)), POLICIES["des-vote"]().bind(spec), spec)
    assert routed is not None
    plan, load_E, unique_G = routed
    assert plan.expert_ids_TK.shape == (0, spec.top_k)
    assert not plan.active_E.any()
    assert not load_E.any()
    assert len(unique_G) == 0


def test_what_is_not_laid_out() -> None:
    """Strided tokens and masks are copied; other shapes and weights are not taken."""
    spec = SPECS["softmax plain"]
    policy = POLICIES["des-vote"]().bind(spec)
    x, weight, bias, live = inputs(spec, (4, 6, 16))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert_one_call_is_the_same((strided, weight, bias, live), policy, spec)
    assert route_layer((x, weight, bias, live[:, :1]), policy, spec) is None
    assert route_layer((x, weight[:-1], bias, live), policy, spec) is None
    assert route_layer((x, weight.double(), bias, live), policy, spec) is None
    assert route_layer((x, weight.requires_grad_(), bias, live), policy, spec) is None
    with torch.no_grad():
        assert route_layer((x, weight, bias, live), policy, spec) is not None


def test_groups_and_slots_that_do_not_fit_are_left_to_the_pieces() -> None:
    policy = POLICIES["vanilla"]()
    spec = plain_spec(128, compiled.MOST_SLOTS + 1)
    assert route_layer(inputs(spec, (1, 4, 8)), policy, spec) is None
    spec = plain_spec(8, 2)
    assert route_layer(inputs(spec, (1, step.MOST_TOKENS + 1, 8)), policy, spec) is None


@pytest.mark.parametrize("policy", [BlockTopP(guard=99), BlockTopP(top_p_experts=-0.5), TopKCap(experts_per_token=-1)])
def test_knobs_out_of_range_never_reach_the_library(policy: RoutingPolicy) -> None:
    """They are refused by `bind`; here nobody called it."""
    spec = plain_spec(8, 2)
    assert route_layer(inputs(spec, (1, 4, 8)), policy, spec) is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrary(DesVote):
    """Inherits a recipe, and selects something else."""

    name: ClassVar[str] = "contrary"

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        member_GE = torch.zeros(len(scores.live_GL), spec.num_experts, dtype=torch.bool)
        member_GE[:, : self.budget if isinstance(self.budget, int) else 4] = True
        return Coreset(member_GE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Frugal(DesVote):
    """Inherits `select`, and drops more."""

    name: ClassVar[str] = "frugal"

    def keep(self, affinity_TK: Tensor) -> Tensor | None:
        return affinity_TK > 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Undecided(DesVote):
    """Has no numbers for what it does."""

    name: ClassVar[str] = "undecided"

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsaid(CoresetPolicy):
    """Has no recipe."""

    name: ClassVar[str] = "unsaid"


def test_a_recipe_speaks_only_for_the_methods_that_it_knew() -> None:
    spec = plain_spec(8, 2)
    for kind in (Contrary, Frugal, Undecided):
        assert recipe_of(kind(budget=4), spec) is None
    assert recipe_of(DesVote(budget=4), spec) is not None
    assert recipe_of(replace(DesVote(), budget=5), spec) != recipe_of(DesVote(budget=4), spec)
    for plain in (Unsaid(), TokenPolicy()):
        assert recipe_of(plain, spec) is None  # type: ignore[arg-type]


def test_policies_of_the_table_have_a_recipe() -> None:
    """Not demanded of a new one; but these should stay fast."""
    spec = SPECS["sigmoid groups 64"]
    assert len(WITH_RECIPE) >= 8
    for name in WITH_RECIPE:
        assert recipe_of(POLICIES[name]().bind(spec), spec) is not None


@pytest.mark.parametrize(
    "policy", ["des-vote:voters=masked", "block-top-p:voters=masked", "des-seq:reuse=2", "coverage"]
)
def test_what_the_library_is_not_told_of_has_no_recipe(policy: str) -> None:
    spec = SPECS["softmax plain"]
    assert recipe_of(parse_policy(policy).bind(spec), spec) is None
    assert route_layer(inputs(spec, (1, 4, 16)), parse_policy(policy).bind(spec), spec) is None


def test_an_instruction_set_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["softmax plain"]
    step_of_layer = LayerStep.of(*inputs(spec, (1, 4, 16))[1:3], POLICIES["vanilla"](), spec)
    x, _, _, live = inputs(spec, (1, 4, 16))
    assert step_of_layer.route(x, live) is not None
    monkeypatch.setenv("EXPERTSHARE_ISA", "avx9000")
    with pytest.raises(ConfigError, match="avx9000"):
        step_of_layer.route(x, live)


def test_what_was_prepared_ends_with_what_it_was_made_of() -> None:
    """Other weights, a moved bias, another policy or rule: a step of its own."""
    spec = SPECS["sigmoid groups 64"]
    _, weight, bias, _ = inputs(spec, (1, 4, 16))
    assert bias is not None
    policy = POLICIES["vanilla"]()
    made = LayerStep.of(weight, bias, policy, spec)
    assert made.is_of(weight, bias, policy, spec)
    assert not made.is_of(weight.clone(), bias, policy, spec)
    assert not made.is_of(weight, bias.clone(), policy, spec)
    assert not made.is_of(weight, None, policy, spec)
    assert not made.is_of(weight, bias, POLICIES["skip"](), spec)
    assert not made.is_of(weight, bias, policy, replace(spec, scaling=2.0))
    weight.data = weight.data.clone()
    assert not made.is_of(weight, bias, policy, spec)
    assert pickle.loads(pickle.dumps(made)).constants == made.constants


def test_plans_share_nothing() -> None:
    """Memory for plans is made for many at a time: what one holds must not change when others are written."""
    spec = plain_spec(64, 8)
    policy = DesVote(budget=16).bind(spec)
    layers = [inputs(spec, (2, 32, 64), seed=seed) for seed in range(70)]
    routed = [route_layer(layer, policy, spec) for layer in layers]
    for layer, found in zip(layers, routed, strict=True):
        assert found is not None
        plan, load, unique = found
        _, wanted, wanted_load, wanted_unique = in_pieces(layer, policy, spec)
        assert_same_plan(plan, wanted)
        assert torch.equal(load, wanted_load)
        assert torch.equal(unique, wanted_unique)


def test_plans_of_inference_mode_stay_there() -> None:
    spec = plain_spec(64, 8)
    policy = DesVote(budget=16).bind(spec)
    layer = inputs(spec, (1, 32, 64))
    with torch.inference_mode():
        inside = route_layer(layer, policy, spec)
    with torch.no_grad():
        outside = route_layer(layer, policy, spec)
    assert inside is not None
    assert outside is not None
    assert inside[0].weights_TK.is_inference()
    assert not outside[0].weights_TK.is_inference()
    outside[0].weights_TK.add_(1.0)


def test_blanks_of_several_threads_are_different_ones() -> None:
    found: list[blanks.Blank] = []
    with ThreadPoolExecutor(8) as pool:
        for some in pool.map(lambda _: [blanks.blank(8, 2, 16, 1) for _ in range(200)], range(8)):
            found += some
    addresses = [address for one in found for address in one.addresses]
    assert len(set(addresses)) == len(addresses) == 5 * 1600
