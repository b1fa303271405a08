"""DES-Seq (arXiv 2602.00879): the union of every token's few best experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.routing.ballots import Ballots, election, grow
from expertshare.routing.base import CoresetPolicy, check_count
from expertshare.routing.recipe import Recipe
from expertshare.types import Coreset, RouterScores


@dataclass(frozen=True, kw_only=True, slots=True)
class DesSeq(CoresetPolicy):
    """The coreset is the union over tokens of their `experts_per_vote` best experts, grown to the minimum if small."""

    name: ClassVar[str] = "des-seq"
    experts_per_vote: int = field(default=1, metadata={"help": "experts that each token adds to the union"})
    ballots: Ballots = field(default="ungrouped", metadata={"help": "experts a token may vote for: ungrouped, grouped"})

    def bind(self, spec: RouterSpec) -> DesSeq:
        """Refuse more experts per vote than the model runs per token."""
        check_count(self.experts_per_vote, least=1, most=spec.top_k, knob="experts_per_vote", policy=self.name)
        return self

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """Union of the ballots of the group's live tokens."""
        votes_GE, union_GE = election(self.voting(scores), spec, self.ballots, self.experts_per_vote)
        return grow(union_GE, votes_GE, spec.min_coreset_size(self.group_limit))

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        """`select` in numbers."""
        size, firsts = spec.min_coreset_size(self.group_limit), self.experts_per_vote
        return Recipe(ranking="votes", ballots=self.ballots, size=size, num_firsts=firsts, front_is_whole=True)
