"""Ask every item of several tasks under several policies, one line on disk for each, and sum up."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from expertshare.decoding import DecodingOptions
from expertshare.errors import InputError, nearest
from expertshare.evaluation.harness.benchmarks import BENCHMARKS
from expertshare.evaluation.harness.source import HarnessSource
from expertshare.evaluation.items import EvalItem, GeneratedSource, SourceOptions, TaskSource
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.run_directory import ITEMS, REPORT, check_known, model_sha256, open_run
from expertshare.evaluation.runner import VANILLA, ProgressListener, Setup, own_policy
from expertshare.evaluation.scoring import ANSWER_RULES
from expertshare.evaluation.summary import summarise
from expertshare.evaluation.workers import (
    Job,
    Solved,
    Solver,
    SolverSetup,
    solve_here,
    solve_in_processes,
    solve_on_ray,
)
from expertshare.measure.report import Report, capture_environment, versions
from expertshare.models import LoadedModel
from expertshare.routing import RoutingPolicy, policy_label, policy_record

SCHEMA_VERSION = 1
NoticeListener = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """How an evaluation is run. threads: of each process. config: more that belongs in run.json (preset, limit, ...).
    ray: the processes are Ray's: at this address, or anywhere it is found or can be started ("").

    What is in `identity` decides, with the model, policies, items and decoding, whether a directory holds the same
    evaluation.
    """

    options: DecodingOptions
    setup: Setup
    dtype: torch.dtype | None = None
    processes: int = 1
    threads: int = 1
    ray: str | None = None
    identity: Mapping[str, Any]
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("processes", "threads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A finished evaluation: the directory that holds it, its lines and its report."""

    path: Path
    lines: tuple[Mapping[str, Any], ...]
    report: Report

    @property
    def results(self) -> Mapping[str, Any]:
        """Rows by task and policy, and a summary by policy."""
        found: Mapping[str, Any] = self.report.results
        return found


def evaluate_sources(
    loaded: LoadedModel,
    sources: Sequence[TaskSource],
    policies: Sequence[RoutingPolicy],
    settings: EvaluationSettings,
    out: Path,
    *,
    on_progress: ProgressListener | None = None,
    on_notice: NoticeListener | None = None,
) -> Evaluation:
    """Evaluate into `out`, or go on with what is there. Vanilla is always among the policies.

    Everything that can be refused is refused before the first item. on_progress(task, done, total) hears of every
    finished line, on_notice of what was found in `out`. Raises InputError, PolicyError, EvaluationError, NumericsError.
    """
    bound = bind_policies(policies, loaded)
    labels = [policy_label(policy) for policy in bound]
    solver = Solver(
        loaded=loaded,
        setup=SolverSetup(
            model=loaded.path.resolve(),
            dtype=settings.dtype,
            policies=bound,
            options=settings.options,
            backend=settings.setup.backend,
            threads=settings.threads,
            store=settings.setup.store_options,
        ),
        store=settings.setup.store,
    )
    questions = [(source, item) for source in sources for item in source.items()]
    for _, item in questions:
        solver.check(item)
    plan = [(source, Job(item=item, policy=number)) for source, item in questions for number in range(len(bound))]
    keys = [(job.item.task, job.item.id, labels[job.policy]) for _, job in plan]
    counts = Counter(task for task, _, _ in keys)
    run = _describe(loaded, [item for _, item in questions], bound, settings)
    with open_run(out, run) as opened:
        done = check_known(opened.lines, keys, out)
        if on_notice is not None and opened.dropped_bytes:
            on_notice(
                f"the last line of {out / ITEMS} was cut off ({opened.dropped_bytes} bytes): dropped, and asked again"
            )
        if on_notice is not None and done:
            on_notice(f"{len(done)} of {len(keys)} answers are in {out} already; {len(keys) - len(done)} to go")
        told = Counter(task for task, _, _ in done)
        if on_progress is not None:
            for task in counts:
                on_progress(task, told[task], counts[task])
        remaining = [entry for entry, key in zip(plan, keys, strict=True) if key not in done]
        lines = list(opened.lines)
        answers = _answers(solver, [job for _, job in remaining], settings, run["identity"]["model_sha256"])
        for (source, job), solved in zip(remaining, answers, strict=True):
            line = _line(source, job, solved, labels[job.policy])
            opened.append(line)
            lines.append(line)
            told[job.item.task] += 1
            if on_progress is not None:
                on_progress(job.item.task, told[job.item.task], counts[job.item.task])
        report = Report(
            command="eval",
            environment=capture_environment(loaded.model.device),
            seeds={"decoding": settings.options.seed},
            config=run,
            results=summarise(lines, tasks=[source.task for source in sources], policies=labels, baseline=labels[0]),
        )
        report.write(out / REPORT)
    return Evaluation(path=out, lines=tuple(lines), report=report)


def bind_policies(policies: Sequence[RoutingPolicy], loaded: LoadedModel) -> tuple[RoutingPolicy, ...]:
    """The model's own policy first, then vanilla where that is another, then the others; every knob concrete, each
    policy once. Raises PolicyError."""
    return tuple(
        dict.fromkeys(policy.bind(loaded.config.router) for policy in (own_policy(loaded), VANILLA, *policies))
    )


def _answers(solver: Solver, jobs: Sequence[Job], settings: EvaluationSettings, sha256: str) -> Iterator[Solved]:
    processes = min(settings.processes, len(jobs))
    if settings.ray is not None and jobs:
        return solve_on_ray(solver.setup, jobs, processes, sha256=sha256, address=settings.ray or None)
    if processes <= 1:
        return solve_here(solver, jobs)
    return solve_in_processes(solver.setup, jobs, processes)


def _line(source: TaskSource, job: Job, solved: Solved, label: str) -> dict[str, Any]:
    judgement = source.judge(job.item, solved.answer)
    return {
        "task": job.item.task,
        "id": job.item.id,
        "policy": label,
        "prompt_sha256": job.item.prompt_sha256,
        "answer": solved.answer,
        "correct": judgement.correct,
        "reason": judgement.reason,
        "harness_correct": judgement.harness,
        **asdict(solved),
    }


def _describe(
    loaded: LoadedModel, items: Sequence[EvalItem], policies: Sequence[RoutingPolicy], settings: EvaluationSettings
) -> dict[str, Any]:
    asked = "\n".join(f"{item.task} {item.id} {item.content} {item.gen_length}" for item in items)
    resolved = settings.setup.to_json(loaded, settings.options)
    return {
        "schema_version": SCHEMA_VERSION,
        "identity": {
            "model_sha256": model_sha256(loaded.path),
            "items": dict(Counter(item.task for item in items)),
            "items_sha256": hashlib.sha256(asked.encode()).hexdigest(),
            "policies": [policy_label(policy) for policy in policies],
            "decoding": asdict(settings.options),
            "backend": resolved["backend"],
            "chat": resolved["chat"],
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "threads": settings.threads,
            "versions": versions(),
            **settings.identity,
        },
        "model": str(loaded.path),
        "policies": [{"label": policy_label(p), **policy_record(p)} for p in policies],
        "config": {**resolved, **settings.config},
        "environment": capture_environment(loaded.model.device).to_json(),
    }


def check_task_names(names: Sequence[str]) -> tuple[str, ...]:
    """Each name once, in order; InputError for none, or one that is no task's."""
    known = [*ANSWER_RULES, *BENCHMARKS]
    if not names:
        raise InputError(f"expected at least one task, got none. {nearest('', known)}")
    for name in names:
        if name not in known:
            raise InputError(f"expected the name of a task, got {name!r}. {nearest(name, known)}")
    return tuple(dict.fromkeys(names))


def harness_version(names: Sequence[str]) -> str | None:
    """Version of lm-evaluation-harness where one of these tasks is asked through it; else nothing depends on it."""
    with suppress(PackageNotFoundError):
        return None if BENCHMARKS.keys().isdisjoint(names) else version("lm_eval")
    return None


def make_sources(
    names: Sequence[str], options: SourceOptions, loaded: LoadedModel, *, draw: Callable[..., Sequence[PromptRecord]]
) -> list[TaskSource]:
    """A source for each task, ready to give items. draw: the generator of `GeneratedSource`.

    Raises InputError, also where an extra is not installed.
    """
    return [
        GeneratedSource(task=name, options=options, draw=draw)
        if name in ANSWER_RULES
        else HarnessSource.load(BENCHMARKS[name], options, loaded.tokenizer)
        for name in check_task_names(names)
    ]
