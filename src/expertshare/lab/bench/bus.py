"""How fast a GPU copies from pinned host memory: the bound of a store whose experts do not all fit on the card."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from expertshare.experts.device_slots import pinned
from expertshare.lab.bench.gpu import Walk, gpu_seconds

BUS_BYTES = 2**28
"""Of a measured copy: milliseconds on any bus, so that its launch does not count."""


def bus_bandwidth(
    device: torch.device,
    *,
    num_bytes: int = BUS_BYTES,
    repeats: int = 10,
    allocate: Callable[[int], Tensor] = pinned,
    seconds_of: Callable[[Walk], float] = gpu_seconds,
) -> float:
    """Bytes per second of copies from pinned memory, the median of `repeats` after one to warm up. Raises ConfigError
    where there is no pinned memory."""
    source = allocate(num_bytes)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    copy = partial(target.copy_, source, non_blocking=True)
    seconds = [seconds_of(copy) for _ in range(repeats + 1)]
    return num_bytes / statistics.median(seconds[1:])
