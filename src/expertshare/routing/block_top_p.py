"""Block top-p, the router of dMoE: as many experts as the block's votes ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.routing.policy import BALLOTS, CoresetPolicy, coreset_sizes, knob
from expertshare.routing.rule import Ballots, SharingRule


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTopP(CoresetPolicy):
    """Sort the experts by votes and keep them until their cumulative share passes `top_p_experts`.

    The first expert past it is included; at least `guard` experts are kept, by default the smallest number that leaves
    every token K choices. Negative vote sums (a negative balancing bias) carry no mass, so the cumulative share never
    falls; where no sum is positive there is no share to cut at, and every expert with a vote is kept. An expert
    without a vote is only ever added by the guard.
    """

    name: ClassVar[str] = "block-top-p"
    source: ClassVar[str] = "arXiv 2605.30876"
    top_p_experts: float = field(
        default=0.6,
        metadata=knob("share of the block's votes that the coreset holds", limits="(0, 1]", tuned=(0.3, 1.0)),
    )
    guard: int | None = field(
        default=None,
        metadata=knob(
            "least number of experts (default: derived)",
            limits=coreset_sizes,
            derived=lambda spec, limit: spec.min_coreset_size(limit),
        ),
    )
    ballots: Ballots = field(default="ungrouped", metadata=BALLOTS)

    def rule(self, spec: RouterSpec) -> SharingRule:
        """The shortest prefix of the ranking by votes that passes p."""
        return self.sharing(
            ranking="votes", ballots=self.ballots, size=self.bind(spec).guard, prefix_share=self.top_p_experts
        )
