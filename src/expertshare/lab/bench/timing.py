"""Timing several contenders so that noise on the machine hits all of them alike; on a GPU between two events, captured
in a graph where that can be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

MOST_TURNS = 32
"""Calls in one timed walk: enough to see other weights in each, few enough to capture quickly."""

Call = Callable[[int], object]
Walk = Callable[[], object]


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Milliseconds of at least one timing, as results have them: median (`ms`), quartiles, least and most."""
    ordered = sorted(1e3 * each for each in seconds)
    lower, median, upper = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "ms": median,
        "ms_quartiles": [lower, upper],
        "ms_min": ordered[0],
        "ms_max": ordered[-1],
        "repeats": len(ordered),
    }


def timed(
    calls: Mapping[Any, Call],
    device: torch.device,
    *,
    turns: int,
    repeats: int,
    warmup: int,
    host_bound: Collection[Any] = (),
) -> tuple[dict[Any, list[float]], dict[Any, bool]]:
    """Seconds of each call on either kind of device, and on a GPU whether the calls ran inside a graph."""
    if device.type == "cpu":
        return interleave(calls, repeats=repeats, warmup=warmup), {}
    times = take_turns_on_gpu(calls, turns=turns, repeats=repeats, warmup=warmup, host_bound=host_bound)
    return times.seconds, times.captured


def interleave(calls: Mapping[Any, Call], *, repeats: int, warmup: int) -> dict[Any, list[float]]:
    """Seconds of `repeats` calls of each contender, after `warmup` rounds.

    A contender gets a number that grows with every call of anyone, so that it can touch other weights than the call
    before.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for turn, (name, counts) in enumerate(_in_turns(list(calls), repeats=repeats, warmup=warmup)):
        start = time.perf_counter()
        calls[name](turn)
        if counts:
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _in_turns(names: Sequence[Any], *, repeats: int, warmup: int) -> Iterator[tuple[Any, bool]]:
    """Which is called, and whether it counts: each once per round, in an order that moves on by one each round."""
    for number in range(warmup + repeats):
        shift = number % len(names) if names else 0
        for name in (*names[shift:], *names[:shift]):
            yield name, number >= warmup


@dataclass(frozen=True, slots=True)
class GpuTimes:
    """seconds: of one call, by name. captured: whose calls ran inside a graph. reasons: why the others did not."""

    seconds: dict[Any, list[float]]
    captured: dict[Any, bool]
    reasons: dict[Any, str]


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


def take_turns_on_gpu(
    calls: Mapping[Any, Call],
    *,
    turns: int,
    repeats: int,
    warmup: int,
    host_bound: Collection[Any] = (),
    capture: Callable[[Walk], Walk] = captured,
    seconds_of: Callable[[Walk], float] = gpu_seconds,
) -> GpuTimes:
    """Seconds per call of each contender, from `repeats` walks of `turns` calls; contenders are interleaved.

    A call gets its turn's number, so that each one of a walk touches other weights than the one before it. A walk is
    captured in a graph, without gaps for launching, unless its contender is `host_bound` (it waits for the GPU in
    between) or capturing fails; then it is launched call by call, as its users would.
    """
    walks: dict[Any, Walk] = {}
    reasons: dict[Any, str] = {}
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
            reasons[name] = f"cannot be captured: {first_line(error)}"
    seconds: dict[Any, list[float]] = {name: [] for name in walks}
    for name, counts in _in_turns(list(walks), repeats=repeats, warmup=warmup):
        spent = seconds_of(walks[name]) / turns
        if counts:
            seconds[name].append(spent)
    return GpuTimes(seconds, {name: name not in reasons for name in walks}, reasons)


def first_line(error: Exception) -> str:
    """Of an error's message, for a reason that is told in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def _walk(call: Call, turns: int) -> None:
    for turn in range(turns):
        call(turn)
