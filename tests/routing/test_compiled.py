"""The native primitives of routing against the torch code beside them: the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertshare import native
from expertshare.routing import POLICIES, assign, compiled, count_load, route, router_scores
from expertshare.routing.ballots import ballots, election, highest, tally
from expertshare.routing.ranking import top_k_ids, top_k_mask
from expertshare.routing.shares import drop_lightest, shortest_prefix
from expertshare.types import Coreset, RouterScores, RoutingPlan

from .cases import SPECS, plain_spec, policy_settings, scenes
from .contract import assert_same_plan

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

AWKWARD = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, -3.4e38, -torch.inf])


@contextmanager
def by_torch() -> Iterator[None]:
    """The oracle: as if there were no library."""
    with patch.object(compiled, "library_for", lambda *_, **__: None):
        yield


def both(compute: Callable[[], Any]) -> tuple[Any, Any]:
    """What the library gives and what torch gives."""
    with patch.object(compiled, "library_for", wraps=compiled.library_for) as asked:
        fast = compute()
    assert asked.called
    with by_torch():
        return fast, compute()


def scores_of(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Many ties, few ties, or awkward values; sums of the first two kinds are exact."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(("few levels", "many levels", "awkward")))
    if kind == "awkward":
        return AWKWARD[torch.randint(0, len(AWKWARD), shape, generator=generator)]
    levels = 3 if kind == "few levels" else 4096
    return torch.randint(-levels, levels, shape, generator=generator).float() / 64


@st.composite
def rankings(draw: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    """Rows of scores, how many to take, and who goes in front."""
    rows, experts = draw(st.integers(1, 5)), draw(st.sampled_from((1, 2, 7, 16, 17, 64, 100, 256)))
    score = scores_of(draw, (rows, experts))
    front = torch.rand(rows, experts, generator=torch.Generator().manual_seed(experts)) < draw(st.floats(0, 1))
    return score, draw(st.integers(1, experts)), front


@given(rankings())
def test_rankings(ranking: tuple[Tensor, int, Tensor]) -> None:
    score, k, front = ranking
    for compute in (
        lambda: top_k_ids(score, k),
        lambda: top_k_mask(score, k),
        lambda: top_k_mask(score, k, front),
        lambda: top_k_ids(score.unsqueeze(1), k),
        lambda: top_k_mask(score.t(), min(k, len(score))),  # not contiguous
    ):
        fast, exact = both(compute)
        assert fast.dtype == exact.dtype
        assert torch.equal(fast, exact)


@given(rankings(), st.sampled_from((0.125, 0.5, 0.6, 1.0)))
def test_cuts_at_a_share(ranking: tuple[Tensor, int, Tensor], share: float) -> None:
    score = ranking[0].clamp(-64, 64)
    assert torch.equal(*both(lambda: shortest_prefix(score, share)))
    weights = score[:, :16].clamp_min(0)
    assert torch.equal(*both(lambda: drop_lightest(weights, share)))


@pytest.mark.parametrize("spec_name", SPECS)
@settings(max_examples=25)
@given(st.data())
def test_votes(spec_name: str, data: st.DataObject) -> None:
    spec = SPECS[spec_name]
    scores = data.draw(scenes(spec)).scores
    k = data.draw(st.integers(1, spec.top_k))
    for kind in ("ungrouped", "grouped"):
        cast, exact = both(lambda kind=kind: ballots(scores, spec, k, kind))  # type: ignore[misc]
        assert torch.equal(cast, exact)
        assert torch.equal(*both(lambda cast=cast: tally(scores, cast)))  # type: ignore[misc]
        for one, other in zip(*both(lambda kind=kind: election(scores, spec, kind, k)), strict=True):  # type: ignore[misc]
            assert torch.equal(one, other)
    assert torch.equal(*both(lambda: highest(scores)))


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("policy_name", POLICIES)
@settings(max_examples=8)
@given(st.data())
def test_policies(policy_name: str, spec_name: str, data: st.DataObject) -> None:
    """Sums of these scores are exact, so weights too have one right answer."""
    spec = SPECS[spec_name]
    policy = data.draw(st.sampled_from(policy_settings(POLICIES[policy_name], spec)))
    scene = data.draw(scenes(spec))
    fast, exact = both(lambda: route(scene.scores, policy, spec, expert_scale_E=scene.scale_E))
    assert torch.equal(fast[0].member_GE, exact[0].member_GE)
    assert_same_plan(fast[1], exact[1])
    groups = len(scene.scores.live_GL)
    for one, other in zip(*both(lambda: count_load(fast[1], groups)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec_name", SPECS)
@settings(max_examples=25)
@given(st.data())
def test_any_coreset(spec_name: str, data: st.DataObject) -> None:
    """Coresets too small for K experts, or empty, leave slots unused in the same places."""
    spec = SPECS[spec_name]
    scores = data.draw(scenes(spec)).scores
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    share = data.draw(st.sampled_from((0.0, 0.05, 0.3, 0.9)))
    member = torch.rand(len(scores.live_GL), spec.num_experts, generator=generator) < share
    policy = POLICIES["vanilla"]()
    assert_same_plan(*both(lambda: assign(scores, Coreset(member), spec, policy=policy)))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 31, 40])
def test_weights_of_ordinary_scores(top_k: int) -> None:
    """To the last bit where torch's order of summation is followed, within some units of it beyond."""
    spec = plain_spec(64, top_k, renormalise=True, scaling=2.5)
    logits = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(top_k))
    scores = router_scores(logits, torch.ones(3, 50, dtype=torch.bool), spec, None)
    fast, exact = both(lambda: route(scores, POLICIES["vanilla"](), spec)[1])
    assert torch.equal(fast.expert_ids_TK, exact.expert_ids_TK)
    same_order = top_k <= 31 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    torch.testing.assert_close(fast.weights_TK, exact.weights_TK, rtol=0.0 if same_order else 5e-7, atol=0.0)


def test_strides_do_not_matter() -> None:
    spec = SPECS["sigmoid groups 64"]
    affinity = torch.rand(2, 7, 64, generator=torch.Generator().manual_seed(0))
    live = torch.ones(2, 7, dtype=torch.bool)
    plain = RouterScores(affinity, affinity - 0.5, live)
    spread = RouterScores(*(torch.stack([t, t], dim=-1)[..., 0] for t in (affinity, affinity - 0.5, live)))
    assert not spread.choice_GLE.is_contiguous()
    for policy_name in POLICIES:
        policy = POLICIES[policy_name]().bind(spec)
        assert_same_plan(route(plain, policy, spec)[1], route(spread, policy, spec)[1])


def test_no_tokens() -> None:
    spec = SPECS["softmax plain"]
    scores = router_scores(torch.zeros(0, 4, 64), torch.ones(0, 4, dtype=torch.bool), spec, None)
    fast, exact = both(lambda: route(scores, POLICIES["vanilla"](), spec)[1])
    assert_same_plan(fast, exact)
    assert not any(part.any() for part in count_load(fast, 0))


def test_what_the_library_does_not_take_is_left_to_torch() -> None:
    scores = torch.rand(2, 8)
    assert compiled.library_for(scores, masks=(scores > 0,)) is not None
    assert compiled.library_for(scores.double()) is None
    assert compiled.library_for(scores.to("meta")) is None
    assert compiled.library_for(scores, masks=(scores,)) is None


def test_training_stays_with_torch() -> None:
    spec = SPECS["softmax renormalised"]
    logits = torch.randn(1, 5, 128, requires_grad=True)

    def plan() -> RoutingPlan:
        return route(
            router_scores(logits, torch.ones(1, 5, dtype=torch.bool), spec, None), POLICIES["vanilla"](), spec
        )[1]

    assert plan().weights_TK.requires_grad
    with torch.no_grad():
        assert not plan().weights_TK.requires_grad
