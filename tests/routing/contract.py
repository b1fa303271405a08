"""What every policy promises, as checks of (policy, spec, scene). A new policy needs no new check."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.routing import RoutingPolicy, route
from expertshare.types import Coreset, RouterScores, RoutingPlan

from .cases import Scene

Check = Callable[[RoutingPolicy, RouterSpec, Scene], None]


def _route(policy: RoutingPolicy, spec: RouterSpec, scene: Scene, scores: RouterScores) -> tuple[Coreset, RoutingPlan]:
    return route(scores, policy, spec, expert_scale_E=scene.scale_E)


def _pick(scores: RouterScores, groups: Tensor, tokens: Tensor) -> RouterScores:
    parts = (scores.affinity_GLE, scores.choice_GLE, scores.live_GL, scores.masked_GL)
    return RouterScores(*(None if part is None else part[groups][:, tokens].clone() for part in parts))


def _by_group(plan_part_TK: Tensor, scores: RouterScores) -> Tensor:
    return plan_part_TK.reshape(*scores.live_GL.shape, -1)


def assert_same_plan(one: RoutingPlan, other: RoutingPlan) -> None:
    """Bit for bit."""
    assert torch.equal(one.expert_ids_TK, other.expert_ids_TK)
    assert torch.equal(one.weights_TK, other.weights_TK)
    assert torch.equal(one.active_E, other.active_E)


def shapes_and_types(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    coreset, plan = _route(policy, spec, scene, scene.scores)
    groups, length = scene.scores.live_GL.shape
    assert coreset.member_GE.shape == (groups, spec.num_experts)
    assert plan.expert_ids_TK.shape == plan.weights_TK.shape == (groups * length, spec.top_k)
    assert plan.active_E.shape == (spec.num_experts,)
    assert (coreset.member_GE.dtype, plan.active_E.dtype) == (torch.bool, torch.bool)
    assert (plan.expert_ids_TK.dtype, plan.weights_TK.dtype) == (torch.int64, torch.float32)


def coreset_is_large_enough(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    coreset, _ = _route(policy, spec, scene, scene.scores)
    assert (coreset.member_GE.sum(dim=-1) >= spec.min_coreset_size(policy.group_limit)).all()


def plan_is_inside_the_coreset(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    coreset, plan = _route(policy, spec, scene, scene.scores)
    ids = _by_group(plan.expert_ids_TK, scene.scores)
    for group in range(ids.shape[0]):
        used = {e for e in ids[group].flatten().tolist() if e != -1}
        assert used <= set(coreset.member_GE[group].nonzero().flatten().tolist())


def every_live_token_has_its_experts(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    """K distinct experts; at least one where the policy itself lets tokens keep fewer."""
    _, plan = _route(policy, spec, scene, scene.scores)
    rule = policy.rule(spec)
    keeps_all = rule.experts_per_token is None and rule.drop_share is None
    for ids, live in zip(plan.expert_ids_TK.tolist(), scene.scores.live_GL.flatten().tolist(), strict=True):
        used = [e for e in ids if e != -1]
        assert len(set(used)) == len(used)
        if live:
            assert len(used) == spec.top_k if keeps_all else 1 <= len(used) <= spec.top_k


def best_first_and_ties_to_the_lower_id(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    _, plan = _route(policy, spec, scene, scene.scores)
    for ids, choice in zip(plan.expert_ids_TK.tolist(), scene.scores.choice_GLE.flatten(0, 1).tolist(), strict=True):
        ranked = [(-choice[e], e) for e in ids if e != -1]
        assert ranked == sorted(ranked)


def unused_slots_weigh_nothing(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    _, plan = _route(policy, spec, scene, scene.scores)
    dead = ~scene.scores.live_GL.flatten()
    assert (plan.expert_ids_TK[dead] == -1).all()
    assert (plan.weights_TK[plan.expert_ids_TK == -1] == 0).all()
    assert (plan.weights_TK[plan.expert_ids_TK != -1] > 0).all()


def padding_never_votes(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    """Whatever stands in the scores of padding, nothing changes; nor does more padding."""
    scores = scene.scores
    coreset, plan = _route(policy, spec, scene, scores)
    dead = ~scores.live_GL.unsqueeze(-1)
    for extreme in (0.0, 3e38, -3e38, torch.inf):
        row_E = torch.linspace(0, 1, spec.num_experts).gt(0.5).float() * extreme
        row_E = row_E.nan_to_num(0.0, torch.inf, -torch.inf)
        changed = RouterScores(
            torch.where(dead, row_E, scores.affinity_GLE),
            torch.where(dead, row_E, scores.choice_GLE),
            scores.live_GL,
            scores.masked_GL,
        )
        other_coreset, other_plan = _route(policy, spec, scene, changed)
        assert torch.equal(coreset.member_GE, other_coreset.member_GE)
        assert_same_plan(plan, other_plan)
    length = scores.live_GL.shape[1]
    padded = _pick(scores, torch.arange(len(scores.live_GL)), torch.tensor([0, *range(length), 0, 0]))
    padded.live_GL[:, [0, -2, -1]] = False
    other_coreset, other_plan = _route(policy, spec, scene, padded)
    assert torch.equal(coreset.member_GE, other_coreset.member_GE)
    ids = _by_group(other_plan.expert_ids_TK, padded)[:, 1:-2]
    assert torch.equal(ids, _by_group(plan.expert_ids_TK, scores))


def order_of_tokens_does_not_matter(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    scores = scene.scores
    groups, length = scores.live_GL.shape
    order = torch.randperm(length, generator=torch.Generator().manual_seed(length))
    coreset, plan = _route(policy, spec, scene, scores)
    shuffled_coreset, shuffled = _route(policy, spec, scene, _pick(scores, torch.arange(groups), order))
    assert torch.equal(coreset.member_GE, shuffled_coreset.member_GE)
    assert torch.equal(plan.active_E, shuffled.active_E)
    for before, after in (
        (plan.expert_ids_TK, shuffled.expert_ids_TK),
        (plan.weights_TK, shuffled.weights_TK),
    ):
        assert torch.equal(_by_group(before, scores)[:, order], _by_group(after, scores))


def groups_do_not_see_each_other(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    scores = scene.scores
    groups, length = scores.live_GL.shape
    coreset, plan = _route(policy, spec, scene, scores)
    for group in range(groups):
        own = _pick(scores, torch.tensor([group]), torch.arange(length))
        own_coreset, own_plan = _route(policy, spec, scene, own)
        assert torch.equal(coreset.member_GE[group], own_coreset.member_GE[0])
        assert torch.equal(_by_group(plan.expert_ids_TK, scores)[group], own_plan.expert_ids_TK)
        assert torch.equal(_by_group(plan.weights_TK, scores)[group], own_plan.weights_TK)


def pure_and_repeatable(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    scores = scene.scores
    groups, length = scores.live_GL.shape
    kept = _pick(scores, torch.arange(groups), torch.arange(length))
    scale = None if scene.scale_E is None else scene.scale_E.clone()
    coreset, plan = _route(policy, spec, scene, scores)
    again_coreset, again_plan = _route(policy, spec, scene, scores)
    assert torch.equal(coreset.member_GE, again_coreset.member_GE)
    assert_same_plan(plan, again_plan)
    for now, before in zip(
        (scores.affinity_GLE, scores.choice_GLE, scores.live_GL),
        (kept.affinity_GLE, kept.choice_GLE, kept.live_GL),
        strict=True,
    ):
        assert torch.equal(now, before)
    assert scale is None or (scene.scale_E is not None and torch.equal(scale, scene.scale_E))


def active_is_the_union_of_the_plan(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    _, plan = _route(policy, spec, scene, scene.scores)
    union = {e for e in plan.expert_ids_TK.flatten().tolist() if e != -1}
    assert set(plan.active_E.nonzero().flatten().tolist()) == union


def route_is_select_then_assign(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    coreset, plan = _route(policy, spec, scene, scene.scores)
    selected = policy.select(scene.scores, spec)
    assert torch.equal(coreset.member_GE, selected.member_GE)
    assert_same_plan(plan, policy.assign(scene.scores, selected, spec, scene.scale_E))


def ties_go_to_the_lower_id(policy: RoutingPolicy, spec: RouterSpec, scene: Scene) -> None:
    """Where nobody prefers anything, coreset and plan are the first experts, in order."""
    level = torch.full_like(scene.scores.choice_GLE, 0.25)
    scores = RouterScores(level, level, torch.ones_like(scene.scores.live_GL))
    coreset, plan = _route(policy, spec, scene, scores)
    for row in coreset.member_GE:
        assert row.nonzero().flatten().tolist() == list(range(int(row.sum())))
    for ids in plan.expert_ids_TK.tolist():
        used = [e for e in ids if e != -1]
        assert ids == [*range(len(used)), *[-1] * (spec.top_k - len(used))]


CHECKS: tuple[Check, ...] = (
    shapes_and_types,
    coreset_is_large_enough,
    plan_is_inside_the_coreset,
    every_live_token_has_its_experts,
    best_first_and_ties_to_the_lower_id,
    unused_slots_weigh_nothing,
    padding_never_votes,
    order_of_tokens_does_not_matter,
    groups_do_not_see_each_other,
    pure_and_repeatable,
    active_is_the_union_of_the_plan,
    route_is_select_then_assign,
    ties_go_to_the_lower_id,
)
