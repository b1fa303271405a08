"""Protected vote (XShare, arXiv 2602.07265): nobody's first choice is outvoted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from expertshare.config import RouterSpec
from expertshare.routing.ballots import Ballots, ballots, tally
from expertshare.routing.base import Budget, CoresetPolicy, resolve_budget
from expertshare.routing.ranking import top_k_ids
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
        """Rank by votes, move the protected to the front without changing their order, cut at the budget."""
        size = resolve_budget(self.budget, spec, self.group_limit, self.name)
        protected_GE = ballots(scores, spec, 1, self.ballots).any(dim=1)
        by_votes_GE = top_k_ids(tally(scores, ballots(scores, spec, spec.top_k, self.ballots)), spec.num_experts)
        front = protected_GE.gather(-1, by_votes_GE).to(torch.int8)
        order_GE = by_votes_GE.gather(-1, front.argsort(dim=-1, descending=True, stable=True))
        member_GE = torch.zeros_like(protected_GE)
        return Coreset(member_GE.scatter(-1, order_GE[:, :size], True))
