"""DES-Vote (arXiv 2602.00879): a budget of experts, elected by router weight."""

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
class DesVote(CoresetPolicy):
    """Keep each token's top-K router scores, sum them over the block, elect the `budget` experts with most."""

    name: ClassVar[str] = "des-vote"
    budget: Budget | None = field(default=None, metadata={"help": "experts in the coreset: a count or a fraction"})
    ballots: Ballots = field(default="ungrouped", metadata={"help": "experts a token may vote for: ungrouped, grouped"})

    def bind(self, spec: RouterSpec) -> DesVote:
        """Make the budget a count."""
        return replace(self, budget=resolve_budget(self.budget, spec, self.group_limit, self.name))

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """The experts with the most votes."""
        size = resolve_budget(self.budget, spec, self.group_limit, self.name)
        votes_GE, _ = election(self.voting(scores), spec, self.ballots)
        return Coreset(top_k_mask(votes_GE, size))

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        """`select` in numbers."""
        size = resolve_budget(self.budget, spec, self.group_limit, self.name)
        return Recipe(ranking="votes", ballots=self.ballots, size=size)
