"""Several policies on the same prompts: what each saves, and what it costs in quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expertshare.decoding import DecodingOptions
from expertshare.errors import PolicyError
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import Agreement, Outcome, PolicyRun, PolicyRunner, ProgressListener, Setup
from expertshare.evaluation.scoring import check_scorable
from expertshare.evaluation.statistics import (
    PairedDifference,
    Proportion,
    Retained,
    TaskAccuracy,
    paired_difference,
    retained,
    task_accuracy,
)
from expertshare.measure.memory import MemoryWatch, peak_memory_bytes
from expertshare.models import LoadedModel
from expertshare.routing import RoutingPolicy, policy_label, policy_record


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedRun:
    """One policy's run beside vanilla's on the same prompts.

    outcomes: whether each answer is right, None where it cannot be judged. reduction: share of vanilla's unique
    experts of a denoising forward that is saved. difference: to vanilla's accuracy, None without judged prompts and for
    vanilla itself.
    """

    label: str
    run: PolicyRun
    outcomes: tuple[bool | None, ...]
    accuracy: TaskAccuracy
    agreement: Agreement
    reduction: float
    retained: Retained
    difference: PairedDifference | None

    @classmethod
    def of(cls, outcome: Outcome, vanilla: Outcome) -> ComparedRun:
        """Hold the outcome against vanilla's, and judge its answers."""
        accuracy = task_accuracy(outcome.records, outcome.correct)
        base_accuracy = task_accuracy(vanilla.records, vanilla.correct)
        both = zip(outcome.correct, vanilla.correct, strict=True)
        judged = [(mine, theirs) for mine, theirs in both if mine is not None and theirs is not None]
        unique, base_unique = (o.run.cost.unique_experts["denoise"] for o in (outcome, vanilla))
        return cls(
            label=outcome.label,
            run=outcome.run,
            outcomes=outcome.correct,
            accuracy=accuracy,
            agreement=outcome.agreement,
            reduction=1.0 - unique / base_unique,
            retained=retained(accuracy.by_task, base_accuracy.by_task),
            difference=paired_difference([m for m, _ in judged], [t for _, t in judged])
            if judged and outcome is not vanilla
            else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; shares as fractions, intervals as [low, high] at the 95 % level."""
        cost, overall = self.run.cost, self.accuracy.overall
        return {
            **policy_record(self.run.policy),
            "label": self.label,
            "unique_experts": dict(cost.unique_experts),
            "union_experts": dict(cost.union_experts),
            "expert_bytes": dict(cost.expert_bytes),
            "unique_experts_reduction": self.reduction,
            "steps": self.run.steps,
            "forwards": self.run.forwards,
            "tokens_per_s": self.run.tokens_per_s,
            "elapsed_s": self.run.elapsed_s,
            "seconds_by_part": dict(self.run.seconds_by_part),
            **self.run.memory_json(),
            "agreement": self.agreement.tokens,
            "exact_agreement": self.agreement.exact,
            "accuracy": overall.value if overall else None,
            "accuracy_interval": [overall.low, overall.high] if overall else None,
            "tasks": {task: self._task_json(task, share) for task, share in self.accuracy.by_task.items()},
            "retained": self.retained.mean,
            "retained_capped": self.retained.capped_mean,
            "difference": asdict(self.difference) if self.difference else None,
        }

    def _task_json(self, task: str, share: Proportion) -> dict[str, Any]:
        return {
            "accuracy": share.value,
            "interval": [share.low, share.high],
            "correct": share.successes,
            "count": share.count,
            "retained": self.retained.by_task.get(task),
        }

    def answers_json(self, records: Sequence[PromptRecord]) -> list[dict[str, Any]]:
        """Every answer with its prompt and outcome, for a report."""
        return [
            {"prompt": record.prompt, "task": record.task, "text": answer.text, "correct": outcome}
            for record, answer, outcome in zip(records, self.run.answers, self.outcomes, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The runs that were asked for, in that order. reference: vanilla's run, whether or not it was asked for.

    config: the resolved configuration. peak_memory_bytes: of the process, over all runs together;
    peak_anonymous_bytes: without pages of files, None where the system does not say.
    """

    records: tuple[PromptRecord, ...]
    config: Mapping[str, Any]
    runs: tuple[ComparedRun, ...]
    reference: ComparedRun
    peak_memory_bytes: int
    peak_anonymous_bytes: int | None

    def to_json(self, *, answers: bool = False) -> dict[str, Any]:
        """Plain values under "runs"; `answers` adds every answer to its run."""
        runs = [
            {**run.to_json(), **({"answers": run.answers_json(self.records)} if answers else {})} for run in self.runs
        ]
        return {
            "runs": runs,
            "reference": self.reference.to_json(),
            "num_prompts": len(self.records),
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_anonymous_bytes": self.peak_anonymous_bytes,
        }


def compare_policies(
    loaded: LoadedModel,
    records: Sequence[PromptRecord],
    policies: Sequence[RoutingPolicy],
    options: DecodingOptions,
    *,
    setup: Setup,
    on_progress: ProgressListener | None = None,
    memory: MemoryWatch | None = None,
) -> Comparison:
    """Answer the prompts of `records` under vanilla and every policy, and compare with vanilla.

    Everything that can be refused is refused before the first forward. on_progress(label, done, total) hears of
    every finished prompt. memory: a watch that runs already. Raises InputError, PolicyError or NumericsError.
    """
    _check_policies(policies, loaded)
    check_scorable(records)
    with memory or MemoryWatch() as watch:
        runner = PolicyRunner(loaded, records, options, setup, on_progress)
        runner.warm_up()
        reference = ComparedRun.of(runner.vanilla, runner.vanilla)
        runs = [
            reference if (outcome := runner.run(policy)) is runner.vanilla else ComparedRun.of(outcome, runner.vanilla)
            for policy in policies
        ]
    return Comparison(
        records=tuple(records),
        config=setup.to_json(loaded, options),
        runs=tuple(runs),
        reference=reference,
        peak_memory_bytes=peak_memory_bytes(loaded.model.device),
        peak_anonymous_bytes=watch.peak_anonymous_bytes,
    )


def _check_policies(policies: Sequence[RoutingPolicy], loaded: LoadedModel) -> None:
    labels = [policy_label(policy) for policy in policies]
    if not labels:
        raise PolicyError("expected at least one policy to compare, got none; name one, e.g. des-vote:budget=16")
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise PolicyError(f"expected every policy once, got {', '.join(repeated)} again; drop it or change a knob")
    for policy in policies:
        policy.bind(loaded.config.router)
