"""What a budgeted store would have found in its slots, had it served a recorded generation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expertshare.experts.forecast import ReuseForecast
from expertshare.experts.recording import RoutingRecord
from expertshare.experts.slots import SlotTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """hit_rate: share of requests that were in a slot already; by layer and of all. Slots are empty at the start."""

    hit_rate: float
    hit_rate_by_layer: tuple[float, ...]


def replay(record: RoutingRecord, num_slots: int) -> Replay:
    """Serve the record's requests from `num_slots` slots with the eviction of BudgetedStore, without reading ahead.

    What is read ahead turns part of the misses into shorter waits, so a real store does not do worse. num_slots must
    hold the experts of any one layer.
    """
    table = SlotTable(num_slots, record.num_layers, record.num_experts)
    forecast = ReuseForecast(record.num_layers, record.num_experts)
    requests, hits = np.zeros(record.num_layers), np.zeros(record.num_layers)
    for layers in record.forwards:
        for layer, ids in enumerate(layers):
            active = np.asarray(ids, dtype=np.int64)
            member_E = np.zeros(record.num_experts, dtype=np.bool_)
            member_E[active] = True
            forecast.observe(layer, member_E)
            present = table.slot_of_NE[layer, active] >= 0
            requests[layer] += len(active)
            hits[layer] += present.sum()
            _bring(table, forecast, layer, active[~present], set(table.slot_of_NE[layer, active[present]].tolist()))
    return Replay(
        hit_rate=float(hits.sum() / max(1.0, requests.sum())),
        hit_rate_by_layer=tuple((hits / np.maximum(1.0, requests)).tolist()),
    )


def _bring(table: SlotTable, forecast: ReuseForecast, layer: int, missing: np.ndarray, lent: set[int]) -> None:
    """Put the missing experts into free slots, then into those of experts that are needed last."""
    if not len(missing):
        return
    open_S = np.ones(table.num_slots, dtype=np.bool_)
    open_S[list(lent)] = False
    free = np.flatnonzero(open_S & (table.layer_S < 0))
    taken = np.flatnonzero(open_S & (table.layer_S >= 0))
    until = forecast.layers_until_use(layer, table.layer_S[taken], table.expert_S[taken])
    slots = np.concatenate((free, taken[np.argsort(-until, kind="stable")]))[: len(missing)]
    assert len(slots) == len(missing)
    for slot, expert in zip(slots.tolist(), missing.tolist(), strict=True):
        table.place(slot, layer, expert, ahead=False)


def most_at_once(record: RoutingRecord) -> int:
    """Most experts that any layer of any forward used."""
    return max(len(ids) for layers in record.forwards for ids in layers)


def mean_at_once(record: RoutingRecord) -> float:
    """Experts of a layer, mean over layers and forwards."""
    counts = [len(ids) for layers in record.forwards for ids in layers]
    return sum(counts) / len(counts)
