"""Who has to go when a slot is wanted, and what hit rate that gives on a trace, without reading anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from expertshare.errors import ExpertMemoryError
from expertshare.experts.forecast import Bools, Ints, ReuseForecast
from expertshare.experts.slots import SlotTable
from expertshare.experts.statistics import LayerCount, LayerStatistics, fresh_counts


def needed_last(table: SlotTable, forecast: ReuseForecast, layer: int, kept: Ints) -> Ints:
    """All slots but `kept`, in the order in which they are given up while `layer` runs: free ones first, then those
    whose expert is expected to be needed last."""
    open_S = np.ones(table.num_slots, dtype=np.bool_)
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
    counts = fresh_counts(num_layers)
    for layer, member_E in trace:
        forecast.observe(layer, member_E)
        _bring(table, forecast, layer, np.flatnonzero(member_E), counts[layer])
    return tuple(count.freeze() for count in counts)


def _bring(table: SlotTable, forecast: ReuseForecast, layer: int, active: Ints, count: LayerCount) -> None:
    present = table.slot_of_NE[layer, active]
    missing = active[present < 0]
    if len(active) > table.num_slots:
        raise ExpertMemoryError(
            f"MoE layer {layer} needs {len(active)} experts at once: expected at least as many slots, got "
            f"{table.num_slots}: simulate with more"
        )
    if len(missing):
        slots = needed_last(table, forecast, layer, present[present >= 0])
        for slot, expert in zip(slots.tolist(), missing.tolist(), strict=False):
            table.place(slot, layer, expert, ahead=False)
    count.requests += len(active)
    count.hits += len(active) - len(missing)
    count.reads += len(missing)
