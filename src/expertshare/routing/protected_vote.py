"""Protected vote (XShare): nobody's first choice is outvoted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.routing.policy import BALLOTS, BUDGET, Budget, CoresetPolicy
from expertshare.routing.rule import Ballots, SharingRule


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtectedVote(CoresetPolicy):
    """Every token's best expert first, then the vote, up to `budget`.

    Where the first choices alone exceed the budget, those with most votes stay: the budget is a promise of memory.
    """

    name: ClassVar[str] = "protected-vote"
    source: ClassVar[str] = "arXiv 2602.07265"
    budget: Budget | None = field(default=None, metadata=BUDGET)
    ballots: Ballots = field(default="ungrouped", metadata=BALLOTS)

    def rule(self, spec: RouterSpec) -> SharingRule:
        """Ranked by votes, the protected in front of all others, cut at the budget."""
        return self.sharing(ranking="votes", ballots=self.ballots, size=self.bind(spec).budget, protected=1)
