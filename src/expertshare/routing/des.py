"""Dynamic expert sharing (DES, arXiv 2602.00879): a union of few favourites, or a vote for a budget of experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.routing.policy import BALLOTS, BUDGET, Budget, CoresetPolicy, knob
from expertshare.routing.rule import Ballots, SharingRule


@dataclass(frozen=True, kw_only=True, slots=True)
class DesSeq(CoresetPolicy):
    """The coreset is the union over tokens of their `experts_per_vote` best experts, grown to the minimum if small."""

    name: ClassVar[str] = "des-seq"
    source: ClassVar[str] = "arXiv 2602.00879"
    experts_per_vote: int = field(
        default=1,
        metadata=knob("experts that each token adds to the union", limits=lambda spec, _: (1, spec.top_k), tuned=True),
    )
    ballots: Ballots = field(default="ungrouped", metadata=BALLOTS)

    def rule(self, spec: RouterSpec) -> SharingRule:
        """Every token's favourites, all of them, before what has most votes."""
        return self.sharing(
            ranking="votes",
            ballots=self.ballots,
            size=spec.min_coreset_size(self.group_limit),
            protected=self.experts_per_vote,
            keep_protected=True,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DesVote(CoresetPolicy):
    """Keep each token's top-K router scores, sum them over the block, elect the `budget` experts with most."""

    name: ClassVar[str] = "des-vote"
    source: ClassVar[str] = "arXiv 2602.00879"
    budget: Budget | None = field(default=None, metadata=BUDGET)
    ballots: Ballots = field(default="ungrouped", metadata=BALLOTS)

    def rule(self, spec: RouterSpec) -> SharingRule:
        """The experts with the most votes."""
        return self.sharing(ranking="votes", ballots=self.ballots, size=self.bind(spec).budget)
