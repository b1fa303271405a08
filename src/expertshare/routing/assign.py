"""From a coreset to a plan: the model's own routing rule, applied inside the experts that a block shares."""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from expertshare.config import GroupLimit, RouterSpec
from expertshare.routing import compiled
from expertshare.routing.ranking import top_k_ids, top_k_mask
from expertshare.types import Coreset, RouterScores, RoutingPlan, RoutingPolicy

_NEVER = float("-inf")


def router_scores(logits_GLE: Tensor, live_GL: Tensor, spec: RouterSpec, bias_E: Tensor | None) -> RouterScores:
    """Turn router logits (any float dtype, [G, L, E]) into scores in float32."""
    logits = logits_GLE.float()
    affinity = logits.softmax(dim=-1) if spec.activation == "softmax" else logits.sigmoid()
    choice = affinity if bias_E is None else affinity + bias_E.float()
    return RouterScores(affinity, choice, live_GL)


def everything(scores: RouterScores) -> Coreset:
    """The coreset of all experts, under which routing is the model's own."""
    groups, _, experts = scores.choice_GLE.shape
    return Coreset(torch.ones(groups, experts, dtype=torch.bool, device=scores.choice_GLE.device))


def limit_to_groups(choice_xE: Tensor, spec: RouterSpec) -> Tensor:
    """Set to -inf what the group limit puts out of a token's reach. choice_xE: float32 [..., E], -inf allowed.

    A group scores the sum of its two best experts; a group with fewer than two usable experts scores -inf, and among
    equals the lower group wins (LLaDA2's router, models-and-decoding rules).
    """
    if spec.kept_groups == spec.num_groups:
        return choice_xE
    grouped = choice_xE.reshape(*choice_xE.shape[:-1], spec.num_groups, spec.group_size)
    best_two = grouped.topk(min(2, spec.group_size), dim=-1).values
    kept = top_k_mask(best_two.sum(dim=-1), spec.kept_groups)
    return grouped.masked_fill(~kept.unsqueeze(-1), _NEVER).flatten(-2)


def token_choice(scores: RouterScores, spec: RouterSpec, coreset: Coreset | None, group_limit: GroupLimit) -> Tensor:
    """Ranking scores of each token over the experts within its reach, -inf elsewhere: float32 [G, L, E]."""
    choice = scores.choice_GLE.detach()
    if coreset is not None:
        choice = choice.masked_fill(~coreset.member_GE.unsqueeze(1), _NEVER)
    return limit_to_groups(choice, spec) if group_limit == "inside" else choice


def reach_limit(spec: RouterSpec, group_limit: GroupLimit) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may reach: one of one where there is no limit."""
    limited = group_limit == "inside" and spec.kept_groups < spec.num_groups
    return (spec.num_groups, spec.kept_groups) if limited else (1, 1)


def assign(
    scores: RouterScores,
    coreset: Coreset,
    spec: RouterSpec,
    *,
    policy: RoutingPolicy,
    expert_scale_E: Tensor | None = None,
) -> RoutingPlan:
    """Give every live token its K best experts inside its group's coreset, weighted by the model's own rule.

    Gradients flow to the router through the weights only. A token that cannot reach K experts leaves slots unused;
    it never leaves the coreset.
    """
    masks = (scores.live_GL, coreset.member_GE)
    library = compiled.library_for(scores.affinity_GLE, scores.choice_GLE, masks=masks)
    with_gradients = torch.is_grad_enabled() and scores.affinity_GLE.requires_grad
    if library is None or with_gradients:
        plan = _assign_by_torch(scores, coreset, spec, policy)
    else:
        plan = _assign_compiled(library, scores, coreset, spec, policy)
    if expert_scale_E is None:
        return plan
    scale_TK = expert_scale_E.float()[plan.expert_ids_TK.clamp_min(0)]  # an unused slot weighs 0 in any case
    return RoutingPlan(plan.expert_ids_TK, plan.weights_TK * scale_TK, plan.active_E)


def _assign_compiled(
    library: CDLL, scores: RouterScores, coreset: Coreset, spec: RouterSpec, policy: RoutingPolicy
) -> RoutingPlan:
    limit = reach_limit(spec, policy.group_limit)
    ids_TK, affinity_TK = compiled.choose(
        library, scores.choice_GLE, scores.affinity_GLE, scores.live_GL, coreset.member_GE, spec.top_k, limit
    )
    weights_TK, active_E = compiled.weigh(
        library,
        ids_TK,
        affinity_TK,
        policy.keep(affinity_TK),
        spec.num_experts,
        renormalise=spec.renormalise,
        scaling=spec.scaling,
    )
    return RoutingPlan(ids_TK, weights_TK, active_E)


def _assign_by_torch(scores: RouterScores, coreset: Coreset, spec: RouterSpec, policy: RoutingPolicy) -> RoutingPlan:
    reachable = token_choice(scores, spec, coreset, policy.group_limit).flatten(0, 1)
    ids_TK = top_k_ids(reachable, spec.top_k)
    used_TK = reachable.gather(-1, ids_TK) > _NEVER
    used_TK = used_TK & scores.live_GL.flatten().unsqueeze(-1)
    affinity_TK = scores.affinity_GLE.flatten(0, 1).gather(-1, ids_TK)
    kept_TK = policy.keep(affinity_TK.detach().masked_fill(~used_TK, 0.0))
    if kept_TK is not None:
        used_TK = used_TK & kept_TK
    weights_TK = _weights(affinity_TK.masked_fill(~used_TK, 0.0), spec)
    ids_TK = ids_TK.masked_fill(~used_TK, -1)
    active = torch.zeros(spec.num_experts + 1, dtype=torch.bool, device=ids_TK.device)
    active = active.index_fill(0, (ids_TK + 1).flatten(), True)[1:]
    return RoutingPlan(ids_TK, weights_TK, active)


def _weights(affinity_TK: Tensor, spec: RouterSpec) -> Tensor:
    if spec.renormalise:
        affinity_TK = affinity_TK / (affinity_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return affinity_TK if spec.scaling == 1.0 else affinity_TK * spec.scaling


def count_load(plan: RoutingPlan, num_groups: int) -> tuple[Tensor, Tensor]:
    """What a plan asks for: (token, expert) pairs per expert, int64 [E]; unique experts per group, int64 [G]."""
    num_experts = len(plan.active_E)
    library = compiled.library_for(ids=(plan.expert_ids_TK,))
    if library is not None:
        return compiled.count_load(library, plan.expert_ids_TK, num_groups, num_experts)
    slots = plan.expert_ids_TK + 1  # 0 collects the unused ones
    load = torch.zeros(num_experts + 1, dtype=torch.int64, device=slots.device)
    load = load.scatter_add_(0, slots.flatten(), torch.ones_like(slots).flatten())
    used = torch.zeros(num_groups, num_experts + 1, dtype=torch.bool, device=slots.device)
    used = used.scatter_(1, slots.view(num_groups, -1), True)
    return load[1:], used[:, 1:].sum(dim=1)


def _renew(previous: Coreset, scores: RouterScores, policy: RoutingPolicy, spec: RouterSpec) -> Coreset:
    """Select for the groups without members."""
    has_one_G1 = previous.member_GE.any(dim=1, keepdim=True)
    if bool(has_one_G1.all()):
        return previous
    chosen = policy.select(scores, spec, previous)
    return Coreset(torch.where(has_one_G1, previous.member_GE, chosen.member_GE))


def route(
    scores: RouterScores,
    policy: RoutingPolicy,
    spec: RouterSpec,
    *,
    previous: Coreset | None = None,
    expert_scale_E: Tensor | None = None,
) -> tuple[Coreset, RoutingPlan]:
    """Select a coreset, then assign inside it: the whole of expert sharing, for inference and training alike.

    previous: a group whose row has members keeps them; one whose row is empty selects anew.
    """
    coreset = policy.select(scores, spec) if previous is None else _renew(previous, scores, policy, spec)
    return coreset, assign(scores, coreset, spec, policy=policy, expert_scale_E=expert_scale_E)
