"""What this machine can do at best, measured in the same run as everything that is compared with it."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertshare import native
from expertshare.convert.rates import CACHE_FACTOR, GEMM_SHAPES, gemm_rate, last_level_cache_bytes, ones, read_bandwidth
from expertshare.measure.environment import capture_environment


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """bytes_per_s: best read bandwidth. macs_per_s: best rate of a large matrix product in the dtype measured."""

    bytes_per_s: float
    macs_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The machine as found and as measured. macs_per_s: by dtype name. instruction_set: of our kernel, if any."""

    facts: dict[str, Any]
    cache_bytes: int
    instruction_set: str | None
    bytes_per_s: float
    macs_per_s: dict[str, float]

    def peaks(self, dtype: torch.dtype) -> Peaks:
        """The two limits for weights of `dtype`."""
        return Peaks(bytes_per_s=self.bytes_per_s, macs_per_s=self.macs_per_s[dtype_name(dtype)])

    def to_json(self) -> dict[str, Any]:
        """Environment (cpu, threads, versions, commit) and peaks in GB/s and GMAC/s."""
        return {
            **self.facts,
            "cache_bytes": self.cache_bytes,
            "instruction_set": self.instruction_set,
            "bandwidth_gb_per_s": self.bytes_per_s / 1e9,
            "peak_gmac_per_s": {name: rate / 1e9 for name, rate in self.macs_per_s.items()},
        }


def measure_machine(
    *, buffer_bytes: int | None = None, gemm_shapes: Sequence[tuple[int, int, int]] = GEMM_SHAPES
) -> Machine:
    """Look and measure; a few seconds. buffer_bytes: read for the bandwidth, by default 16 times the cache."""
    cache = last_level_cache_bytes()
    return Machine(
        facts=capture_environment().to_json(),
        cache_bytes=cache,
        instruction_set=native.instruction_set() if native.available() else None,
        bytes_per_s=read_bandwidth(buffer_bytes or 2 * CACHE_FACTOR * cache),
        macs_per_s={dtype_name(dtype): gemm_rate(dtype, gemm_shapes) for dtype in (torch.bfloat16, torch.float32)},
    )


READ, MULTIPLY = "(read)", "(multiply)"
"""Names of a yardstick's calls among those of contenders."""


class Yardstick(ABC):
    """One pass over memory and one matrix product, to be timed between the calls that they are compared with.

    On a shared machine bandwidth changes within seconds: a limit from the beginning of a run says little about its end.
    """

    def __init__(self, left: Tensor, right: Tensor, *, pass_bytes: int) -> None:
        """left [m, k], right [k, n]: what is multiplied. pass_bytes: that one pass moves."""
        self._left, self._right = left, right
        self._out = torch.empty(len(left), right.shape[1], dtype=left.dtype, device=left.device)
        self._macs = left.numel() * right.shape[1]
        self._pass_bytes = pass_bytes
        self._read_s: list[float] = []
        self._multiply_s: list[float] = []

    @abstractmethod
    def read(self, turn: int) -> None:
        """One pass; `turn` decides over what."""

    def multiply(self, turn: int) -> None:
        """One large matrix product, the same every turn."""
        del turn
        torch.mm(self._left, self._right, out=self._out)

    def note(self, read_s: Sequence[float], multiply_s: Sequence[float]) -> None:
        """Keep the times of some passes and products."""
        self._read_s += read_s
        self._multiply_s += multiply_s

    def peaks(self) -> Peaks:
        """The limits that the median of all times stands for."""
        return self.peaks_of(self._read_s, self._multiply_s)

    def peaks_of(self, read_s: Sequence[float], multiply_s: Sequence[float]) -> Peaks:
        """The limits that the medians of some passes and products stand for."""
        return Peaks(
            bytes_per_s=self._pass_bytes / statistics.median(read_s),
            macs_per_s=self._macs / statistics.median(multiply_s),
        )


class CpuYardstick(Yardstick):
    """A pass reads half of a buffer."""

    def __init__(
        self, dtype: torch.dtype, *, buffer_bytes: int, gemm_shape: tuple[int, int, int] = GEMM_SHAPES[0]
    ) -> None:
        self._buffer = ones(buffer_bytes // 4)
        self._half = max(1, len(self._buffer) // 2)
        m, k, n = gemm_shape
        super().__init__(torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).T, pass_bytes=4 * self._half)

    def read(self, turn: int) -> None:
        """The first half in even turns, else the second."""
        self._buffer[turn % 2 * self._half :][: self._half].sum()


def dtype_name(dtype: torch.dtype) -> str:
    """What reports call a dtype: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")
