"""What all policies have in common: knobs that are declared once, how they are checked, and the rule that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, Self, cast, get_args, get_origin, get_type_hints

from torch import Tensor

from expertshare.config import GroupLimit, RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing.assign import assign
from expertshare.routing.rule import SharingRule, Voters
from expertshare.routing.select import select
from expertshare.types import Coreset, RouterScores, RoutingPlan

Budget = int | float
Limits = Literal["(0, 1]", "[0, 1)"] | Callable[[RouterSpec, GroupLimit], tuple[int, int]]
"""Of a knob: the interval of a share, or the least and the most of a count."""


def knob(
    help_text: str,
    *,
    limits: Limits | None = None,
    tuned: bool | tuple[float, float] = False,
    derived: Callable[[RouterSpec, GroupLimit], int] | None = None,
    check: Callable[[Any, RouterSpec, GroupLimit, str], Any] | None = None,
) -> dict[str, Any]:
    """Metadata of a knob's field: with its type and default, all that the package knows of it.

    help_text: a few words for people. limits: values outside are refused. tuned: whether the knob sets how much is
    shared, between its limits or these two values, from most to hardly any. derived: what None stands for. check:
    instead of a comparison with the limits, gives the value (of a knob, a router, a group limit and a policy's name)
    that is meant, or raises PolicyError.
    """
    return {"help": help_text, "limits": limits, "tuned": tuned, "derived": derived, "check": check}


def coreset_sizes(spec: RouterSpec, group_limit: GroupLimit) -> tuple[int, int]:
    """The smallest coreset that leaves every token K choices, and the largest."""
    return spec.min_coreset_size(group_limit), spec.num_experts


def default_budget(spec: RouterSpec, group_limit: GroupLimit) -> int:
    """K experts more than the smallest possible coreset: 20 for LLaDA2.0-mini, 16 for LLaDA-MoE and SDAR-MoE."""
    return min(spec.num_experts, spec.min_coreset_size(group_limit) + spec.top_k)


def _count_of_budget(budget: Budget, spec: RouterSpec, group_limit: GroupLimit, policy: str) -> int:
    """Experts that a budget stands for: a count, or a fraction of all experts, rounded down."""
    if isinstance(budget, float):
        if not 0.0 < budget <= 1.0:
            raise PolicyError(
                f"{policy}: a budget is a count of experts (a whole number) or a fraction in (0, 1], got {budget}"
            )
        count = math.floor(budget * spec.num_experts + 1e-9)
    else:
        count = budget
    least, most = coreset_sizes(spec, group_limit)
    if not least <= count <= most:
        shown = f"{budget} ({count} experts)" if isinstance(budget, float) else f"{budget}"
        raise PolicyError(
            f"{policy}: the budget must lie in {least}..{most} experts for this model "
            f"({spec.top_k} experts per token, group limit {group_limit!r}), got {shown}"
        )
    return count


BUDGET = knob(
    "experts in the coreset: a count or a fraction",
    limits=coreset_sizes,
    tuned=True,
    derived=default_budget,
    check=_count_of_budget,
)
BALLOTS = knob("experts a token may vote for: ungrouped, grouped")
GROUP_LIMIT = knob("group rule in the coreset: inside, ignore")


@cache
def worded_knobs(kind: Any) -> Mapping[str, tuple[str, ...]]:
    """The words that each knob with a choice of words takes."""
    hints = get_type_hints(kind)
    return {f.name: get_args(hints[f.name]) for f in fields(kind) if get_origin(hints[f.name]) is Literal}


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingPolicy:
    """A policy: a frozen dataclass whose fields are its knobs. A subclass has a name, knobs and the `rule` they make.

    One that no rule can express overrides `select` or `assign`; it runs on torch under every backend, and reports say
    so. Its rule then says no more than the methods that it did not override need.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, words in worded_knobs(cast(Hashable, type(self))).items():
            if (value := getattr(self, name)) not in words:
                raise PolicyError(f"{self.name}: {name} must be one of {', '.join(words)}, got {value!r}")

    @property
    def group_limit(self) -> GroupLimit:
        """Whether the model's group limit applies inside the coreset, as it does in the model."""
        return "inside"

    @property
    def reuse(self) -> int | None:
        """Denoising steps of a block that one coreset serves; None: one each."""
        return None

    @property
    def needs_steps(self) -> bool:
        """Whether it has to be told of steps: which tokens are masked, or what the block's step before chose."""
        return False

    def rule(self, spec: RouterSpec) -> SharingRule:
        """What the policy means for a router; here: nothing is shared, and tokens run all of their K experts."""
        return SharingRule()

    def bind(self, spec: RouterSpec) -> Self:
        """The same policy with every knob concrete for this router; PolicyError if one cannot work with it."""
        return replace(self, **{f.name: self._concrete(f, spec) for f in fields(self) if f.metadata.get("limits")})

    def _concrete(self, knob: Field[Any], spec: RouterSpec) -> Any:
        value, declared = getattr(self, knob.name), knob.metadata
        if value is None:
            return None if declared["derived"] is None else declared["derived"](spec, self.group_limit)
        if declared["check"] is not None:
            return declared["check"](value, spec, self.group_limit, self.name)
        limits: Limits = declared["limits"]
        if isinstance(limits, str):
            fits, shown = 0.0 < value <= 1.0 if limits == "(0, 1]" else 0.0 <= value < 1.0, str(limits)
        else:
            least, most = limits(spec, self.group_limit)
            fits, shown = least <= value <= most, f"{least}..{most} for this model"
        if not fits:
            raise PolicyError(f"{self.name}: {knob.name} must lie in {shown}, got {value}")
        return value

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """Agree on the experts of each group, from the scores of its live tokens. Pure: mutates nothing.

        previous: coresets of groups that keep theirs, with empty rows for those to select for; no rule looks at it.
        """
        return select(scores, self.rule(spec), spec)

    def assign(
        self, scores: RouterScores, coreset: Coreset, spec: RouterSpec, expert_scale_E: Tensor | None = None
    ) -> RoutingPlan:
        """Give every live token its experts inside the coreset of its group. Pure, too."""
        return assign(scores, coreset, self.rule(spec), spec, expert_scale_E=expert_scale_E)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoresetPolicy(RoutingPolicy):
    """A policy with a coreset: a token still runs K experts, all of them inside what its block agreed on.

    group_limit: "inside" applies the model's group-limited routing within the coreset (dMoE), "ignore" drops it there
    (LLaDA2.2). Without expert groups both are the same. voters: whose scores choose the coreset. reuse: in how
    many steps of a block decoding uses a coreset before it selects another; None is 1.
    """

    group_limit: GroupLimit = field(default="inside", metadata=GROUP_LIMIT)
    voters: Voters = field(default="all", metadata=knob("tokens that vote: all, masked"))
    reuse: int | None = field(default=None, metadata=knob("steps of a block that a coreset serves (default: 1)"))

    def __post_init__(self) -> None:
        RoutingPolicy.__post_init__(self)  # a class with slots is another one than super() knows
        if self.reuse is not None and self.reuse < 1:
            raise PolicyError(f"{self.name}: reuse must be a number of steps, at least 1, got {self.reuse}")

    @property
    def needs_steps(self) -> bool:
        """Whether `voters` or `reuse` ask for it."""
        return self.voters == "masked" or (self.reuse or 1) > 1

    def sharing(self, **fields: Any) -> SharingRule:
        """A rule of these fields, and of the knobs that every policy with a coreset has."""
        return SharingRule(voters=self.voters, reuse=self.reuse or 1, group_limit=self.group_limit, **fields)


def runs_on_torch(policy: RoutingPolicy) -> bool:
    """Whether a policy is routed by its own `select` or `assign`, which only torch runs: no rule expresses it."""
    kind: Any = type(policy)
    return kind.select is not RoutingPolicy.select or kind.assign is not RoutingPolicy.assign


@dataclass(frozen=True, kw_only=True, slots=True)
class Layerwise(RoutingPolicy):
    """`layers[n]` decides in MoE layer n (0-based among MoE layers). `policy_at` looks the layer's one up.

    Not in the POLICIES table: it is made from a policy file or by the tuner, not from a name and knobs.
    """

    name: ClassVar[str] = "layerwise"
    layers: tuple[RoutingPolicy, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise PolicyError(f"{self.name}: expected one policy for each MoE layer, got none")
        if any(isinstance(policy, Layerwise) for policy in self.layers):
            raise PolicyError(f"{self.name}: expected a plain policy in every layer, got a layerwise one")

    @property
    def needs_steps(self) -> bool:
        """Whether the policy of any layer does."""
        return any(policy.needs_steps for policy in self.layers)

    @property
    def group_limit(self) -> GroupLimit:
        """The first layer's; each layer follows its own."""
        return self.layers[0].group_limit

    def bind(self, spec: RouterSpec) -> Layerwise:
        """The same with every layer's policy bound."""
        return replace(self, layers=tuple(policy.bind(spec) for policy in self.layers))

    def at(self, layer: int, num_layers: int) -> RoutingPolicy:
        """The policy of MoE layer `layer` of `num_layers`; PolicyError if this was made for another number."""
        if len(self.layers) != num_layers:
            raise PolicyError(
                f"{self.name}: expected one policy for each of the model's {num_layers} MoE layers, "
                f"got {len(self.layers)}. Tune for this model, or give as many."
            )
        return self.layers[layer]

    def rule(self, spec: RouterSpec) -> SharingRule:
        """Never, nor `select` or `assign`, which ask for it: which layer's policy is meant is not said here."""
        raise PolicyError(f"{self.name}: expected the policy of one layer, got that of all; use at(layer, num_layers)")


def policy_at(policy: RoutingPolicy, layer: int, num_layers: int) -> RoutingPolicy:
    """What decides in MoE layer `layer`: the layer's own policy, or the one that all layers have."""
    return policy.at(layer, num_layers) if isinstance(policy, Layerwise) else policy
