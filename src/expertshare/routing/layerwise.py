"""A policy of its own for every MoE layer: what a per-layer budget is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from expertshare.config import GroupLimit, RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing.rule import SharingRule
from expertshare.types import Coreset, RouterScores, RoutingPlan, RoutingPolicy

_ONE_LAYER = "layerwise: expected the policy of one layer, got that of all; use at(layer, num_layers)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layerwise:
    """`layers[n]` decides in MoE layer n (0-based among MoE layers). `Runtime.policy_for` looks the layer's one up.

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
    def reuse(self) -> None:
        """Each layer follows its own."""

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

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """Never: which layer's policy is meant is not said here."""
        raise PolicyError(_ONE_LAYER)

    def assign(
        self, scores: RouterScores, coreset: Coreset, spec: RouterSpec, expert_scale_E: Tensor | None = None
    ) -> RoutingPlan:
        """Never, for the same reason."""
        raise PolicyError(_ONE_LAYER)

    def rule(self, spec: RouterSpec) -> SharingRule:
        """Never, for the same reason."""
        raise PolicyError(_ONE_LAYER)


def policy_at(policy: RoutingPolicy, layer: int, num_layers: int) -> RoutingPolicy:
    """What decides in MoE layer `layer`: the layer's own policy, or the one that all layers have."""
    return policy.at(layer, num_layers) if isinstance(policy, Layerwise) else policy
