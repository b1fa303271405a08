"""Dynamic expert skipping after NAEE (arXiv 2402.14800), in the cumulative form that DES compares with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing.base import TokenPolicy
from expertshare.routing.recipe import Recipe
from expertshare.routing.shares import drop_lightest


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip(TokenPolicy):
    """Each token drops its lightest experts while their cumulative share of its K weights stays under `skip_share`.

    The model's weight rule applies to those that remain, so a renormalising router renormalises over them.
    """

    name: ClassVar[str] = "skip"
    skip_share: float = field(default=0.4, metadata={"help": "share of a token's weight that may be dropped"})

    def bind(self, spec: RouterSpec) -> Skip:
        """Refuse a share outside [0, 1)."""
        if not 0.0 <= self.skip_share < 1.0:
            raise PolicyError(f"{self.name}: skip_share must lie in [0, 1), got {self.skip_share}")
        return self

    def keep(self, affinity_TK: Tensor) -> Tensor | None:
        """Walk from the lightest expert up; keep from where the cumulative share reaches `skip_share`.

        Of equally light experts the one that ranks last goes first, so that ties stay with the lower id.
        """
        return drop_lightest(affinity_TK, self.skip_share)

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        """`keep` in numbers."""
        return Recipe(drop_share=self.skip_share)
