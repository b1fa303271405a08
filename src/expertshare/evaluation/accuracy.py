"""Which prompts can be judged, and how right a run's answers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertshare.errors import InputError
from expertshare.evaluation.statistics import Proportion, proportion
from expertshare.lab.tasks import PromptRecord, score_many
from expertshare.lab.tasks.table import find_task

UNNAMED_TASK = "unnamed"


def is_scorable(record: PromptRecord) -> bool:
    """Whether there is something to judge an answer by."""
    return record.reference is not None or bool(record.tests)


def check_scorable(records: Sequence[PromptRecord]) -> None:
    """Raise InputError for a record whose task is unknown, or of a kind that needs tests where it has none."""
    for number, record in enumerate(records, 1):
        if record.task is None:
            continue
        try:
            rule = find_task(record.task).answer_rule
        except InputError as error:
            raise InputError(f"prompt {number}: {error}") from error
        if rule == "program" and is_scorable(record) and not record.tests:
            raise InputError(f'prompt {number}: expected "tests" for the task {record.task!r}, got none; add them')


def judge(records: Sequence[PromptRecord], answers: Sequence[str]) -> list[bool | None]:
    """Whether each answer is right; None where its record has nothing to judge it by.

    A record with a task or tests is judged by the rule of its kind (generated code runs in the task room's sandbox);
    one with only a reference by equality, blanks at the ends aside.
    """
    outcomes: list[bool | None] = [None] * len(records)
    by_rule: list[int] = []
    for index, (record, answer) in enumerate(zip(records, answers, strict=True)):
        if not is_scorable(record):
            continue
        if record.task is None and not record.tests:
            outcomes[index] = answer.strip() == (record.reference or "").strip()
        else:
            by_rule.append(index)
    judged = score_many([records[i] for i in by_rule], [answers[i] for i in by_rule])
    for index, outcome in zip(by_rule, judged, strict=True):
        outcomes[index] = outcome
    return outcomes


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
