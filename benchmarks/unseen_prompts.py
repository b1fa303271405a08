"""Prompts of the test split as records that can be judged: shared by the measurements of quality."""

from __future__ import annotations

from collections.abc import Iterable

from expertshare.evaluation.prompts import PromptRecord
from expertshare.lab.tasks.generation import TASKS, generate_items


def unseen_prompts(count: int, seed: int, tasks: Iterable[str] = TASKS) -> list[PromptRecord]:
    """`count` of each task, task after task."""
    items = [item for task in tasks for item in generate_items(task, split="test", count=count, seed=seed)]
    return [PromptRecord(prompt=i.prompt, reference=i.reference, task=i.task, tests=i.tests) for i in items]
