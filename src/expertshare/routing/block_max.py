"""Block max, the native rule of LLaDA2.2: an expert counts as much as the token that wants it most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import GroupLimit, RouterSpec
from expertshare.routing.policy import BUDGET, GROUP_LIMIT, Budget, CoresetPolicy
from expertshare.routing.rule import SharingRule


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMax(CoresetPolicy):
    """The `budget` experts with the highest score over all tokens of the block; padding scores -inf."""

    name: ClassVar[str] = "block-max"
    source: ClassVar[str] = "LLaDA2.2"
    group_limit: GroupLimit = field(default="ignore", metadata=GROUP_LIMIT)
    budget: Budget | None = field(default=None, metadata=BUDGET)

    def rule(self, spec: RouterSpec) -> SharingRule:
        """The experts with the highest maximum."""
        return self.sharing(ranking="highest", size=self.bind(spec).budget)
