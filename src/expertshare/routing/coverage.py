"""Coverage: the votes of a token that has enough experts in the coreset count no more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing.ballots import Ballots, ballots
from expertshare.routing.base import BudgetPolicy
from expertshare.types import Coreset, RouterScores

_UNITS = 2.0**32  # of mass in an affinity of 1: sums of whole units are exact in float64, in any order


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage(BudgetPolicy):
    """Greedy maximum coverage: the `budget` experts that cover most of the tokens' top-K affinity.

    Of each token no more than the share `saturation` counts, so that the next expert goes to tokens that have too
    little. With a share of 1 that is a vote by affinity. Once every token has enough, the most covered mass decides.
    """

    name: ClassVar[str] = "coverage"
    saturation: float = field(default=0.6, metadata={"help": "share of its top-k affinity that is enough for a token"})
    ballots: Ballots = field(default="ungrouped", metadata={"help": "experts a token may vote for: ungrouped, grouped"})

    def __post_init__(self) -> None:
        if not 0.0 < self.saturation <= 1.0:
            raise PolicyError(f"{self.name}: saturation must lie in (0, 1], got {self.saturation}")

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """Take the expert with the largest gain, as often as the budget allows."""
        cast_GLE = ballots(self.voting(scores), spec, spec.top_k, self.ballots)
        mass_GLE = (scores.affinity_GLE.detach().double() * _UNITS).round().masked_fill(~cast_GLE, 0.0)
        return self.elect(greedy_ranking(mass_GLE, self.saturation, self.most(spec)), scores, spec)


def greedy_ranking(mass_GLE: Tensor, saturation: float, size: int) -> Tensor:
    """Scores of the `size` experts that greedy coverage takes, falling in that order; 0 for others: float32 [G, E].

    mass_GLE: float64 whole numbers, 0 where a token does not vote. Ties go to the lower id.
    """
    experts_E = torch.arange(mass_GLE.shape[2], device=mass_GLE.device)
    rank_GE = torch.zeros(mass_GLE.shape[::2], device=mass_GLE.device)
    room_GL = (mass_GLE.sum(dim=2) * saturation).floor()
    votes_GE = mass_GLE.sum(dim=1)
    for place in range(size, 0, -1):
        gain_GE = torch.minimum(mass_GLE, room_GL.unsqueeze(2)).sum(dim=1)
        gain_GE = torch.where(gain_GE.any(dim=1, keepdim=True), gain_GE, votes_GE)
        gain_GE = gain_GE.masked_fill(rank_GE > 0, -1.0)
        best_G1 = gain_GE.amax(dim=1, keepdim=True)
        best_G1 = experts_E.where(gain_GE == best_G1, len(experts_E)).amin(dim=1, keepdim=True)
        rank_GE.scatter_(1, best_G1, float(place))
        taken_GL = mass_GLE.gather(2, best_G1.unsqueeze(1).expand(-1, mass_GLE.shape[1], -1)).squeeze(2)
        room_GL = (room_GL - taken_GL).clamp_min(0.0)
        mass_GLE = mass_GLE.scatter(2, best_G1.unsqueeze(1).expand(-1, mass_GLE.shape[1], -1), 0.0)
    return rank_GE
