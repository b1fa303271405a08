"""The built-in policies, each a name, its source, its knobs and the rule that they make; and POLICIES, all of them.

Vanilla, TopKCap and Skip have no coreset: every expert stays available, and a token may run fewer of its K.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from expertshare.config import GroupLimit, RouterSpec
from expertshare.routing.policy import (
    BALLOTS,
    BUDGET,
    GROUP_LIMIT,
    Budget,
    CoresetPolicy,
    RoutingPolicy,
    coreset_sizes,
    knob,
)
from expertshare.routing.rule import Ballots, SharingRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Vanilla(RoutingPolicy):
    """Every token picks its own experts among all of them: the model as it is, and the baseline."""

    name: ClassVar[str] = "vanilla"


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKCap(RoutingPolicy):
    """Each token keeps its `experts_per_token` best experts, weighted as if the model had that top-k.

    The baseline that loses most accuracy in the comparison of dMoE (arXiv 2605.30876, Top-4).
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

    Dynamic expert skipping after NAEE (arXiv 2402.14800), in the cumulative form that DES compares with. The model's
    weight rule applies to those that remain, so a renormalising router renormalises over them.
    """

    name: ClassVar[str] = "skip"
    source: ClassVar[str] = "arXiv 2402.14800"
    skip_share: float = field(
        default=0.4, metadata=knob("share of a token's weight that may be dropped", limits="[0, 1)", tuned=(0.0, 0.6))
    )

    def rule(self, spec: RouterSpec) -> SharingRule:
        """All experts, without a token's lightest."""
        return SharingRule(drop_share=self.skip_share)


@dataclass(frozen=True, kw_only=True, slots=True)
class DesSeq(CoresetPolicy):
    """The coreset is the union over tokens of their `experts_per_vote` best experts, grown to the minimum if small.

    Intra-sequence sharing of DES (dynamic expert sharing, arXiv 2602.00879).
    """

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
    """Keep each token's top-K router scores, sum them over the block, elect the `budget` experts with most.

    Saliency-aware voting of DES (arXiv 2602.00879).
    """

    name: ClassVar[str] = "des-vote"
    source: ClassVar[str] = "arXiv 2602.00879"
    budget: Budget | None = field(default=None, metadata=BUDGET)
    ballots: Ballots = field(default="ungrouped", metadata=BALLOTS)

    def rule(self, spec: RouterSpec) -> SharingRule:
        """The experts with the most votes."""
        return self.sharing(ranking="votes", ballots=self.ballots, size=self.bind(spec).budget)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTopP(CoresetPolicy):
    """Sort the experts by votes and keep them until their cumulative share passes `top_p_experts`.

    The router of dMoE (arXiv 2605.30876): as many experts as the block's votes ask for. The first expert past the share
    is included; at least `guard` experts are kept, by default the smallest number that leaves every token K choices.
    Negative vote sums (a negative balancing bias) carry no mass, so the cumulative share never falls; where no sum is
    positive there is no share to cut at, and every expert with a vote is kept. An expert without a vote is only ever
    added by the guard.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMax(CoresetPolicy):
    """The `budget` experts with the highest score over all tokens of the block; padding scores -inf.

    The native rule of LLaDA2.2: an expert counts as much as the token that wants it most.
    """

    name: ClassVar[str] = "block-max"
    source: ClassVar[str] = "LLaDA2.2"
    group_limit: GroupLimit = field(default="ignore", metadata=GROUP_LIMIT)
    budget: Budget | None = field(default=None, metadata=BUDGET)

    def rule(self, spec: RouterSpec) -> SharingRule:
        """The experts with the highest maximum."""
        return self.sharing(ranking="highest", size=self.bind(spec).budget)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtectedVote(CoresetPolicy):
    """Every token's best expert first, then the vote, up to `budget` (XShare, arXiv 2602.07265).

    Where the first choices alone exceed the budget, those with most votes stay: the budget is a promise of memory.
    """

    name: ClassVar[str] = "protected-vote"
    source: ClassVar[str] = "arXiv 2602.07265"
    budget: Budget | None = field(default=None, metadata=BUDGET)
    ballots: Ballots = field(default="ungrouped", metadata=BALLOTS)

    def rule(self, spec: RouterSpec) -> SharingRule:
        """Ranked by votes, the protected in front of all others, cut at the budget."""
        return self.sharing(ranking="votes", ballots=self.ballots, size=self.bind(spec).budget, protected=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage(CoresetPolicy):
    """Greedy maximum coverage: the `budget` experts that cover most of the tokens' top-K affinity.

    Ours. Of each token no more than the share `saturation` counts, so that the next expert goes to tokens that have
    too little. With a share of 1 that is a vote by affinity. Once every token has enough, the most covered mass
    decides.
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


BUILT_IN: tuple[type[RoutingPolicy], ...] = (
    Vanilla,
    TopKCap,
    Skip,
    DesSeq,
    DesVote,
    BlockTopP,
    BlockMax,
    ProtectedVote,
    Coverage,
)
POLICIES: dict[str, type[RoutingPolicy]] = {policy.name: policy for policy in BUILT_IN}
"""Every policy by its name."""
