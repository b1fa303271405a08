"""The built-in policies, each a name, its source, its knobs and the rule that they make; then the table of them, and
how policies are read from text, written as it and described in reports.

Vanilla, TopKCap and Skip have no coreset: every expert stays available, and a token may run fewer of its K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from expertshare.config import GroupLimit, ModelConfig, RouterSpec
from expertshare.errors import PolicyError, nearest
from expertshare.routing.policy import (
    BALLOTS,
    BUDGET,
    GROUP_LIMIT,
    Budget,
    CoresetPolicy,
    Layerwise,
    RoutingPolicy,
    coreset_sizes,
    knob,
    runs_on_torch,
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

Knob = int | float | str


def knobs(policy: RoutingPolicy) -> dict[str, Any]:
    """The knobs of a policy by name, for reports; of a layerwise one, name and knobs of every layer's policy."""
    if isinstance(policy, Layerwise):
        return {"layers": [{"policy": layer.name, "knobs": knobs(layer)} for layer in policy.layers]}
    return {f.name: getattr(policy, f.name) for f in fields(policy)}


def policy_record(policy: RoutingPolicy) -> dict[str, Any]:
    """Name and knobs for reports; where no rule expresses the policy, that torch routed it whatever the backend."""
    layers = policy.layers if isinstance(policy, Layerwise) else (policy,)
    record = {"policy": policy.name, "knobs": knobs(policy)}
    return {**record, "routed_by": "torch"} if any(map(runs_on_torch, layers)) else record


def make_policy(name: str, settings: Mapping[str, Knob] | None = None) -> RoutingPolicy:
    """The policy called `name` with the given knobs; the others keep their defaults.

    Raises PolicyError for an unknown name, a knob of another policy, or a value of the wrong kind.
    """
    if name not in POLICIES:
        raise PolicyError(f"unknown policy {name!r}. {nearest(name, POLICIES)}")
    kind = POLICIES[name]
    known, hints = {f.name for f in fields(kind)}, get_type_hints(kind)
    for key, value in (settings or {}).items():
        if key not in known:
            owners = sorted(n for n, k in POLICIES.items() if key in {f.name for f in fields(k)})
            hint = f"it belongs to {', '.join(owners)}. " if owners else ""
            raise PolicyError(
                f"{name} has no knob {key!r}: {hint}{name} takes: {', '.join(sorted(known)) or 'no knobs'}."
            )
        whole = float not in (hints[key], *get_args(hints[key]))
        is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if get_origin(hints[key]) is not Literal and not is_number:  # words are checked by the policy itself
            raise PolicyError(f"{name}: {key} must be {'a whole number' if whole else 'a number'}, got {value!r}")
    return kind(**(settings or {}))


def parse_policy(text: str) -> RoutingPolicy:
    """Read a policy written as `name` or `name:knob=value,knob=value`, e.g. `des-vote:budget=16`."""
    name, _, rest = text.partition(":")
    settings: dict[str, Knob] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise PolicyError(f"expected knob=value in {text!r}, got {part!r}. Example: des-vote:budget=16")
        key = key.strip().replace("-", "_")
        if key in settings:
            raise PolicyError(f"expected each knob once in {text!r}, got {key} again: give one value")
        settings[key] = parse_knob(value.strip())
    return make_policy(name.strip(), settings)


def parse_knob(text: str) -> Knob:
    """A knob's value from text: a whole number, a number, or else a word."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def native_policy(config: ModelConfig) -> RoutingPolicy:
    """The policy that a checkpoint was trained with: block max at its expert capacity (LLaDA2.2), else vanilla."""
    if config.expert_capacity is None:
        return Vanilla()
    return BlockMax(budget=config.expert_capacity)


def policy_label(policy: RoutingPolicy) -> str:
    """`name:knob=value,...` with every number that is set and the words that differ; parse_policy reads it back."""
    if isinstance(policy, Layerwise):  # has no short form that parse_policy could read: its home is a policy file
        return f"{policy.name}({'; '.join(policy_label(layer) for layer in policy.layers)})"
    values = [(f, getattr(policy, f.name)) for f in fields(policy)]
    told = [f"{f.name}={v}" for f, v in values if v is not None and (not isinstance(v, str) or v != f.default)]
    return f"{policy.name}:{','.join(told)}" if told else policy.name


def parse_policies(texts: Sequence[str]) -> list[RoutingPolicy]:
    """Policies from lists such as "vanilla,skip:skip_share=0.3,des-vote:budget=16,group_limit=ignore".

    Commas part policies as well as knobs: a part with "=" and without ":" belongs to the policy before it. Raises
    PolicyError for a list that cannot be read.
    """
    return [parse_policy(text) for listed in texts for text in split_policies(listed)]


def split_policies(listed: str) -> list[str]:
    """One text per policy of a list."""
    policies: list[str] = []
    for part in (part.strip() for part in listed.split(",")):
        if not part:
            continue
        if "=" in part and ":" not in part:
            if not policies:
                raise PolicyError(f"expected a policy before the knob {part!r} in {listed!r}, e.g. des-vote:{part}")
            policies[-1] += ("," if ":" in policies[-1] else ":") + part
        else:
            policies.append(part)
    return policies
