"""Policies without a coreset: every expert stays available, and a token may run fewer of its K."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import RouterSpec
from expertshare.routing.policy import RoutingPolicy, knob
from expertshare.routing.rule import SharingRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Vanilla(RoutingPolicy):
    """Every token picks its own experts among all of them: the model as it is, and the baseline."""

    name: ClassVar[str] = "vanilla"


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKCap(RoutingPolicy):
    """Each token keeps its `experts_per_token` best experts, weighted as if the model had that top-k.

    The baseline that loses most accuracy in dMoE's comparison (Top-4).
    """

    name: ClassVar[str] = "top-k-cap"
    source: ClassVar[str] = "arXiv 2605.30876"
    experts_per_token: int = field(
        default=4, metadata=knob("experts each token keeps", limits=lambda spec, _: (1, spec.top_k), tuned=True)
    )

    def rule(self, spec: RouterSpec) -> SharingRule:
        """All experts, fewer of them for a token."""
        return SharingRule(experts_per_token=self.experts_per_token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip(RoutingPolicy):
    """Each token drops its lightest experts while their cumulative share of its K weights stays under `skip_share`.

    Dynamic expert skipping after NAEE, in the cumulative form that DES compares with. The model's weight rule applies
    to those that remain, so a renormalising router renormalises over them.
    """

    name: ClassVar[str] = "skip"
    source: ClassVar[str] = "arXiv 2402.14800"
    skip_share: float = field(
        default=0.4, metadata=knob("share of a token's weight that may be dropped", limits="[0, 1)", tuned=(0.0, 0.6))
    )

    def rule(self, spec: RouterSpec) -> SharingRule:
        """All experts, without a token's lightest."""
        return SharingRule(drop_share=self.skip_share)
