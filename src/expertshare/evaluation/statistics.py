"""How sure a measured accuracy is, and how two of them compare on the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest, norm

from expertshare.evaluation.prompts import PromptRecord

CONFIDENCE = 0.95
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
        """The share itself."""
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
        """Plain mean over tasks."""
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
