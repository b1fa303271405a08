"""Real generation on one part of the prompts: what a policy keeps of vanilla's quality there, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from expertshare.decoding import BlockResult, DecodingOptions
from expertshare.evaluation import PolicyRun, Setup, answer_prompts, encode_prompts, policy_label
from expertshare.evaluation.prompts import PromptRecord
from expertshare.models import LoadedModel
from expertshare.routing import make_policy
from expertshare.tuning.certificate import PairedCounts, lower_bound, p_value
from expertshare.tuning.policy_file import policy_json
from expertshare.tuning.split import Judged, right_answers
from expertshare.types import RoutingPolicy


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


@dataclass(slots=True)
class Bench:
    """One part of the prompts, answered by vanilla once; `verify` answers them under other policies."""

    loaded: LoadedModel
    records: Sequence[PromptRecord]
    options: DecodingOptions
    setup: Setup
    quality: Judged
    on_progress: Callable[[str, int, int], None] | None = None
    _vanilla: PolicyRun | None = field(default=None, init=False)
    _right: list[bool] = field(default_factory=list, init=False)

    def prompts(self) -> list[list[int]]:
        """Token ids."""
        return encode_prompts(self.loaded, [record.prompt for record in self.records], self.setup.chat)

    def vanilla(self) -> Verified:
        """The model as it is, on these prompts."""
        run, right = self._reference()
        return self._verified(run, right, right)

    def verify(self, policy: RoutingPolicy) -> Verified:
        """Generate under `policy`. Raises PolicyError or NumericsError."""
        vanilla, expected = self._reference()
        run = self._answer(policy)
        return self._verified(run, right_answers(self.records, run, vanilla, self.quality), expected)

    def _reference(self) -> tuple[PolicyRun, list[bool]]:
        if self._vanilla is None:
            self._vanilla = self._answer(make_policy("vanilla"))
            self._right = right_answers(self.records, self._vanilla, self._vanilla, self.quality)
        return self._vanilla, self._right

    def _answer(self, policy: RoutingPolicy) -> PolicyRun:
        done = 0

        def heard(block: BlockResult) -> None:
            nonlocal done
            done += block.finish_reason is not None
            if self.on_progress is not None and block.finish_reason is not None:
                self.on_progress(policy_label(policy), done, len(self.records))

        return answer_prompts(self.loaded, self.prompts(), policy, self.options, setup=self.setup, on_block=heard)

    def _verified(self, run: PolicyRun, right: Sequence[bool], expected: Sequence[bool]) -> Verified:
        by_task: dict[str, PairedCounts] = {}
        for task in dict.fromkeys(record.task for record in self.records):
            places = [place for place, record in enumerate(self.records) if record.task == task]
            by_task[task or "unnamed"] = PairedCounts.of([right[p] for p in places], [expected[p] for p in places])
        return Verified(
            policy=run.policy,
            counts=PairedCounts.of(right, expected),
            by_task=by_task,
            unique_experts=run.cost.unique_experts["denoise"],
            expert_bytes=sum(run.cost.expert_bytes.values()) / len(self.records),
            steps=run.steps,
        )
