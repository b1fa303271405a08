"""DES-Vote (arXiv 2602.00879): a budget of experts, elected by router weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.routing.ballots import Ballots, election
from expertshare.routing.base import BudgetPolicy
from expertshare.types import Coreset, RouterScores


@dataclass(frozen=True, kw_only=True, slots=True)
class DesVote(BudgetPolicy):
    """Keep each token's top-K router scores, sum them over the block, elect the `budget` experts with most."""

    name: ClassVar[str] = "des-vote"
    ballots: Ballots = field(default="ungrouped", metadata={"help": "experts a token may vote for: ungrouped, grouped"})

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """The experts with the most votes."""
        votes_GE, _ = election(self.voting(scores), spec, self.ballots)
        return self.elect(votes_GE, scores, spec)
