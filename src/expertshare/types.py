"""The values that flow through one block: scores -> coreset -> plan -> experts.

Shape legend, used all over the package: B sequences, S positions, G sharing groups (one block of one sequence),
L tokens per group, T = G * L tokens, E experts, K experts per token, N MoE layers, D model features, F expert hidden
features, H heads, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from expertshare.config import GroupLimit, RouterSpec


@dataclass(frozen=True, slots=True)
class RouterScores:
    """What the router thinks of every expert, for every token of every sharing group.

    affinity_GLE: float32, mixing weights come from here. choice_GLE: float32, ranking comes from here (the affinity
    plus the balancing bias, where the model has one; else the same tensor). live_GL: bool, False is padding, which
    never votes and never runs an expert.
    """

    affinity_GLE: Tensor
    choice_GLE: Tensor
    live_GL: Tensor


@dataclass(frozen=True, slots=True)
class Coreset:
    """The experts that each sharing group may use. member_GE: bool."""

    member_GE: Tensor


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Which experts every token runs, and how their outputs are mixed.

    expert_ids_TK: int64, best first; -1 marks an unused slot (padding, a dropped expert). Never outside the coreset.
    weights_TK: float32, 0 in unused slots. active_E: bool, the union over all tokens: what must be resident.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    active_E: Tensor


class RoutingPolicy(Protocol):
    """Decides what a block shares. Implementations are frozen dataclasses whose fields are their knobs."""

    @property
    def name(self) -> str:
        """Name in the POLICIES table."""
        ...

    @property
    def group_limit(self) -> GroupLimit:
        """Whether the model's group limit is applied inside the coreset ("inside") or dropped there ("ignore")."""
        ...

    def bind(self, spec: RouterSpec) -> RoutingPolicy:
        """The same policy with every knob concrete for this router; PolicyError if one cannot work with it."""
        ...

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        """Agree on the experts of each group, from the scores of its live tokens. Pure; mutates nothing."""
        ...

    def keep(self, affinity_TK: Tensor) -> Tensor | None:
        """Which of a token's experts (best first) it keeps: bool [T, K], or None for all of them."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """Weights of one layer's experts, ready to compute with.

    gate_up_EHD: [E, 2F, D], gate rows first, then up rows. down_EDF: [E, D, F]. Either float32 or bfloat16.
    """

    gate_up_EHD: Tensor
    down_EDF: Tensor


class ExpertStore(Protocol):
    """Where experts live. `borrow` guarantees that the active experts of the bank are usable inside the context."""

    def borrow(self, layer: int, active_E: Tensor) -> AbstractContextManager[ExpertBank]:
        """The bank of MoE layer `layer` (0-based among MoE layers), with at least `active_E` (bool) usable."""
        ...
