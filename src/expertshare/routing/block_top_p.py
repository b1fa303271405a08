"""Block top-p, the router of dMoE (arXiv 2605.30876): as many experts as the block's vote mass asks for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing.ballots import Ballots, election, grow
from expertshare.routing.base import CoresetPolicy, check_count
from expertshare.routing.recipe import Recipe
from expertshare.routing.shares import shortest_prefix
from expertshare.types import Coreset, RouterScores


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTopP(CoresetPolicy):
    """Sort the experts by votes and keep them until their cumulative share passes `top_p_experts`.

    The first expert past it is included; at least `guard` experts are kept, by default the smallest number that leaves
    every token K choices. Negative vote sums (a negative balancing bias) carry no mass, so the cumulative share never
    falls; where no sum is positive there is no share to cut at, and every expert with a vote is kept. An expert
    without a vote is only ever added by the guard.
    """

    name: ClassVar[str] = "block-top-p"
    top_p_experts: float = field(default=0.6, metadata={"help": "share of the block's votes that the coreset holds"})
    guard: int | None = field(default=None, metadata={"help": "least number of experts (default: derived)"})
    ballots: Ballots = field(default="ungrouped", metadata={"help": "experts a token may vote for: ungrouped, grouped"})

    def bind(self, spec: RouterSpec) -> BlockTopP:
        """Derive the guard; refuse p outside (0, 1] or a guard that could leave a token without K choices."""
        if not 0.0 < self.top_p_experts <= 1.0:
            raise PolicyError(f"{self.name}: top_p_experts must lie in (0, 1], got {self.top_p_experts}")
        least = spec.min_coreset_size(self.group_limit)
        if self.guard is None:
            return replace(self, guard=least)
        check_count(self.guard, least=least, most=spec.num_experts, knob="guard", policy=self.name)
        return self

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """The shortest prefix of the ranking that passes p."""
        votes_GE, _ = election(self.voting(scores), spec, self.ballots)
        guard = spec.min_coreset_size(self.group_limit) if self.guard is None else self.guard
        return grow(shortest_prefix(votes_GE, self.top_p_experts), votes_GE, guard)

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        """`select` in numbers."""
        guard = spec.min_coreset_size(self.group_limit) if self.guard is None else self.guard
        share = self.top_p_experts
        return Recipe(ranking="votes", ballots=self.ballots, size=guard, prefix_share=share, front_is_whole=True)
