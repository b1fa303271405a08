"""Time of a forward from bytes, products and measured rates: the formula of docs/memory.md."""

from __future__ import annotations

from dataclasses import dataclass

from expertshare.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What the machine can do, measured. storage_bytes_per_s: None where there is no file to read; storage_direct:
    whether it was read past the page cache."""

    memory_bytes_per_s: float
    macs_per_s: float
    storage_bytes_per_s: float | None = None
    storage_direct: bool = False


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
