"""A bootstrap interval for what is retained of vanilla's accuracy, each task capped at 1, on average over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import multinomial

from expertshare.evaluation.statistics import CONFIDENCE

RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCounts:
    """Items of one task by who got them right: both, the policy only, vanilla only, neither."""

    both: int
    gained: int
    lost: int
    neither: int

    @property
    def count(self) -> int:
        """All items."""
        return self.both + self.gained + self.lost + self.neither


def count_pairs(outcomes: Sequence[bool], reference: Sequence[bool]) -> PairCounts:
    """Count the outcomes on the same items; equal lengths."""
    pairs = list(zip(outcomes, reference, strict=True))
    return PairCounts(
        both=pairs.count((True, True)),
        gained=pairs.count((True, False)),
        lost=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


def capped_mean_interval(tasks: Sequence[PairCounts]) -> tuple[float, float]:
    """Percentile interval at the 95 % level of the mean over tasks of min(1, accuracy / vanilla's); at least one task.

    Items are drawn with replacement within every task, a policy's and vanilla's outcome together; drawing the four
    counts from their multinomial distribution is the same. A draw in which vanilla has nothing right leaves that task
    out of its mean.
    """
    ratios = np.stack([_capped_ratios(task, SEED + number) for number, task in enumerate(tasks)])
    counted = np.isfinite(ratios)
    sums = np.where(counted, ratios, 0.0).sum(axis=0)
    means = sums[counted.any(axis=0)] / counted.sum(axis=0)[counted.any(axis=0)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _capped_ratios(task: PairCounts, seed: int) -> NDArray[np.float64]:
    """[RESAMPLES]; NaN where vanilla has nothing right."""
    shares = np.array([task.both, task.gained, task.lost, task.neither]) / task.count
    both, gained, lost, _ = multinomial(task.count, shares, seed=np.random.default_rng(seed)).rvs(RESAMPLES).T
    base = both + lost
    ratios = np.full(RESAMPLES, np.nan)
    np.divide(both + gained, base, out=ratios, where=base > 0)
    capped: NDArray[np.float64] = np.minimum(ratios, 1.0)
    return capped
