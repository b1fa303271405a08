"""Coverage: the votes of a token that has enough experts in the coreset count no more."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing.ballots import Ballots, ballots
from expertshare.routing.base import Budget, CoresetPolicy, resolve_budget
from expertshare.types import Coreset, RouterScores

_UNITS = 2.0**32  # of mass in an affinity of 1: sums of whole units are exact in float64, in any order


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage(CoresetPolicy):
    """Greedy maximum coverage: the `budget` experts that cover most of the tokens' top-K affinity.

    Of each token no more than the share `saturation` counts, so that the next expert goes to tokens that have too
    little. With a share of 1 that is a vote by affinity. Once every token has enough, the most covered mass decides.
    """

    name: ClassVar[str] = "coverage"
    budget: Budget | None = field(default=None, metadata={"help": "experts in the coreset: a count or a fraction"})
    saturation: float = field(default=0.6, metadata={"help": "share of its top-k affinity that is enough for a token"})
    ballots: Ballots = field(default="ungrouped", metadata={"help": "experts a token may vote for: ungrouped, grouped"})

    def bind(self, spec: RouterSpec) -> Coverage:
        """Make the budget a count; refuse a saturation outside (0, 1]."""
        if not 0.0 < self.saturation <= 1.0:
            raise PolicyError(f"{self.name}: saturation must lie in (0, 1], got {self.saturation}")
        return replace(self, budget=resolve_budget(self.budget, spec, self.group_limit, self.name))

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """Take the expert with the largest gain, as often as the budget allows."""
        size = resolve_budget(self.budget, spec, self.group_limit, self.name)
        cast_GLE = ballots(self.voting(scores), spec, spec.top_k, self.ballots)
        # NaN would beat and equal nothing, itself included: without a best, there is no expert to take.
        mass_GLE = (scores.affinity_GLE.detach().double() * _UNITS).round().nan_to_num(nan=0.0)
        mass_GLE = mass_GLE.masked_fill(~cast_GLE, 0.0)
        return Coreset(greedy_cover(mass_GLE, self.saturation, size))


def greedy_cover(mass_GLE: Tensor, saturation: float, size: int) -> Tensor:
    """Membership (bool [G, E]) of the `size` experts that cover most, taken one by one; ties go to the lower id.

    mass_GLE: float64, whole numbers, 0 where a token does not vote. Sums of them are exact, so that neither the order
    of the tokens nor the other groups matter.
    """
    mass_GLE = mass_GLE.clone()
    experts_E = torch.arange(mass_GLE.shape[2], device=mass_GLE.device)
    member_GE = torch.zeros(mass_GLE.shape[::2], dtype=torch.bool, device=mass_GLE.device)
    votes_GE = mass_GLE.sum(dim=1)
    room_GL1 = (mass_GLE.sum(dim=2, keepdim=True) * saturation).floor()
    for _ in range(size):
        gain_GE = torch.minimum(mass_GLE, room_GL1).sum(dim=1)
        gain_GE = torch.where(gain_GE.any(dim=1, keepdim=True), gain_GE, votes_GE).masked_fill(member_GE, -1.0)
        is_best_GE = gain_GE == gain_GE.amax(dim=1, keepdim=True)
        best_G1 = experts_E.where(is_best_GE, len(experts_E)).amin(dim=1, keepdim=True)
        member_GE.scatter_(1, best_G1, True)
        best_GL1 = best_G1.unsqueeze(1).expand(-1, mass_GLE.shape[1], -1)
        room_GL1 = (room_GL1 - mass_GLE.gather(2, best_GL1)).clamp_min(0.0)
        mass_GLE.scatter_(2, best_GL1, 0.0)
    return member_GE
