"""Several policies on the same prompts: what each saves, and what it costs in quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from expertshare.decoding import BlockResult, DecodingOptions
from expertshare.errors import PolicyError
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.runner import PolicyRun, ProgressListener, Setup, answer_prompts, encode_prompts, own_policy
from expertshare.evaluation.scoring import check_scorable, judge
from expertshare.evaluation.statistics import (
    PairedDifference,
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
class Agreement:
    """tokens: share of answer positions with the same token, mean over prompts. exact: share of equal answers."""

    tokens: float
    exact: float


def token_agreement(answer: Sequence[int], reference: Sequence[int]) -> float:
    """Share of positions at which two answers have the same token; a position that only one has is a disagreement."""
    length = max(len(answer), len(reference))
    if length == 0:
        return 1.0
    return sum(mine == theirs for mine, theirs in zip(answer, reference, strict=False)) / length


def agreement(answers: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> Agreement:
    """Compare the answers to the same prompts, at least one."""
    pairs = list(zip(answers, references, strict=True))
    return Agreement(
        tokens=sum(token_agreement(mine, theirs) for mine, theirs in pairs) / len(pairs),
        exact=sum(list(mine) == list(theirs) for mine, theirs in pairs) / len(pairs),
    )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One policy on the runner's prompts. against: vanilla's outcome on the same ones, None for vanilla itself.

    Answers are judged when that is first asked for, as generated code is then run in the sandbox: SandboxError.
    """

    label: str
    records: Sequence[PromptRecord]
    run: PolicyRun
    against: Outcome | None = None

    @property
    def vanilla(self) -> Outcome:
        """What these answers are held against."""
        return self.against or self

    @cached_property
    def correct(self) -> tuple[bool | None, ...]:
        """Whether each answer is right, None where it cannot be judged."""
        return tuple(judge(self.records, self.run.texts))

    @property
    def same_as_vanilla(self) -> tuple[bool, ...]:
        """Whether each answer is vanilla's, token for token."""
        pairs = zip(self.run.answers, self.vanilla.run.answers, strict=True)
        return tuple(mine.token_ids == theirs.token_ids for mine, theirs in pairs)

    @property
    def agreement(self) -> Agreement:
        """Agreement of these answers with vanilla's."""
        return agreement(*([answer.token_ids for answer in one.run.answers] for one in (self, self.vanilla)))

    @property
    def reduction(self) -> float:
        """Share of vanilla's unique experts of a denoising forward that is saved."""
        mine, theirs = (one.run.cost.unique_experts["denoise"] for one in (self, self.vanilla))
        return 1.0 - mine / theirs

    @cached_property
    def accuracy(self) -> TaskAccuracy:
        """Share of right answers, with intervals."""
        return task_accuracy(self.records, self.correct)

    @property
    def retained(self) -> Retained:
        """Accuracy as a share of vanilla's."""
        return retained(self.accuracy.by_task, self.vanilla.accuracy.by_task)

    @property
    def difference(self) -> PairedDifference | None:
        """Accuracy minus vanilla's; None without judged prompts, and for vanilla itself."""
        both = zip(self.correct, self.vanilla.correct, strict=True)
        judged = [(mine, theirs) for mine, theirs in both if mine is not None and theirs is not None]
        if self.against is None or not judged:
            return None
        return paired_difference([mine for mine, _ in judged], [theirs for _, theirs in judged])

    def to_json(self, *, answers: bool = False) -> dict[str, Any]:
        """Plain values; shares as fractions, intervals as [low, high] at the 95 % level. answers: each with its prompt
        and whether it is right."""
        cost, overall, kept, difference = self.run.cost, self.accuracy.overall, self.retained, self.difference
        judged = zip(self.records, self.run.texts, self.correct, strict=True)
        texts = [{"prompt": r.prompt, "task": r.task, "text": text, "correct": right} for r, text, right in judged]
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
            "tasks": {
                task: {
                    "accuracy": share.value,
                    "interval": [share.low, share.high],
                    "correct": share.successes,
                    "count": share.count,
                    "retained": kept.by_task.get(task),
                }
                for task, share in self.accuracy.by_task.items()
            },
            "retained": kept.mean,
            "retained_capped": kept.capped_mean,
            "difference": asdict(difference) if difference else None,
            **({"answers": texts} if answers else {}),
        }


class PolicyRunner:
    """Answers the same prompts under any policy. Prompts are encoded once, and vanilla answers them once."""

    def __init__(
        self,
        loaded: LoadedModel,
        records: Sequence[PromptRecord],
        options: DecodingOptions,
        setup: Setup,
        on_progress: ProgressListener | None = None,
    ) -> None:
        """on_progress(label, done, total) hears of every finished prompt. Raises InputError, as encode_prompts."""
        self.loaded, self.records, self.options, self.setup = loaded, tuple(records), options, setup
        self.prompts = encode_prompts(loaded, [record.prompt for record in records], setup.chat)
        self._on_progress = on_progress

    @cached_property
    def vanilla(self) -> Outcome:
        """The model as it is, under its own routing."""
        policy = own_policy(self.loaded)
        return Outcome(label=policy_label(policy), records=self.records, run=self.answer(policy))

    def run(self, policy: RoutingPolicy) -> Outcome:
        """Answer all prompts under `policy`, and vanilla before. Raises PolicyError, InputError or NumericsError."""
        vanilla = self.vanilla
        if policy.bind(self.loaded.config.router) == own_policy(self.loaded):
            return vanilla
        return Outcome(label=policy_label(policy), records=self.records, run=self.answer(policy), against=vanilla)

    def answer(self, policy: RoutingPolicy) -> PolicyRun:
        """The answers by themselves, without what they cost."""
        label, done = policy_label(policy), 0

        def count(block: BlockResult) -> None:
            nonlocal done
            if self._on_progress is not None and block.finish_reason is not None:
                done += 1
                self._on_progress(label, done, len(self.prompts))

        return answer_prompts(self.loaded, self.prompts, policy, self.options, setup=self.setup, on_block=count)

    def seconds_per_block(self, policy: RoutingPolicy, num_prompts: int) -> float:
        """Decoding time of the first `num_prompts` prompts, for each decoded block."""
        blocks: list[BlockResult] = []
        prompts = self.prompts[:num_prompts]
        run = answer_prompts(self.loaded, prompts, policy, self.options, setup=self.setup, on_block=blocks.append)
        return run.elapsed_s / len(blocks)

    def warm_up(self) -> None:
        """Decode one block that counts nowhere, so that the first policy does not pay for what happens only once."""
        resolved = self.options.resolve(self.loaded.config)
        one_block = replace(self.options, gen_length=min(resolved.gen_length, resolved.block_length or 1))
        answer_prompts(self.loaded, self.prompts[:1], own_policy(self.loaded), one_block, setup=self.setup)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The runs that were asked for, in that order. reference: the run under the model's own routing (`own_policy`),
    which is called vanilla's here, whether or not it was asked for.

    config: the resolved configuration. peak_memory_bytes: of the process, over all runs together;
    peak_anonymous_bytes: without pages of files, None where the system does not say.
    """

    records: tuple[PromptRecord, ...]
    config: Mapping[str, Any]
    runs: tuple[Outcome, ...]
    reference: Outcome
    peak_memory_bytes: int
    peak_anonymous_bytes: int | None

    def to_json(self, *, answers: bool = False) -> dict[str, Any]:
        """Plain values under "runs"; `answers` adds every answer to its run."""
        return {
            "runs": [run.to_json(answers=answers) for run in self.runs],
            "baseline": self.reference.label,
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
        runs = tuple(runner.run(policy) for policy in policies)
        for run in (runner.vanilla, *runs):
            _ = run.correct  # judged here, not when a caller happens to ask
    return Comparison(
        records=runner.records,
        config=setup.to_json(loaded, options),
        runs=runs,
        reference=runner.vanilla,
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
