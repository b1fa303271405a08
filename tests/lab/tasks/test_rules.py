"""Every generated task has a rule by which its answers are judged."""

from __future__ import annotations

from expertshare.evaluation.scoring import ANSWER_RULES
from expertshare.lab.tasks.generation import TASKS


def test_tasks_and_rules_have_the_same_names_in_the_same_order() -> None:
    assert list(TASKS) == list(ANSWER_RULES)
