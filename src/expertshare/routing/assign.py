"""From a coreset to a plan: the model's own routing rule, applied inside the experts that a group shares."""

from __future__ import annotations

import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.routing.ranking import top_k_ids
from expertshare.routing.rule import SharingRule
from expertshare.routing.select import NEVER, limit_to_groups
from expertshare.types import Coreset, RouterScores, RoutingPlan


def assign(
    scores: RouterScores, coreset: Coreset, rule: SharingRule, spec: RouterSpec, *, expert_scale_E: Tensor | None = None
) -> RoutingPlan:
    """Give every live token its K best experts inside its group's coreset, or those of them that the rule keeps.

    Weighted by the model's own rule; expert_scale_E: a factor for each expert on top, where the model has one.
    Gradients flow to the router through the weights only. A token that cannot reach K experts leaves slots unused;
    it never leaves the coreset.
    """
    choice_GLE = scores.choice_GLE.detach().masked_fill(~coreset.member_GE.unsqueeze(1), NEVER)
    if rule.group_limit == "inside":
        choice_GLE = limit_to_groups(choice_GLE, spec)
    reach_TE = choice_GLE.flatten(0, 1)
    ids_TK = top_k_ids(reach_TE, spec.top_k)
    used_TK = (reach_TE.gather(-1, ids_TK) > NEVER) & scores.live_GL.flatten().unsqueeze(-1)
    affinity_TK = scores.affinity_GLE.flatten(0, 1).gather(-1, ids_TK).masked_fill(~used_TK, 0.0)
    kept_TK = used_TK & kept_experts(affinity_TK.detach(), rule)
    return weighted_plan(ids_TK, affinity_TK, kept_TK, spec, expert_scale_E)


def kept_experts(affinity_TK: Tensor, rule: SharingRule) -> Tensor:
    """Which of a token's experts (best first, their affinity or 0) it keeps: bool [T, K]."""
    kept_TK = torch.ones_like(affinity_TK, dtype=torch.bool)
    if rule.experts_per_token is not None:
        kept_TK[:, rule.experts_per_token :] = False
    if rule.drop_share is not None:
        kept_TK = kept_TK & drop_lightest(affinity_TK.masked_fill(~kept_TK, 0.0), rule.drop_share)
    return kept_TK


def drop_lightest(weight_TK: Tensor, share: float) -> Tensor:
    """All but the lightest of each row, whose cumulative share of the row's sum stays under `share`: bool [T, K].

    The heaviest stays in any case. Of equals the one that ranks last goes first, so that ties stay with the lower id.
    """
    num_slots = weight_TK.shape[-1]
    mass_TK = weight_TK.double()
    shares_TK = mass_TK / mass_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    order_TK = num_slots - 1 - shares_TK.flip(-1).argsort(dim=-1, stable=True)
    kept_TK = shares_TK.gather(-1, order_TK).cumsum(dim=-1) >= share
    kept_TK[..., -1] = True
    return torch.empty_like(kept_TK).scatter_(-1, order_TK, kept_TK)


def weighted_plan(
    ids_TK: Tensor, affinity_TK: Tensor, used_TK: Tensor, spec: RouterSpec, expert_scale_E: Tensor | None = None
) -> RoutingPlan:
    """The plan of these experts, weighted by the model's rule. used_TK: bool, False leaves a slot unused."""
    weights_TK = affinity_TK.masked_fill(~used_TK, 0.0)
    if spec.renormalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    if spec.scaling != 1.0:
        weights_TK = weights_TK * spec.scaling
    if expert_scale_E is not None:
        weights_TK = weights_TK * expert_scale_E.float()[ids_TK]
    ids_TK = ids_TK.masked_fill(~used_TK, -1)
    active = torch.zeros(spec.num_experts + 1, dtype=torch.bool, device=ids_TK.device)  # place 0 for unused slots
    return RoutingPlan(ids_TK, weights_TK, active.index_fill(0, (ids_TK + 1).flatten(), True)[1:])
