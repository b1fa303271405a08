"""Fewer experts per token, and no sharing: the baseline that loses most accuracy (arXiv 2605.30876, Top-4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from expertshare.config import RouterSpec
from expertshare.routing.base import TokenPolicy, check_count
from expertshare.routing.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKCap(TokenPolicy):
    """Each token keeps its `experts_per_token` best experts, weighted as if the model had that top-k."""

    name: ClassVar[str] = "top-k-cap"
    experts_per_token: int = field(default=4, metadata={"help": "experts each token keeps"})

    def bind(self, spec: RouterSpec) -> TopKCap:
        """Refuse a cap above the model's own top-k."""
        check_count(self.experts_per_token, least=1, most=spec.top_k, knob="experts_per_token", policy=self.name)
        return self

    def keep(self, affinity_TK: Tensor) -> Tensor | None:
        """The first `experts_per_token` slots."""
        slots = torch.arange(affinity_TK.shape[-1], device=affinity_TK.device)
        return (slots < self.experts_per_token).expand_as(affinity_TK)

    def recipe(self, spec: RouterSpec) -> Recipe | None:
        """`keep` in numbers."""
        return Recipe(slots=self.experts_per_token)
