"""Timing several contenders so that noise on the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Seconds of one call over all repetitions: median, quartiles, least and most."""

    median_s: float
    lower_s: float
    upper_s: float
    min_s: float
    max_s: float
    repeats: int

    def to_json(self) -> dict[str, Any]:
        """The same in milliseconds; `ms` is the median."""
        return {
            "ms": 1e3 * self.median_s,
            "ms_quartiles": [1e3 * self.lower_s, 1e3 * self.upper_s],
            "ms_min": 1e3 * self.min_s,
            "ms_max": 1e3 * self.max_s,
            "repeats": self.repeats,
        }


def spread(seconds: list[float]) -> Spread:
    """Summary of at least one timing."""
    ordered = sorted(seconds)
    lower, median, upper = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return Spread(
        median_s=median,
        lower_s=lower,
        upper_s=upper,
        min_s=ordered[0],
        max_s=ordered[-1],
        repeats=len(ordered),
    )


def in_turns(names: Sequence[str], *, repeats: int, warmup: int) -> Iterator[tuple[str, bool]]:
    """Who is called, and whether it counts: each once per round, in an order that moves on by one each round."""
    for number in range(warmup + repeats):
        shift = number % len(names) if names else 0
        for name in (*names[shift:], *names[:shift]):
            yield name, number >= warmup


def interleave(calls: Mapping[str, Callable[[int], object]], *, repeats: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each contender, after `warmup` rounds.

    A contender gets a number that grows with every call of anyone, so that it can touch other weights than the call
    before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn, (name, counts) in enumerate(in_turns(list(calls), repeats=repeats, warmup=warmup)):
        start = time.perf_counter()
        calls[name](turn)
        if counts:
            seconds[name].append(time.perf_counter() - start)
    return seconds
