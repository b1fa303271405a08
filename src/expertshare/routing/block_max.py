"""Block max, the native rule of LLaDA2.2: an expert counts as much as the token that wants it most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import GroupLimit, RouterSpec
from expertshare.routing.ballots import highest
from expertshare.routing.base import BudgetPolicy
from expertshare.types import Coreset, RouterScores


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMax(BudgetPolicy):
    """The `budget` experts with the highest score over all tokens of the block; padding scores -inf."""

    name: ClassVar[str] = "block-max"
    group_limit: GroupLimit = field(default="ignore", metadata={"help": "group rule in the coreset: inside, ignore"})

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """The experts with the highest maximum."""
        return self.elect(highest(self.voting(scores)), scores, spec)
