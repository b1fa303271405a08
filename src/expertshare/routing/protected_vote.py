"""Protected vote (XShare, arXiv 2602.07265): nobody's first choice is outvoted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.routing.ballots import Ballots, election
from expertshare.routing.base import BudgetPolicy
from expertshare.types import Coreset, RouterScores


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtectedVote(BudgetPolicy):
    """Every token's best expert first, then the vote, up to `budget`.

    Where the first choices alone exceed the budget, those with most votes stay: the budget is a promise of memory.
    """

    name: ClassVar[str] = "protected-vote"
    ballots: Ballots = field(default="ungrouped", metadata={"help": "experts a token may vote for: ungrouped, grouped"})

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """Rank by votes, the protected in front of all others, cut at the budget."""
        votes_GE, protected_GE = election(self.voting(scores), spec, self.ballots)
        return self.elect(votes_GE, scores, spec, protected_GE)
