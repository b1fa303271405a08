"""Measuring on a GPU: the card and its limits, and calls between two events, captured in a graph where they can be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch

from expertshare.convert.rates import CACHE_FACTOR
from expertshare.errors import ConfigError
from expertshare.kernels.triton import interpreted, unavailable_reason
from expertshare.lab.bench.machine import Machine, Peaks, Yardstick, dtype_name
from expertshare.lab.bench.timing import in_turns, interleave
from expertshare.measure.environment import capture_environment

GEMM_SIZE = 8192
MOST_TURNS = 32
"""Calls in one timed walk: enough to see other weights in each, few enough to capture quickly."""

Walk = Callable[[], object]


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


@dataclass(frozen=True, slots=True)
class GpuTimes:
    """seconds: of one call, by name. captured: whose calls ran inside a graph. reasons: why the others did not."""

    seconds: dict[str, list[float]]
    captured: dict[str, bool]
    reasons: dict[str, str]


def take_turns_on_gpu(
    calls: Mapping[str, Callable[[int], object]],
    *,
    turns: int,
    repeats: int,
    warmup: int,
    host_bound: Collection[str] = (),
    capture: Callable[[Walk], Walk] | None = None,
    seconds_of: Callable[[Walk], float] | None = None,
) -> GpuTimes:
    """Seconds per call of each contender, from `repeats` walks of `turns` calls; contenders are interleaved.

    A call gets its turn's number, so that each one of a walk touches other weights than the one before it. A walk is
    captured in a graph, without gaps for launching, unless its contender is `host_bound` (it waits for the GPU in
    between) or capturing fails; then it is launched call by call, as its users would.
    """
    capture, seconds_of = capture or captured, seconds_of or gpu_seconds
    walks: dict[str, Walk] = {}
    reasons: dict[str, str] = {}
    for name, call in calls.items():
        walk = partial(_walk, call, turns)
        for _ in range(2):  # compiles, allocates, chooses
            walk()
        walks[name] = walk
        if name in host_bound:
            reasons[name] = "waits for the GPU between its kernels"
            continue
        try:
            walks[name] = capture(walk)
        except RuntimeError as error:
            reasons[name] = f"cannot be captured: {str(error).splitlines()[0] if str(error) else repr(error)}"
    seconds: dict[str, list[float]] = {name: [] for name in walks}
    for name, counts in in_turns(list(walks), repeats=repeats, warmup=warmup):
        spent = seconds_of(walks[name]) / turns
        if counts:
            seconds[name].append(spent)
    return GpuTimes(seconds, {name: name not in reasons for name in walks}, reasons)


def timed(
    calls: Mapping[str, Callable[[int], object]],
    device: torch.device,
    *,
    turns: int,
    repeats: int,
    warmup: int,
    host_bound: Collection[str] = (),
) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """Seconds of each call on either kind of device, and on a GPU whether the calls ran inside a graph."""
    if device.type == "cpu":
        return interleave(calls, repeats=repeats, warmup=warmup), {}
    times = take_turns_on_gpu(calls, turns=turns, repeats=repeats, warmup=warmup, host_bound=host_bound)
    return times.seconds, times.captured


def _walk(call: Callable[[int], object], turns: int) -> None:
    for turn in range(turns):
        call(turn)


def captured(walk: Walk) -> Walk:
    """The replay of a walk that has run before. RuntimeError where it cannot be captured."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walk()
    return graph.replay


def gpu_seconds(walk: Walk) -> float:
    """Between two events around the walk, on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    walk()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class GpuYardstick(Yardstick):
    """A pass copies half of a buffer within the card's memory: bytes read and written both count."""

    def __init__(self, dtype: torch.dtype, *, buffer_bytes: int, device: torch.device) -> None:
        self._buffer = torch.ones(buffer_bytes // 4, device=device)
        self._half = max(1, len(self._buffer) // 2)
        left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device, dtype=dtype) for _ in range(2))
        super().__init__(left, right, pass_bytes=2 * 4 * self._half)

    def read(self, turn: int) -> None:
        """One half onto the other, the other way round than the turn before."""
        halves = self._buffer[: self._half], self._buffer[self._half : 2 * self._half]
        halves[turn % 2].copy_(halves[1 - turn % 2])


def measure_gpu(device: torch.device) -> Machine:
    """Look at the card and measure its limits; a few seconds."""
    properties = torch.cuda.get_device_properties(device)
    cache = int(properties.L2_cache_size)
    peaks: dict[str, Peaks] = {}
    for dtype in (torch.bfloat16, torch.float32):
        yardstick = GpuYardstick(dtype, buffer_bytes=2 * CACHE_FACTOR * cache, device=device)
        calls = {"read": yardstick.read, "multiply": yardstick.multiply}
        times = take_turns_on_gpu(calls, turns=4, repeats=10, warmup=2).seconds
        yardstick.note(times["read"], times["multiply"])
        peaks[dtype_name(dtype)] = yardstick.peaks()
    return Machine(
        facts={**capture_environment(device).to_json(), "gpu": gpu_facts(properties)},
        cache_bytes=cache,
        instruction_set=f"sm_{properties.major}{properties.minor}",
        bytes_per_s=max(found.bytes_per_s for found in peaks.values()),
        macs_per_s={name: found.macs_per_s for name, found in peaks.items()},
    )


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


def gpu_memory_bytes(gigabytes: float | None) -> int:
    """The limit as given, else three quarters of the card's memory that is free."""
    return int(gigabytes * 1e9) if gigabytes is not None else torch.cuda.mem_get_info()[0] * 3 // 4
