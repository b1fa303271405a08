"""A policy of its own for every MoE layer: what a per-layer budget is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from expertshare.config import GroupLimit, RouterSpec
from expertshare.errors import PolicyError
from expertshare.routing.policy import RoutingPolicy
from expertshare.routing.rule import SharingRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Layerwise(RoutingPolicy):
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
