"""What tuning found, and what it may say about it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from expertshare.evaluation.comparison import Outcome, PolicyRunner
from expertshare.evaluation.statistics import UNNAMED_TASK, PairedCounts
from expertshare.measure.report import Environment
from expertshare.routing import RoutingPolicy, policy_label
from expertshare.tuning.certificate import POWER, least_solved, lower_bound, needed_prompts, p_value
from expertshare.tuning.options import Judged, TuningOptions
from expertshare.tuning.policy_file import PolicyFile, policy_json
from expertshare.tuning.replay import Point


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """vanilla, tested: on the prompts that certify; the first `num_passed` of `tested` passed, in the order of testing.

    tried: on the prompts of the search. front: what the search found best, many experts first. model, prompts:
    fingerprints. config: the resolved configuration.
    """

    options: TuningOptions
    quality: Judged
    vanilla: Verified
    tested: tuple[Verified, ...]
    num_passed: int
    tried: tuple[Verified, ...]
    front: tuple[Point, ...]
    num_points: int
    num_search: int
    num_certify: int
    model: Mapping[str, Any]
    prompts: str
    config: Mapping[str, Any]
    environment: Environment

    @property
    def certified(self) -> bool:
        """Whether the promise holds for `chosen`."""
        return self.num_passed > 0

    @property
    def chosen(self) -> Verified:
        """The cheapest certified policy; where there is none, the safest that was tested."""
        passed = self.tested[: self.num_passed]
        return min(passed, key=lambda v: v.cost(self.options.cost)) if passed else self.tested[0]

    @property
    def policy(self) -> RoutingPolicy:
        """The policy that was chosen as the cheapest."""
        return self.chosen.policy

    @property
    def needed_prompts(self) -> int | None:
        """Prompts, searched ones included, with which the first policy that failed would be certified with 80 % chance,
        if it is as good as measured; None where it is not, or nothing failed."""
        if self.num_passed == len(self.tested):
            return None
        counts, options = self.tested[self.num_passed].counts, self.options
        needed = needed_prompts(counts, options.retain, confidence=options.confidence)
        return None if needed is None else round(needed / (1.0 - options.search_share))

    def sentence(self) -> str:
        """The claim in words, no larger than the evidence."""
        options, chosen = self.options, self.chosen
        what = "accuracy" if self.quality == "accuracy" else "answers, token for token (agreement, not accuracy)"
        promise = f"at least {100 * options.retain:g} % of vanilla's {what}"
        kind, before = options.cost, self.vanilla.cost(options.cost)
        saved = f"{100 * (1 - chosen.cost(kind) / before):.1f} % less {_NOUNS[kind]} than vanilla"
        if self.certified:
            return (
                f"certified: {policy_label(chosen.policy)} keeps {promise}, at {100 * options.confidence:g} % "
                f"confidence, for prompts like these {self.num_certify}, with {saved}"
            )
        label = policy_label(chosen.policy)
        return f"not certified: {label} ({saved}) was not shown to keep {promise}. {self._advice()}"

    def _advice(self) -> str:
        options, counts = self.options, self.tested[0].counts
        least = least_solved(options.retain, options.confidence)
        if self.needed_prompts is None:
            return (
                f"Measured: {100 * counts.retained:.1f} % on {counts.total} prompts. At this rate no number of prompts "
                "would do: promise less (--retain), or search longer (--trials)."
            )
        short = f"Even without a loss {least} prompts that vanilla solves are needed, {counts.solved} are there. "
        return (
            f"{short if counts.solved < least else ''}If its rates are as measured, about {self.needed_prompts} "
            f"prompts in all would certify it with {100 * POWER:.0f} % chance."
        )

    def to_json(self) -> dict[str, Any]:
        """The results as plain values for JSON."""
        stated = {"retain": self.options.retain, "confidence": self.options.confidence}
        return {
            "certified": self.certified,
            "claim": self.sentence(),
            "quality": self.quality,
            "cost_kind": self.options.cost,
            "chosen": self.chosen.to_json(**stated),
            "vanilla": self.vanilla.to_json(**stated),
            "tested": [
                {**verified.to_json(**stated), "passed": place < self.num_passed}
                for place, verified in enumerate(self.tested)
            ],
            "tried": [verified.to_json(**stated) for verified in self.tried],
            "front": [
                {
                    "label": policy_label(point.policy),
                    "unique_experts": point.unique_experts,
                    "divergence": point.divergence,
                    "flips": point.flips,
                    "by_layer": list(point.by_layer),
                }
                for point in self.front
            ],
            "num_points": self.num_points,
            "num_prompts": {"search": self.num_search, "certify": self.num_certify},
            "needed_prompts": self.needed_prompts,
            "options": asdict(self.options),
        }

    def policy_file(self) -> PolicyFile:
        """The chosen policy with all of this as its evidence."""
        evidence = {
            **self.to_json(),
            "environment": self.environment.to_json(),
            "config": dict(self.config),
            "seeds": {"tuning": self.options.seed, "decoding": self.config["decoding"]["seed"]},
            "prompts_sha256": self.prompts,
        }
        return PolicyFile(policy=self.policy, certified=self.certified, model=self.model, evidence=evidence)


_NOUNS = {"experts": "unique experts", "bytes": "expert bytes", "latency": "time per block"}


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
