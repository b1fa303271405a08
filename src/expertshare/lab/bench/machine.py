"""What this machine can do at best, measured in the same run as everything that is compared with it: the CPU and its
memory, or the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from expertshare import native
from expertshare.convert.rates import CACHE_FACTOR, GEMM_SHAPES, gemm_rate, last_level_cache_bytes, ones, read_bandwidth
from expertshare.errors import ConfigError, InputError
from expertshare.experts.slot_memory import pinned
from expertshare.kernels.triton import interpreted, unavailable_reason
from expertshare.lab.bench.timing import Call, Walk, gpu_seconds, take_turns_on_gpu
from expertshare.measure.memory import available_memory_bytes
from expertshare.measure.report import capture_environment

CPU = torch.device("cpu")
GPU_GEMM_SIZE = 8192
BUS_BYTES = 2**28
"""Of a measured copy: milliseconds on any bus, so that its launch does not count."""
UNKNOWN_MEMORY_BYTES = 4 * 10**9
"""What may be used where the system does not say how much is free."""
_READ, _MULTIPLY = "(read)", "(multiply)"  # names of a yardstick's calls among those of contenders
_DTYPES = (torch.bfloat16, torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """What reports call a dtype: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """bytes_per_s: best read bandwidth. macs_per_s: best rate of a large matrix product in the dtype measured."""

    bytes_per_s: float
    macs_per_s: float

    def to_json(self) -> dict[str, float]:
        """The limits as results have them: plain values."""
        return {"bandwidth_gb_per_s": self.bytes_per_s / 1e9, "peak_gmac_per_s": self.macs_per_s / 1e9}


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
        macs_per_s={dtype_name(dtype): gemm_rate(dtype, gemm_shapes) for dtype in _DTYPES},
    )


def measure_gpu(device: torch.device) -> Machine:
    """Look at the card and measure its limits; a few seconds."""
    properties = torch.cuda.get_device_properties(device)
    cache = int(properties.L2_cache_size)
    peaks: dict[str, Peaks] = {}
    for dtype in _DTYPES:
        yardstick = yardstick_for(dtype, cache, device)
        times = take_turns_on_gpu(yardstick.calls(), turns=4, repeats=10, warmup=2)
        peaks[dtype_name(dtype)] = yardstick.note(times.seconds)
    return Machine(
        facts={**capture_environment(device).to_json(), "gpu": gpu_facts(properties)},
        cache_bytes=cache,
        instruction_set=f"sm_{properties.major}{properties.minor}",
        bytes_per_s=max(found.bytes_per_s for found in peaks.values()),
        macs_per_s={name: found.macs_per_s for name, found in peaks.items()},
    )


def gpu_device() -> torch.device:
    """The current GPU. Raises ConfigError where there is none, or where Triton is missing or only interprets."""
    reason = unavailable_reason()
    if not torch.cuda.is_available():
        reason = "torch sees no GPU (torch.cuda.is_available() is false)"
    elif interpreted():
        reason = "TRITON_INTERPRET is set, so kernels would run on the CPU: unset it"
    if reason is not None:
        raise ConfigError(f"--device cuda: {reason}. Leave --device out to measure this machine's CPU.")
    return torch.device("cuda", torch.cuda.current_device())


def gpu_facts(properties: Any) -> dict[str, Any]:
    """What a figure depends on besides the kernels: card, driver, CUDA and Triton."""
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "triton": metadata.version("triton"),
    }


def driver_version() -> str | None:
    """As the kernel module says it; None where it does not."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def memory_limit_bytes(gigabytes: float | None, device: torch.device = CPU) -> int:
    """The limit as given, else three quarters of the device's memory that is free."""
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory_bytes()
    return UNKNOWN_MEMORY_BYTES if free is None else free * 3 // 4


def check_memory(needed: int, limit: int, what: str, advice: str) -> None:
    """Raise InputError where `what` does not fit."""
    if needed > limit:
        raise InputError(
            f"{what} needs {needed / 1e9:.1f} GB, more than the limit of {limit / 1e9:.1f} GB: "
            f"{advice}, or raise --memory"
        )


class Yardstick:
    """One pass over memory and one matrix product, to be timed between the calls that they are compared with.

    On a shared machine bandwidth changes within seconds: a limit from the beginning of a run says little about its end.
    """

    def __init__(self, left: Tensor, right: Tensor, buffer: Tensor, *, copies: bool) -> None:
        """left [m, k], right [k, n]: what is multiplied. buffer: float32; a pass reads half of it, or, on a GPU, copies
        it onto the other half, and bytes read and written both count."""
        self._left, self._right, self._copies = left, right, copies
        self._out = torch.empty(len(left), right.shape[1], dtype=left.dtype, device=left.device)
        half = max(1, len(buffer) // 2)
        self._halves = buffer[:half], buffer[half : 2 * half]
        self._pass_bytes = (2 if copies else 1) * 4 * half
        self._seconds: dict[str, list[float]] = {_READ: [], _MULTIPLY: []}

    def read(self, turn: int) -> None:
        """One pass over the first half in even turns, else over the second; a copy goes to the one named."""
        if self._copies:
            self._halves[turn % 2].copy_(self._halves[1 - turn % 2])
        else:
            self._halves[turn % 2].sum()

    def multiply(self, turn: int) -> None:
        """One large matrix product, the same every turn."""
        del turn
        torch.mm(self._left, self._right, out=self._out)

    def calls(self) -> dict[str, Call]:
        """What is to be timed, under names that no contender has."""
        return {_READ: self.read, _MULTIPLY: self.multiply}

    def note(self, seconds: Mapping[str, Sequence[float]]) -> Peaks:
        """Keep the times of some of these calls; the limits that their medians stand for."""
        for name, kept in self._seconds.items():
            kept += seconds[name]
        return self._peaks(seconds)

    def peaks(self) -> Peaks:
        """The limits that the medians of all times stand for."""
        return self._peaks(self._seconds)

    def _peaks(self, seconds: Mapping[str, Sequence[float]]) -> Peaks:
        macs = self._left.numel() * self._right.shape[1]
        return Peaks(
            bytes_per_s=self._pass_bytes / statistics.median(seconds[_READ]),
            macs_per_s=macs / statistics.median(seconds[_MULTIPLY]),
        )


def yardstick_for(dtype: torch.dtype, cache_bytes: int, device: torch.device) -> Yardstick:
    """The device's, with a buffer that is large beside its cache."""
    length = 2 * CACHE_FACTOR * cache_bytes // 4
    if device.type == "cuda":
        left, right = (torch.randn(GPU_GEMM_SIZE, GPU_GEMM_SIZE, device=device, dtype=dtype) for _ in range(2))
        return Yardstick(left, right, torch.ones(length, device=device), copies=True)
    m, k, n = GEMM_SHAPES[0]
    return Yardstick(torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).T, ones(length), copies=False)


def bus_bandwidth(
    device: torch.device,
    *,
    num_bytes: int = BUS_BYTES,
    repeats: int = 10,
    allocate: Callable[[int], Tensor] = pinned,
    seconds_of: Callable[[Walk], float] = gpu_seconds,
) -> float:
    """Bytes per second that a GPU copies from pinned host memory, the bound of a store whose experts do not all fit on
    the card: the median of `repeats` after one to warm up. Raises ConfigError where there is no pinned memory."""
    source = allocate(num_bytes)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    copy = partial(target.copy_, source, non_blocking=True)
    seconds = [seconds_of(copy) for _ in range(repeats + 1)]
    return num_bytes / statistics.median(seconds[1:])
