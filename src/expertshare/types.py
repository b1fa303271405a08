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

PANEL_ROWS = 16
"""Rows of quantised experts that lie interleaved: the lanes of a vector of 512 bits."""


@dataclass(frozen=True, slots=True)
class RouterScores:
    """What the router thinks of every expert, for every token of every sharing group.

    affinity_GLE: float32, mixing weights come from here. choice_GLE: float32, ranking comes from here (the affinity
    plus the balancing bias, where the model has one; else the same tensor). live_GL: bool, False is padding, which
    never votes and never runs an expert. masked_GL: bool, tokens that are still to be decided; None where nobody says,
    which policies take for none.
    """

    affinity_GLE: Tensor
    choice_GLE: Tensor
    live_GL: Tensor
    masked_GL: Tensor | None = None


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


@dataclass(frozen=True, slots=True)
class Routed:
    """What one layer's routing gives: the plan, and what it asks of the experts.

    load_E: int64, (token, expert) pairs of each expert. group_experts_G: int64, unique experts of each sharing group.
    coreset: None where an implementation had no reason to write it out.
    """

    plan: RoutingPlan
    load_E: Tensor
    group_experts_G: Tensor
    coreset: Coreset | None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ExpertBank:
    """Weights of one layer's experts, ready to compute with.

    gate_up_EHD: [E, 2F, D], gate rows first, then up rows. down_EDF: [E, D, F]. Either float32 or bfloat16.
    Two banks are equal only if they are the same one, so that a kernel can remember which it has checked.
    """

    gate_up_EHD: Tensor
    down_EDF: Tensor


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """One projection of every expert as small integers: P panels of PANEL_ROWS rows, each row of `depth` weights.

    Eight bits: codes_EPC int8 [E, P, 16 * depth], w = scale * code; scales_EPG float32 [E, P, 16].
    Four bits: codes_EPC uint8 [E, P, 8 * depth], two codes 0..15 a byte; scales_EPG float16
    [E, P, depth / group_size * 16], the 16 rows of a group side by side; w = scale * (code - 8), or
    scale * code + minimum where `minima`, of the shape and dtype of scales, is given.
    kernels/quantise says how codes lie in a panel. An expert is contiguous; experts may lie apart.
    """

    codes_EPC: Tensor
    scales_EPG: Tensor
    minima_EPG: Tensor | None
    bits: int
    group_size: int

    @property
    def rows(self) -> int:
        """Output features of the projection."""
        return self.codes_EPC.shape[-2] * PANEL_ROWS

    @property
    def depth(self) -> int:
        """Input features of a row."""
        return self.codes_EPC.shape[-1] * 8 // (self.bits * PANEL_ROWS)


@dataclass(frozen=True, slots=True)
class QuantisedTable:
    """An embedding or a head as int8, in panels as QuantisedWeight: codes int8 [P, 16 * D], scales float32 [P, 16].

    num_rows: V; rows behind it, which fill the last panel, are zeros.
    """

    codes_PC: Tensor
    scales_PG: Tensor
    num_rows: int

    @property
    def depth(self) -> int:
        """Input features of one row."""
        return self.codes_PC.shape[-1] // PANEL_ROWS


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class QuantisedBank:
    """One layer's experts quantised; rows as in ExpertBank: gate_up [E, 2F, D], down [E, D, F]. Equal as there."""

    gate_up: QuantisedWeight
    down: QuantisedWeight


Bank = ExpertBank | QuantisedBank


class Arrivals(Protocol):
    """Experts of a loan that are still on their way into the bank.

    states_S: uint8 [rows of the bank], contiguous: 0 for an expert on its way, 1 for one that is there, which another
    thread writes behind its bytes, 2 for one that will not come.
    """

    @property
    def states_S(self) -> Tensor:
        """The state of every row of the bank, as the class says."""
        ...

    def wait(self) -> None:
        """Until all are there. Raises what keeps one away."""
        ...

    def waited(self, seconds: float) -> None:
        """Somebody who looked at the states waited so long for them."""
        ...


@dataclass(frozen=True, slots=True)
class Loan:
    """Experts that a store has lent.

    slot_of_E: int64 [E], the row of the bank that holds expert e, -1 for an absent one; None where expert e is row e.
    arrivals: None where all are there.
    """

    bank: Bank
    slot_of_E: Tensor | None = None
    arrivals: Arrivals | None = None


class ExpertStore(Protocol):
    """Where experts live. Inside the context of `borrow` the active experts of the bank stay where they are."""

    @property
    def resident(self) -> bool:
        """Whether every expert lies on the compute device, at an address that never changes: then a step that was
        captured once can be replayed, and borrowing tells the store nothing that it needs."""
        ...

    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> AbstractContextManager[Loan]:
        """The experts of MoE layer `layer` (0-based among MoE layers), with at least `active_E` (bool) usable.

        early: some may still be on their way, if the loan's arrivals say so.
        """
        ...
