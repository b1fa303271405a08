"""Real generation on one part of the prompts: what a policy keeps of vanilla's quality there, and what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from expertshare.evaluation.runner import Outcome, PolicyRunner
from expertshare.evaluation.statistics import UNNAMED_TASK, PairedCounts
from expertshare.routing import RoutingPolicy, policy_label
from expertshare.tuning.certificate import lower_bound, p_value
from expertshare.tuning.options import Judged
from expertshare.tuning.policy_file import policy_json

# Of a measurement of latency.
ROUNDS, PROMPTS = 5, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """A policy on one part of the prompts.

    counts, by_task: outcomes beside vanilla's. unique_experts: per block and layer in denoising forwards;
    expert_bytes: per prompt, all forwards; steps: denoising forwards, of whole batches. seconds_per_block: None unless
    latency was measured.
    """

    policy: RoutingPolicy
    counts: PairedCounts
    by_task: Mapping[str, PairedCounts]
    unique_experts: float
    expert_bytes: float
    steps: int
    seconds_per_block: float | None = None

    def cost(self, kind: str) -> float:
        """In the unit of the kind: experts, bytes per prompt, or seconds per block."""
        costs = {"experts": self.unique_experts, "bytes": self.expert_bytes, "latency": self.seconds_per_block}
        found = costs[kind]
        assert found is not None  # latency is measured before it is asked for
        return found

    def to_json(self, *, retain: float, confidence: float) -> dict[str, Any]:
        """Plain values; the bound and the p-value belong to this policy alone."""
        return {
            "label": policy_label(self.policy),
            "policy": policy_json(self.policy),
            "counts": asdict(self.counts),
            "retained": self.counts.retained,
            "lower_bound": lower_bound(self.counts, confidence=confidence),
            "p_value": p_value(self.counts, retain, error=1.0 - confidence),
            "retained_by_task": {task: counts.retained for task, counts in self.by_task.items() if counts.solved},
            "unique_experts": self.unique_experts,
            "expert_bytes": self.expert_bytes,
            "steps": self.steps,
            "seconds_per_block": self.seconds_per_block,
        }


def verify(runner: PolicyRunner, policy: RoutingPolicy, quality: Judged) -> Verified:
    """Generate under `policy` and hold the answers against vanilla's. Raises PolicyError or NumericsError."""
    outcome = runner.run(policy)
    right, expected = _right_answers(outcome, quality), _right_answers(runner.vanilla, quality)
    by_task: dict[str, PairedCounts] = {}
    for task in dict.fromkeys(record.task for record in runner.records):
        places = [place for place, record in enumerate(runner.records) if record.task == task]
        by_task[task or UNNAMED_TASK] = PairedCounts.of([right[p] for p in places], [expected[p] for p in places])
    return Verified(
        policy=outcome.run.policy,
        counts=PairedCounts.of(right, expected),
        by_task=by_task,
        unique_experts=outcome.run.cost.unique_experts["denoise"],
        expert_bytes=sum(outcome.run.cost.expert_bytes.values()) / len(runner.records),
        steps=outcome.run.steps,
    )


def _right_answers(outcome: Outcome, quality: Judged) -> list[bool]:
    """For each prompt whether the answer is right; under "agreement", whether its tokens are vanilla's."""
    return [bool(right) for right in (outcome.same_as_vanilla if quality == "agreement" else outcome.correct)]


def with_latency(runner: PolicyRunner, verified: Sequence[Verified]) -> list[Verified]:
    """Each with the median over rounds of its decoding time per decoded block, in seconds.

    In each round every policy decodes the same prompts once, in an order that moves on from round to round, so that a
    machine that slows down for a while slows down all of them. The first round only warms up.
    """
    measured: list[list[float]] = [[] for _ in verified]
    for turn in range(ROUNDS + 1):
        for place in range(len(verified)):
            which = (place + turn) % len(verified)
            seconds = runner.seconds_per_block(verified[which].policy, PROMPTS)
            if turn:
                measured[which].append(seconds)
    return [
        replace(one, seconds_per_block=statistics.median(times)) for one, times in zip(verified, measured, strict=True)
    ]
