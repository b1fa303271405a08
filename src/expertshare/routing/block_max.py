"""Block max, the native rule of LLaDA2.2: an expert counts as much as the token that wants it most."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from expertshare.config import GroupLimit, RouterSpec
from expertshare.routing.ballots import highest
from expertshare.routing.base import Budget, CoresetPolicy, resolve_budget
from expertshare.routing.ranking import top_k_mask
from expertshare.routing.recipe import Recipe
from expertshare.types import Coreset, RouterScores


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMax(CoresetPolicy):
    """The `budget` experts with the highest score over all tokens of the block; padding scores -inf."""

    name: ClassVar[str] = "block-max"
    group_limit: GroupLimit = field(default="ignore", metadata={"help": "group rule in the coreset: inside, ignore"})
    budget: Budget | None = field(default=None, metadata={"help": "experts in the coreset: a count or a fraction"})

    def bind(self, spec: RouterSpec) -> BlockMax:
        """Make the budget a count."""
        return replace(self, budget=resolve_budget(self.budget, spec, self.group_limit, self.name))

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """The experts with the highest maximum."""
        size = resolve_budget(self.budget, spec, self.group_limit, self.name)
        return Coreset(top_k_mask(highest(self.voting(scores)), size))

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        """`select` in numbers."""
        return Recipe(ranking="highest", size=resolve_budget(self.budget, spec, self.group_limit, self.name))
