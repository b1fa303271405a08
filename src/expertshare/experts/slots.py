"""Which expert is in which slot, which experts a layer will want next, and which slot is given up for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertshare.errors import ExpertMemoryError
from expertshare.experts.store import LayerStatistics

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_BINS = 32
_PRIOR_VISITS = 64.0


class ReuseForecast:
    """For every expert the chance that its layer uses it at the next visit, and from that, when it will be needed.

    Each expert carries its recent use: the sum over visits, newest first, of 1/2, 1/4, ... where it was used, which is
    in effect a record of the last few visits. How often experts with such a record were used next is counted while
    running, over all layers, so that stable coresets and restless ones both get their own odds.

    Layers run 0 .. N-1, 0 .. N-1: the one that has just run is the one that needs its experts last. So a cache that
    is smaller than one round must not drop what was used longest ago (that comes next), but what is needed last.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.last_NE: Bools = np.zeros((num_layers, num_experts), dtype=np.bool_)
        self._recent_NE: Floats = np.zeros((num_layers, num_experts))
        self._visits_B: Floats = np.full(_BINS, _PRIOR_VISITS)
        self._uses_B: Floats = _PRIOR_VISITS * (np.arange(_BINS) + 0.5) / _BINS
        self._num_layers = num_layers

    def observe(self, layer: int, member_E: Bools) -> None:
        """The layer uses exactly these experts now."""
        bins_E = _bins(self._recent_NE[layer])
        self._visits_B += np.bincount(bins_E, minlength=_BINS)
        self._uses_B += np.bincount(bins_E, weights=member_E, minlength=_BINS)
        self._recent_NE[layer] = (self._recent_NE[layer] + member_E) / 2
        self.last_NE[layer] = member_E

    def layers_until_use(self, now: int, layers_X: Ints | int, experts_X: Ints) -> Floats:
        """How many layers after layer `now` each expert will be needed, on average: 1 is the very next layer.

        With the chance p of being used at each visit, the first use is 1/p - 1 rounds after the next visit.
        """
        bins_X = _bins(self._recent_NE[layers_X, experts_X])
        chance_X = self._uses_B[bins_X] / self._visits_B[bins_X]
        next_visit_X = (np.asarray(layers_X) - now - 1) % self._num_layers + 1
        until_X: Floats = next_visit_X + self._num_layers * (1.0 / chance_X - 1.0)
        return until_X


def _bins(recent_X: Floats) -> NDArray[Any]:
    return np.minimum((recent_X * _BINS).astype(np.int64), _BINS - 1)


class SlotTable:
    """Slots that all layers share.

    slot_of_NE: the slot of each expert, -1 for none. layer_S, expert_S: the expert in a slot, -1 for none. ready_S:
    whether its bytes are there. states_S: the same for a kernel that computes meanwhile, as Arrivals has it; the only
    array that other threads write. Whenever slot_of_NE names a slot, that slot's owner is that expert, even if an
    interrupt stops one of the methods half way; bytes count only where ready_S says so.
    """

    def __init__(self, num_slots: int, num_layers: int, num_experts: int) -> None:
        self.slot_of_NE: Ints = np.full((num_layers, num_experts), -1, dtype=np.int64)
        self.layer_S: Ints = np.full(num_slots, -1, dtype=np.int64)
        self.expert_S: Ints = np.full(num_slots, -1, dtype=np.int64)
        self.ready_S: Bools = np.zeros(num_slots, dtype=np.bool_)
        self.states_S: NDArray[np.uint8] = np.zeros(num_slots, dtype=np.uint8)
        self.ahead_S: Bools = np.zeros(num_slots, dtype=np.bool_)
        """Fetched ahead, and not borrowed since."""

    def place(self, slot: int, layer: int, expert: int, *, ahead: bool) -> None:
        """Give a slot to an expert whose bytes are not there yet, in the place of the one before."""
        self.clear(slot)
        self.states_S[slot] = 0
        self.ahead_S[slot] = ahead
        self.expert_S[slot] = expert
        self.layer_S[slot] = layer
        self.slot_of_NE[layer, expert] = slot

    def tell(self, slot: int, came: bool) -> None:
        """The bytes of a slot's expert are there, or will not come. From any thread."""
        self.states_S[slot] = 1 if came else 2

    def clear(self, slot: int) -> None:
        """Free the slot: it holds no expert."""
        self.ready_S[slot] = False
        layer, expert = self.layer_S[slot], self.expert_S[slot]
        if layer >= 0 and self.slot_of_NE[layer, expert] == slot:
            self.slot_of_NE[layer, expert] = -1
        self.layer_S[slot] = -1


def needed_last(table: SlotTable, forecast: ReuseForecast, layer: int, kept: Ints) -> Ints:
    """All slots but `kept`, in the order in which they are given up while `layer` runs: free ones first, then those
    whose expert is expected to be needed last."""
    open_S = np.ones(len(table.layer_S), dtype=np.bool_)
    open_S[kept] = False
    free = np.flatnonzero(open_S & (table.layer_S < 0))
    taken = np.flatnonzero(open_S & (table.layer_S >= 0))
    until = forecast.layers_until_use(layer, table.layer_S[taken], table.expert_S[taken])
    return np.concatenate((free, taken[np.argsort(-until, kind="stable")]))


def simulate(
    trace: Iterable[tuple[int, Bools]], *, num_slots: int, num_layers: int, num_experts: int
) -> Sequence[LayerStatistics]:
    """What a BudgetedStore with `num_slots` slots and no prefetch would count, layer by layer.

    trace: MoE layer (0-based) and its active experts (bool [E]), in the order of computation. Raises
    ExpertMemoryError where a layer's experts exceed the slots.
    """
    table = SlotTable(num_slots, num_layers, num_experts)
    forecast = ReuseForecast(num_layers, num_experts)
    counts = tuple(LayerStatistics() for _ in range(num_layers))
    for layer, member_E in trace:
        forecast.observe(layer, member_E)
        active = np.flatnonzero(member_E)
        if len(active) > num_slots:
            raise ExpertMemoryError(
                f"MoE layer {layer} needs {len(active)} experts at once: expected at least as many slots, got "
                f"{num_slots}: simulate with more"
            )
        present = table.slot_of_NE[layer, active]
        missing = active[present < 0]
        slots = needed_last(table, forecast, layer, present[present >= 0]) if len(missing) else missing
        for slot, expert in zip(slots.tolist(), missing.tolist(), strict=False):
            table.place(slot, layer, expert, ahead=False)
        counts[layer].count(len(active), len(active) - len(missing))
        counts[layer].reads += len(missing)
    return counts
