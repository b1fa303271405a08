"""What decoding would take: time from bytes, products and measured rates (the formula of docs/memory.md), and hits of
a budgeted store by replaying a recorded generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from expertshare.config import ModelConfig
from expertshare.convert.rates import Rates
from expertshare.experts.recording import RoutingRecord
from expertshare.experts.slots import Bools, simulate


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One forward. dense_bytes and dense_parameters: without the input embedding. experts: used, of all layers.
    pair_parameters: of the experts that one position runs, over all layers. positions: computed, of all sequences."""

    dense_bytes: int
    dense_parameters: int
    experts: float
    slab_bytes: int
    pair_parameters: int
    positions: int


def seconds_per_forward(step: Step, rates: Rates, *, hit_rate: float) -> float | None:
    """The larger of reading all weights from memory and computing, and then the reads of what was not there.

    None where experts have to be read and nobody knows how fast.
    """
    reading = (step.dense_bytes + step.experts * step.slab_bytes) / rates.memory_bytes_per_s
    computing = step.positions * (step.dense_parameters + step.pair_parameters) / rates.macs_per_s
    missing = step.experts * (1.0 - hit_rate) * step.slab_bytes
    if missing == 0:
        return max(reading, computing)
    if rates.storage_bytes_per_s is None:
        return None
    return max(reading, computing) + missing / rates.storage_bytes_per_s


def tokens_per_s(seconds: float, config: ModelConfig, *, batch_size: int, per_step: float) -> float:
    """Of decoding: a block takes block_length / per_step denoising forwards and, with a cache, one to commit."""
    steps = config.block_length / per_step
    forwards = steps if config.attention == "full" else steps + 1
    return batch_size * config.block_length / (forwards * seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """hit_rate: share of requests that were in a slot already; by layer and of all. Slots are empty at the start."""

    hit_rate: float
    hit_rate_by_layer: tuple[float, ...]


def replay(record: RoutingRecord, num_slots: int) -> Replay:
    """Serve the record's requests from `num_slots` slots with the store's own eviction, without reading ahead.

    What is read ahead turns part of the misses into shorter waits, so a real store does not do worse. Raises
    ExpertMemoryError where a layer's experts exceed the slots.
    """
    layers = simulate(
        _visits(record), num_slots=num_slots, num_layers=record.num_layers, num_experts=record.num_experts
    )
    requests = sum(layer.requests for layer in layers)
    return Replay(
        hit_rate=sum(layer.hits or 0 for layer in layers) / max(1, requests),
        hit_rate_by_layer=tuple(layer.hit_rate or 0.0 for layer in layers),
    )


def _visits(record: RoutingRecord) -> Iterator[tuple[int, Bools]]:
    """Layers with their active experts, in the order in which they ran."""
    for layers in record.forwards:
        for layer, ids in enumerate(layers):
            member_E = np.zeros(record.num_experts, dtype=np.bool_)
            member_E[list(ids)] = True
            yield layer, member_E


def most_at_once(record: RoutingRecord) -> int:
    """Most experts that any layer of any forward used."""
    return max(len(ids) for layers in record.forwards for ids in layers)


def mean_at_once(record: RoutingRecord) -> float:
    """Experts of a layer, mean over layers and forwards."""
    counts = [len(ids) for layers in record.forwards for ids in layers]
    return sum(counts) / len(counts)
