"""Judge answers: the final answer behind "####", or the prompt's unit tests in the sandbox."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from expertshare.errors import InputError, nearest
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.sandbox import run_programs

AnswerRule = Literal["number", "text", "program"]
ANSWER_RULES: dict[str, AnswerRule] = {
    "arith": "number",
    "math": "text",
    "code": "program",
    "code_pro": "program",
    "choice": "text",
}
"""How the answers to a task are judged. `number` and `text` compare what follows the last "####" of answer and
reference (by value, or without spaces); `program` runs the prompt's tests after the answer."""

FINAL_MARK = "####"
_MOST_DIGITS = 4000
"""Of a number that Python reads: a model may repeat a digit for as long as it is let."""
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)[$€£]?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<fraction>\.\d+)?(?:\s*/\s*(?P<divisor>\d+))?(?!\w|[.,/]\d)"
)
"""An integer, with thousands parted by commas or not, a decimal or a quotient; a currency may stand before it."""


def find_rule(task: str) -> AnswerRule:
    """The rule of the task with this name; raises InputError with the nearest known name."""
    if task not in ANSWER_RULES:
        raise InputError(f"expected the name of a task, got {task!r}. {nearest(task, ANSWER_RULES)}")
    return ANSWER_RULES[task]


def is_scorable(record: PromptRecord) -> bool:
    """Whether there is something to judge an answer by."""
    return record.reference is not None or bool(record.tests)


def check_scorable(records: Sequence[PromptRecord]) -> None:
    """Raise InputError for a record whose task is unknown, or of a kind that needs tests where it has none."""
    for number, record in enumerate(records, 1):
        if record.task is None:
            continue
        try:
            rule = find_rule(record.task)
        except InputError as error:
            raise InputError(f"prompt {number}: {error}") from error
        if rule == "program" and is_scorable(record) and not record.tests:
            raise InputError(f'prompt {number}: expected "tests" for the task {record.task!r}, got none; add them')


def judge(records: Sequence[PromptRecord], answers: Sequence[str]) -> list[bool | None]:
    """Whether each answer is right; None where its record has nothing to judge it by.

    A record with a task or tests is judged by `score_many` (generated code runs in the sandbox); one with only a
    reference by equality, spaces at the ends aside.
    """
    given = list(zip(records, answers, strict=True))
    by_rule = [(record, answer) for record, answer in given if is_scorable(record) and _has_rule(record)]
    outcomes = iter(score_many([record for record, _ in by_rule], [answer for _, answer in by_rule]))
    return [
        None
        if not is_scorable(record)
        else next(outcomes)
        if _has_rule(record)
        else answer.strip() == (record.reference or "").strip()
        for record, answer in given
    ]


def _has_rule(record: PromptRecord) -> bool:
    return record.task is not None or bool(record.tests)


def score_many(records: Sequence[PromptRecord], answers: Sequence[str]) -> list[bool]:
    """Whether each answer is right; all programs share one sandbox session.

    A record that names no task is judged by its tests if it has some, else by its reference's text. Raises InputError
    where the counts differ or a record lacks what its task is judged by.
    """
    if len(records) != len(answers):
        raise InputError(f"expected one answer per item, got {len(answers)} for {len(records)} items")
    rules: list[AnswerRule] = [
        find_rule(record.task) if record.task is not None else "program" if record.tests else "text"
        for record in records
    ]
    given = list(zip(records, answers, rules, strict=True))
    verdicts = iter(run_programs([program(record, answer) for record, answer, rule in given if rule == "program"]))
    return [
        next(verdicts).passed if rule == "program" else _is_final(record, rule, answer)
        for record, answer, rule in given
    ]


def score(record: PromptRecord, answer: str) -> bool:
    """Whether one answer is right; for many, `score_many` saves the sandbox's start."""
    return score_many([record], [answer])[0]


def program(record: PromptRecord, answer: str) -> str:
    """The answer's code followed by the record's tests; InputError for a record without any."""
    if not record.tests:
        raise InputError(f'expected "tests" to judge a program by, got none for prompt {record.prompt[:60]!r}')
    return "\n".join([answer, "", *record.tests, ""])


def _is_final(record: PromptRecord, rule: AnswerRule, answer: str) -> bool:
    if record.reference is None:
        raise InputError(f'expected a "reference" to judge an answer by, got none for prompt {record.prompt[:60]!r}')
    gold = final_answer(record.reference)
    if gold is None:
        return _equal("text", record.reference, answer)
    found = final_answer(answer)
    return found is not None and _equal(rule, gold, found)


def final_answer(text: str) -> str | None:
    """What follows the last "####", without spaces at the ends; None where the mark is missing."""
    _, mark, final = text.rpartition(FINAL_MARK)
    return final.strip() if mark else None


def _equal(rule: AnswerRule, gold: str, answer: str) -> bool:
    if rule == "number":
        wanted, found = _value(_NUMBER.match(gold)), _value(_NUMBER.match(answer))
        return wanted is not None and wanted == found
    return "".join(gold.split()) == "".join(answer.split())


def last_number(text: str) -> Fraction | None:
    """The value of a free answer: the number behind its last "####", else the last number in it; None for none."""
    final = final_answer(text)
    if final is not None and (value := _value(_NUMBER.match(final))) is not None:
        return value
    return _value(next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None))


def _value(number: re.Match[str] | None) -> Fraction | None:
    if number is None or len(number[0]) > _MOST_DIGITS or int(number["divisor"] or 1) == 0:
        return None
    value = Fraction(number["whole"].replace(",", "") + (number["fraction"] or "")) / int(number["divisor"] or 1)
    return -value if number["sign"] == "-" else value
