"""A layer's router plans the same in one native call as in pieces, and follows its weights and its policy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from expertshare import native
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.kernels.cpu_route import _prepared, router_scores_cpu, takes
from expertshare.lab.bench.cases import CASES
from expertshare.models.moe import Router, lay_side_by_side, narrow
from expertshare.routing import POLICIES, RoutingPolicy, count_load, router_scores
from expertshare.routing.route import routed
from expertshare.types import Routed

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

CONFIG = CASES["llada2.0-mini"].config
SPEC = CONFIG.router


def make_router(seed: int) -> Router:
    torch.manual_seed(seed)
    router = Router(CONFIG).requires_grad_(False)
    router.weight.normal_(std=0.02)
    assert router.bias is not None
    router.bias.normal_(std=0.01)
    return router


def planned(router: Router, policy: RoutingPolicy, x: Tensor, live: Tensor) -> Routed:
    return CpuBackend().route(x, router.weight, router.bias, policy, SPEC, live)


def assert_as_in_pieces(router: Router, policy: RoutingPolicy, x: Tensor, live: Tensor) -> None:
    routing = planned(router, policy, x, live)
    plan = routing.plan
    if takes(x, router.weight, router.bias):
        scores = router_scores_cpu(x, router.weight, router.bias, live, SPEC)
    else:
        scores = router_scores(router(x), live, SPEC, router.bias)
    expected = routed(scores, policy, SPEC, None).plan
    assert torch.equal(plan.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(plan.weights_TK, expected.weights_TK)
    assert torch.equal(plan.active_E, expected.active_E)
    load_E, unique_G = count_load(expected, len(live))
    assert torch.equal(routing.load_E, load_E)
    assert torch.equal(routing.group_experts_G, unique_G)


def test_it_follows_policy_and_weights() -> None:
    """What it prepared for the last call is no use for a policy, weights or a bias that are others."""
    router = make_router(0)
    x, live = torch.randn(2, 8, CONFIG.hidden_size), torch.rand(2, 8) > 0.2
    for name in (*POLICIES, "vanilla"):
        assert_as_in_pieces(router, POLICIES[name]().bind(SPEC), x, live)
    vanilla = POLICIES["vanilla"]()
    assert router.bias is not None
    for change in (
        lambda: router.weight.normal_(std=0.03),
        lambda: setattr(router.weight, "data", torch.randn_like(router.weight) * 0.02),
        lambda: setattr(router, "bias", torch.randn(SPEC.num_experts) * 0.02),
        lambda: router.load_state_dict(make_router(3).state_dict()),
        lambda: router.load_state_dict(make_router(4).state_dict(), assign=True),
        lambda: router.bfloat16(),
        lambda: router.float(),
    ):
        change()
        assert_as_in_pieces(router, vanilla, x, live)
    other = copy.deepcopy(router)
    other.weight.mul_(-1)
    assert_as_in_pieces(other, vanilla, x, live)
    assert_as_in_pieces(router, vanilla, x, live)


def test_weights_are_kept_in_bfloat16_only_where_that_loses_nothing() -> None:
    routers = [make_router(seed) for seed in range(2)]
    narrow(routers)
    assert all(router.weight.dtype == torch.float32 for router in routers)
    for router in routers:
        router.weight.copy_(router.weight.bfloat16())
    before = [router.weight.clone() for router in routers]
    x, live = torch.randn(2, 8, CONFIG.hidden_size).bfloat16(), torch.rand(2, 8) > 0.2
    narrow(routers)
    for router, weight in zip(routers, before, strict=True):
        assert router.weight.dtype == torch.bfloat16
        assert torch.equal(router.weight.float(), weight)
        assert torch.equal(router(x), torch.nn.functional.linear(x.float(), weight))
        for name in POLICIES:
            assert_as_in_pieces(router, POLICIES[name]().bind(SPEC), x, live)
    narrow([])


def test_policies_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared once for each of them, in whatever order they come, and for no endless number of them."""
    _prepared.clear()
    monkeypatch.setattr("expertshare.kernels.cpu_route._MOST_PREPARED", 16)
    router = make_router(2)
    x, live = torch.randn(1, 8, CONFIG.hidden_size), torch.ones(1, 8, dtype=torch.bool)
    policies = [POLICIES["des-vote"](budget=budget).bind(SPEC) for budget in range(12, 52)]
    for _ in range(2):
        for policy in policies[:5]:
            assert_as_in_pieces(router, policy, x, live)
    for policy in policies:
        assert_as_in_pieces(router, policy, x, live)
    assert len(_prepared) <= 16


def test_training_stays_with_torch() -> None:
    router = make_router(1).requires_grad_(True)
    x, live = torch.randn(1, 8, CONFIG.hidden_size), torch.ones(1, 8, dtype=torch.bool)
    assert planned(router, POLICIES["vanilla"](), x, live).plan.weights_TK.requires_grad
    with torch.no_grad():
        assert not planned(router, POLICIES["vanilla"](), x, live).plan.weights_TK.requires_grad


def test_routers_side_by_side() -> None:
    """Views of one piece of memory, that are parameters like others; none on another device, and none of none."""
    routers = [make_router(seed) for seed in range(3)]
    lay_side_by_side(routers)
    addresses = [router.weight.data_ptr() for router in routers]
    assert addresses == [addresses[0] + place * routers[0].weight.nbytes for place in range(3)]
    with torch.no_grad():
        for value, router in enumerate(routers):
            router.weight.fill_(value)
    assert [float(router.weight.mean()) for router in routers] == [0.0, 1.0, 2.0]
    assert not any(router.weight.requires_grad for router in routers)
    assert list(routers[0].state_dict()) == ["weight", "bias"]
    with torch.device("meta"):
        absent = Router(CONFIG)
    lay_side_by_side([absent])
    assert absent.weight.is_meta
    lay_side_by_side([])
