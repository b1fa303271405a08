"""Timing several contenders so that noise on the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
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
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return Spread(
        median_s=statistics.median(ordered),
        lower_s=quartiles[0],
        upper_s=quartiles[2],
        min_s=ordered[0],
        max_s=ordered[-1],
        repeats=len(ordered),
    )


def interleave(calls: Mapping[str, Callable[[int], object]], *, repeats: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each contender, after `warmup` rounds: one call of each, then the next round.

    A contender gets a number that grows with every call of anyone, so that it can touch other weights than the call
    before. The order within a round moves on by one each round.
    """
    names, turn = list(calls), 0
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + repeats):
        shift = number % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            calls[name](turn)
            spent = time.perf_counter() - start
            turn += 1
            if number >= warmup:
                seconds[name].append(spent)
    return seconds
