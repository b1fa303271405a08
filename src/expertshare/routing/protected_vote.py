"""Protected vote (XShare, arXiv 2602.07265): nobody's first choice is outvoted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.routing.ballots import Ballots, election
from expertshare.routing.base import Budget, CoresetPolicy, resolve_budget
from expertshare.routing.ranking import top_k_mask
from expertshare.routing.recipe import Recipe
from expertshare.types import Coreset, RouterScores


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtectedVote(CoresetPolicy):
    """Every token's best expert first, then the vote, up to `budget`.

    Where the first choices alone exceed the budget, those with most votes stay: the budget is a promise of memory.
    """

    name: ClassVar[str] = "protected-vote"
    budget: Budget | None = field(default=None, metadata={"help": "experts in the coreset: a count or a fraction"})
    ballots: Ballots = field(default="ungrouped", metadata={"help": "experts a token may vote for: ungrouped, grouped"})

    def bind(self, spec: RouterSpec) -> ProtectedVote:
        """Make the budget a count."""
        return replace(self, budget=resolve_budget(self.budget, spec, self.group_limit, self.name))

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """Rank by votes, the protected in front of all others, cut at the budget."""
        size = resolve_budget(self.budget, spec, self.group_limit, self.name)
        votes_GE, protected_GE = election(self.voting(scores), spec, self.ballots)
        return Coreset(top_k_mask(votes_GE, size, protected_GE))

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        """`select` in numbers."""
        size = resolve_budget(self.budget, spec, self.group_limit, self.name)
        return Recipe(ranking="votes", ballots=self.ballots, size=size, num_firsts=1)
