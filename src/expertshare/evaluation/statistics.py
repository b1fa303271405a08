"""How sure a measured accuracy is, and how two of them compare on the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, multinomial, norm

from expertshare.evaluation.prompts import PromptRecord

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0
UNNAMED_TASK = "unnamed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Proportion:
    """`successes` of `count`, with its Wilson score interval at the 95 % level."""

    successes: int
    count: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself, without its interval."""
        return self.successes / self.count


def proportion(outcomes: Sequence[bool]) -> Proportion:
    """The share of true outcomes; there must be at least one."""
    successes, count = sum(outcomes), len(outcomes)
    interval = binomtest(successes, count).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return Proportion(successes=successes, count=count, low=float(interval.low), high=float(interval.high))


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskAccuracy:
    """Share of right answers: over everything that could be judged (None: nothing could), and by task."""

    overall: Proportion | None
    by_task: Mapping[str, Proportion]


def task_accuracy(records: Sequence[PromptRecord], outcomes: Sequence[bool | None]) -> TaskAccuracy:
    """Count outcomes; records without a task are counted under "unnamed"."""
    by_task: dict[str, list[bool]] = {}
    for record, outcome in zip(records, outcomes, strict=True):
        if outcome is not None:
            by_task.setdefault(record.task or UNNAMED_TASK, []).append(outcome)
    judged = [outcome for outcomes_of_task in by_task.values() for outcome in outcomes_of_task]
    return TaskAccuracy(
        overall=proportion(judged) if judged else None,
        by_task={task: proportion(of_task) for task, of_task in by_task.items()},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedDifference:
    """Share right under a policy minus share right under the reference, on the same items.

    low, high: 95 % interval (Agresti and Min 2005: the Wald interval after half an observation is added to each of
    the four cells). p_value: McNemar's exact test. gained, lost: items that only one of the two got right.
    """

    value: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int


def paired_difference(outcomes: Sequence[bool], reference: Sequence[bool]) -> PairedDifference:
    """Compare item by item; both sequences have the same length, at least one."""
    pairs = list(zip(outcomes, reference, strict=True))
    gained = sum(mine and not theirs for mine, theirs in pairs)
    lost = sum(theirs and not mine for mine, theirs in pairs)
    smoothed, up, down = len(pairs) + 2, gained + 0.5, lost + 0.5
    centre = (up - down) / smoothed
    error = math.sqrt(up + down - (up - down) ** 2 / smoothed) / smoothed
    margin = float(norm.ppf(0.5 + CONFIDENCE / 2)) * error
    return PairedDifference(
        value=(gained - lost) / len(pairs),
        low=max(-1.0, centre - margin),
        high=min(1.0, centre + margin),
        p_value=float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
        gained=gained,
        lost=lost,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Retained:
    """Accuracy as a share of the reference's, by task, and the mean over tasks: plain, and with each capped at 1.

    A plain mean lets a task that got better by chance hide losses elsewhere. Tasks at which the reference gets
    nothing right have no ratio and are left out; the means are None where no task is left.
    """

    by_task: Mapping[str, float]

    @property
    def mean(self) -> float | None:
        """Plain mean of the share over tasks."""
        return _mean(list(self.by_task.values()))

    @property
    def capped_mean(self) -> float | None:
        """Mean over tasks, none of which counts for more than 1."""
        return _mean([min(1.0, ratio) for ratio in self.by_task.values()])


def retained(accuracy: Mapping[str, Proportion], reference: Mapping[str, Proportion]) -> Retained:
    """Ratios for every task of `reference`; both hold the same tasks."""
    return Retained(
        by_task={task: accuracy[task].value / base.value for task, base in reference.items() if base.successes}
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedCounts:
    """Prompts by outcome. kept: solved by both; lost: by vanilla only; gained: by the policy only; neither."""

    kept: int
    lost: int
    gained: int
    neither: int

    @classmethod
    def of(cls, outcomes: Sequence[bool], reference: Sequence[bool]) -> PairedCounts:
        """Count pairs, one for each prompt."""
        pairs = list(zip(outcomes, reference, strict=True))
        return cls(
            kept=pairs.count((True, True)),
            lost=pairs.count((False, True)),
            gained=pairs.count((True, False)),
            neither=pairs.count((False, False)),
        )

    @property
    def total(self) -> int:
        """Number of prompts that were judged."""
        return self.kept + self.lost + self.gained + self.neither

    @property
    def solved(self) -> int:
        """Number of prompts that vanilla solves."""
        return self.kept + self.lost

    @property
    def retained(self) -> float:
        """The policy's accuracy as a share of vanilla's; 0 where vanilla solves nothing."""
        return (self.kept + self.gained) / self.solved if self.solved else 0.0


def capped_mean_interval(tasks: Sequence[PairedCounts]) -> tuple[float, float]:
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


def _capped_ratios(task: PairedCounts, seed: int) -> NDArray[np.float64]:
    """[RESAMPLES]; NaN where vanilla has nothing right."""
    shares = np.array([task.kept, task.gained, task.lost, task.neither]) / task.total
    kept, gained, lost, _ = multinomial(task.total, shares, seed=np.random.default_rng(seed)).rvs(RESAMPLES).T
    base = kept + lost
    ratios = np.full(RESAMPLES, np.nan)
    np.divide(kept + gained, base, out=ratios, where=base > 0)
    capped: NDArray[np.float64] = np.minimum(ratios, 1.0)
    return capped
