"""The model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.routing.base import TokenPolicy
from expertshare.routing.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Vanilla(TokenPolicy):
    """Every token picks its own experts among all of them: the baseline."""

    name: ClassVar[str] = "vanilla"

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        """Nothing to share, nothing to drop."""
        return Recipe()
