"""One layer's routing in torch: router scores, a coreset for each group, the plan inside it, and what it asks for."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.routing.policy import RoutingPolicy
from expertshare.types import Coreset, Routed, RouterScores, RoutingPlan


def router_scores(logits_GLE: Tensor, live_GL: Tensor, spec: RouterSpec, bias_E: Tensor | None) -> RouterScores:
    """Turn router logits (any float dtype, [G, L, E]) into scores in float32."""
    logits = logits_GLE.float()
    affinity = logits.softmax(dim=-1) if spec.activation == "softmax" else logits.sigmoid()
    choice = affinity if bias_E is None else affinity + bias_E.float()
    return RouterScores(affinity, choice, live_GL)


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
    coreset = policy.select(scores, spec, previous) if previous is None else _renewed(previous, scores, policy, spec)
    return coreset, policy.assign(scores, coreset, spec, expert_scale_E)


def _renewed(previous: Coreset, scores: RouterScores, policy: RoutingPolicy, spec: RouterSpec) -> Coreset:
    """Select for the groups without members."""
    has_one_G1 = previous.member_GE.any(dim=1, keepdim=True)
    if bool(has_one_G1.all()):
        return previous
    chosen = policy.select(scores, spec, previous)
    return Coreset(torch.where(has_one_G1, previous.member_GE, chosen.member_GE))


def route_layer(
    x_GLD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    policy: RoutingPolicy,
    spec: RouterSpec,
    live_GL: Tensor,
    *,
    masked_GL: Tensor | None = None,
    previous: Coreset | None = None,
) -> Routed:
    """From a layer's hidden states to its plan, by torch on any device: what the fast implementations must equal.

    x_GLD: any float dtype; weight_ED, bias_E: the router's, used in float32 whatever autocast says. live_GL: bool,
    False is padding. masked_GL: bool, tokens still to be decided, None for none. previous: as in `route`.
    """
    with torch.autocast(x_GLD.device.type, enabled=False):
        logits_GLE = F.linear(x_GLD.float(), weight_ED.float())
    scores = replace(router_scores(logits_GLE, live_GL, spec, bias_E), masked_GL=masked_GL)
    return routed(scores, policy, spec, previous)


def routed(scores: RouterScores, policy: RoutingPolicy, spec: RouterSpec, previous: Coreset | None) -> Routed:
    """`route`, and what the plan asks of the experts."""
    coreset, plan = route(scores, policy, spec, previous=previous)
    return Routed(plan, *count_load(plan, len(scores.live_GL)), coreset)


def count_load(plan: RoutingPlan, num_groups: int) -> tuple[Tensor, Tensor]:
    """What a plan asks for: (token, expert) pairs per expert, int64 [E]; unique experts per group, int64 [G]."""
    num_experts = len(plan.active_E)
    slots = plan.expert_ids_TK + 1  # 0 collects the unused ones
    load = torch.zeros(num_experts + 1, dtype=torch.int64, device=slots.device)
    load = load.scatter_add_(0, slots.flatten(), torch.ones_like(slots).flatten())
    used = torch.zeros(num_groups, num_experts + 1, dtype=torch.bool, device=slots.device)
    used = used.scatter_(1, slots.view(num_groups, -1), True)
    return load[1:], used[:, 1:].sum(dim=1)
