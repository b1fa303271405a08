"""Coverage: the votes of a token that has enough experts in the coreset count no more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.routing.policy import BALLOTS, BUDGET, Budget, CoresetPolicy, knob
from expertshare.routing.rule import Ballots, SharingRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage(CoresetPolicy):
    """Greedy maximum coverage: the `budget` experts that cover most of the tokens' top-K affinity.

    Of each token no more than the share `saturation` counts, so that the next expert goes to tokens that have too
    little. With a share of 1 that is a vote by affinity. Once every token has enough, the most covered mass decides.
    """

    name: ClassVar[str] = "coverage"
    budget: Budget | None = field(default=None, metadata=BUDGET)
    saturation: float = field(
        default=0.6, metadata=knob("share of its top-k affinity that is enough for a token", limits="(0, 1]")
    )
    ballots: Ballots = field(default="ungrouped", metadata=BALLOTS)

    def rule(self, spec: RouterSpec) -> SharingRule:
        """The expert with the largest gain, as often as the budget allows."""
        size = self.bind(spec).budget
        return self.sharing(ranking="coverage", ballots=self.ballots, size=size, saturation=self.saturation)
