"""Judge answers: the final answer behind "####", or the item's unit tests in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence

from expertshare.errors import InputError
from expertshare.lab.tasks.sandbox import run_programs
from expertshare.lab.tasks.table import find_task
from expertshare.lab.tasks.types import AnswerRule, PromptRecord, TaskItem

FINAL_MARK = "####"
_MOST_DIGITS = 4000
"""Of a number that Python reads: a model may repeat a digit for as long as it is let."""
_INTEGER = re.compile(r"[+-]?\d+(?!\w|\.\d)")


def final_answer(text: str) -> str | None:
    """What follows the last "####", without blanks at the ends; None where the mark is missing."""
    _, mark, final = text.rpartition(FINAL_MARK)
    return final.strip() if mark else None


def _equal(rule: AnswerRule, gold: str, answer: str) -> bool:
    if rule == "number":
        wanted, found = _INTEGER.match(gold), _INTEGER.match(answer)
        if wanted is None or found is None or len(found[0]) > _MOST_DIGITS:
            return False
        return int(wanted[0]) == int(found[0])
    return "".join(gold.split()) == "".join(answer.split())


def _rule(item: TaskItem | PromptRecord) -> AnswerRule:
    """A record that names no task is judged by its tests if it has some, else by its reference's text."""
    if item.task is not None:
        return find_task(item.task).answer_rule
    return "program" if item.tests else "text"


def _check_final(item: TaskItem | PromptRecord, rule: AnswerRule, answer: str) -> bool:
    if item.reference is None:
        raise InputError(f'expected a "reference" to judge an answer by, got none for prompt {item.prompt[:60]!r}')
    gold = final_answer(item.reference)
    if gold is None:
        return _equal("text", item.reference, answer)
    found = final_answer(answer)
    return found is not None and _equal(rule, gold, found)


def _program(item: TaskItem | PromptRecord, answer: str) -> str:
    if not item.tests:
        raise InputError(f'expected "tests" to judge a program by, got none for prompt {item.prompt[:60]!r}')
    return "\n".join([answer, "", *item.tests, ""])


def score_many(items: Sequence[TaskItem | PromptRecord], answers: Sequence[str]) -> list[bool]:
    """Whether each answer is right; all programs share one sandbox session.

    Raises InputError where the counts differ or an item lacks what its kind is judged by.
    """
    if len(items) != len(answers):
        raise InputError(f"expected one answer per item, got {len(answers)} for {len(items)} items")
    rules = [_rule(item) for item in items]
    programs = [
        _program(item, answer) for item, answer, rule in zip(items, answers, rules, strict=True) if rule == "program"
    ]
    verdicts = iter(run_programs(programs))
    return [
        next(verdicts).passed if rule == "program" else _check_final(item, rule, answer)
        for item, answer, rule in zip(items, answers, rules, strict=True)
    ]


def score(item: TaskItem | PromptRecord, answer: str) -> bool:
    """Whether one answer is right; for many, `score_many` saves the sandbox's start."""
    return score_many([item], [answer])[0]
