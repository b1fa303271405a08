"""From the scores of a sharing group to its coreset: the torch code that defines what a SharingRule means."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.routing.ranking import top_k_ids, top_k_mask
from expertshare.routing.rule import Ballots, SharingRule, Voters
from expertshare.types import Coreset, RouterScores

NEVER = float("-inf")
UNITS_OF_MASS = 2.0**32
"""In an affinity of 1: sums of whole units are exact in float64, in any order."""


def select(scores: RouterScores, rule: SharingRule, spec: RouterSpec) -> Coreset:
    """The experts that each group shares under the rule, from the scores of its live tokens."""
    if rule.ranking == "all":
        return everything(scores)
    voting = only_voters(scores, rule.voters)
    if rule.ranking == "highest":
        return Coreset(top_k_mask(highest(voting), rule.size))
    cast_GLE = ballots(voting, spec, spec.top_k, rule.ballots)
    if rule.ranking == "coverage":
        assert rule.saturation is not None
        return Coreset(greedy_cover(mass_of_ballots(voting, cast_GLE), rule.saturation, rule.size))
    votes_GE = tally(voting, cast_GLE)
    protected_GE = ballots(voting, spec, rule.protected, rule.ballots).any(dim=1) if rule.protected else None
    member_GE = top_k_mask(votes_GE, rule.size, protected_GE)
    if protected_GE is not None and rule.keep_protected:
        member_GE = member_GE | protected_GE
    if rule.prefix_share is not None:
        member_GE = member_GE | shortest_prefix(votes_GE, rule.prefix_share)
    return Coreset(member_GE)


def everything(scores: RouterScores) -> Coreset:
    """The coreset of all experts, under which routing is the model's own."""
    groups, _, experts = scores.choice_GLE.shape
    return Coreset(torch.ones(groups, experts, dtype=torch.bool, device=scores.choice_GLE.device))


def only_voters(scores: RouterScores, voters: Voters) -> RouterScores:
    """The scores with every token that does not vote marked as padding.

    voters "masked": those still to be decided; a group without one (prefill, commit) lets all its live tokens vote.
    """
    if voters == "all" or scores.masked_GL is None:
        return scores
    masked_GL = scores.live_GL & scores.masked_GL
    return replace(scores, live_GL=torch.where(masked_GL.any(dim=1, keepdim=True), masked_GL, scores.live_GL))


def ballots(scores: RouterScores, spec: RouterSpec, k: int, kind: Ballots) -> Tensor:
    """Which experts each live token votes for, its `k` best (at most K): bool [G, L, E]. Padding votes for none."""
    reach_GLE = scores.choice_GLE.detach()
    if kind == "grouped":
        reach_GLE = limit_to_groups(reach_GLE, spec)
    cast_GLE = top_k_mask(reach_GLE, min(k, spec.top_k)) & (reach_GLE > NEVER)
    return cast_GLE & scores.live_GL.unsqueeze(-1)


def limit_to_groups(choice_xE: Tensor, spec: RouterSpec) -> Tensor:
    """Set to -inf what the model's group limit puts out of a token's reach. choice_xE: float32 [..., E], -inf allowed.

    A group of experts scores the sum of its two best experts; a group with fewer than two usable ones scores -inf, and
    among equals the lower group wins (LLaDA2's router).
    """
    if spec.kept_groups == spec.num_groups:
        return choice_xE
    grouped = choice_xE.reshape(*choice_xE.shape[:-1], spec.num_groups, spec.group_size)
    best_two = grouped.topk(min(2, spec.group_size), dim=-1).values
    kept = top_k_mask(best_two.sum(dim=-1), spec.kept_groups)
    return grouped.masked_fill(~kept.unsqueeze(-1), NEVER).flatten(-2)


def tally(scores: RouterScores, cast_GLE: Tensor) -> Tensor:
    """Sum of the choice scores of the ballots cast: float32 [G, E], -inf where nobody voted.

    The sum may be negative where the balancing bias is; an expert with a vote still ranks before one without. It is
    taken in float64, where adding up float32 scores rounds nothing, so that the order of the tokens does not matter.
    """
    votes_GE = scores.choice_GLE.detach().masked_fill(~cast_GLE, 0.0).sum(dim=1, dtype=torch.float64).float()
    return votes_GE.masked_fill(~cast_GLE.any(dim=1), NEVER)


def highest(scores: RouterScores) -> Tensor:
    """The highest choice score that a live token of the group gives: float32 [G, E], -inf where none is live."""
    return scores.choice_GLE.detach().masked_fill(~scores.live_GL.unsqueeze(-1), NEVER).amax(dim=1)


def shortest_prefix(score_GE: Tensor, share: float) -> Tensor:
    """Members of each row's ranking until their cumulative share passes `share`, the first past it included.

    score_GE: float32, -inf for those that are never members. Scores below 0 have no mass; where no score is positive
    there is no share to cut at, and with a share of 1 there is nothing to cut: then all are members. Masses are added
    up in float64. Returns bool.
    """
    order_GE = top_k_ids(score_GE, score_GE.shape[-1])
    sorted_GE = score_GE.gather(-1, order_GE)
    mass_GE = sorted_GE.clamp_min(0.0).double()
    upto_GE = mass_GE.cumsum(dim=-1)
    member_GE = sorted_GE > NEVER
    if share != 1.0:  # else all of them, whatever the rounding of the sum
        member_GE = member_GE & (upto_GE - mass_GE <= share * upto_GE[..., -1:])
    return torch.empty_like(member_GE).scatter_(-1, order_GE, member_GE)


def mass_of_ballots(scores: RouterScores, cast_GLE: Tensor) -> Tensor:
    """The affinity that each token gives the experts of its ballot, in whole UNITS_OF_MASS: float64 [G, L, E].

    NaN counts as 0: it would beat and equal nothing, itself included, so that there would be no best expert to take.
    """
    mass_GLE = (scores.affinity_GLE.detach().double() * UNITS_OF_MASS).round().nan_to_num(nan=0.0)
    return mass_GLE.masked_fill(~cast_GLE, 0.0)


def greedy_cover(mass_GLE: Tensor, saturation: float, size: int) -> Tensor:
    """Membership (bool [G, E]) of the `size` experts that cover most, taken one by one; ties go to the lower id.

    mass_GLE: float64, whole numbers, 0 where a token does not vote. Sums of them are exact, so that neither the order
    of the tokens nor the other groups matter. A token that has the share `saturation` of its mass in the coreset adds
    nothing more; once all have, the experts with most mass are taken.
    """
    mass_GLE = mass_GLE.clone()
    experts_E = torch.arange(mass_GLE.shape[2], device=mass_GLE.device)
    member_GE = torch.zeros(mass_GLE.shape[::2], dtype=torch.bool, device=mass_GLE.device)
    votes_GE = mass_GLE.sum(dim=1)
    wanted_GL1 = (mass_GLE.sum(dim=2, keepdim=True) * saturation).floor()
    for _ in range(size):
        gain_GE = torch.minimum(mass_GLE, wanted_GL1).sum(dim=1)
        gain_GE = torch.where(gain_GE.any(dim=1, keepdim=True), gain_GE, votes_GE).masked_fill(member_GE, -1.0)
        is_best_GE = gain_GE == gain_GE.amax(dim=1, keepdim=True)
        best_G1 = experts_E.where(is_best_GE, len(experts_E)).amin(dim=1, keepdim=True)
        member_GE.scatter_(1, best_G1, True)
        best_GL1 = best_G1.unsqueeze(1).expand(-1, mass_GLE.shape[1], -1)
        wanted_GL1 = (wanted_GL1 - mass_GLE.gather(2, best_GL1)).clamp_min(0.0)
        mass_GLE.scatter_(2, best_GL1, 0.0)
    return member_GE
