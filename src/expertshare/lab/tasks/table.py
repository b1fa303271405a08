"""TASKS, the kinds by name. A new kind is a file with a TASK and one line here."""

from __future__ import annotations

from expertshare.errors import InputError, nearest
from expertshare.lab.tasks import arithmetic, functions, multiple_choice, self_invoking, symbolic
from expertshare.lab.tasks.types import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (arithmetic, symbolic, functions, self_invoking, multiple_choice)
}


def find_task(name: str) -> Task:
    """The kind called `name`; raises InputError with the nearest known name."""
    if name not in TASKS:
        raise InputError(f"expected the name of a task, got {name!r}. {nearest(name, TASKS)}")
    return TASKS[name]
