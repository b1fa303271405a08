"""Every reference is right for its own item, and what is broken is wrong."""

from __future__ import annotations

import re

import pytest

from expertshare.errors import InputError
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.scoring import last_number, score, score_many
from expertshare.lab.tasks.generation import generate_items, iterate_items
from expertshare.lab.tasks.types import TaskItem

KINDS = ("arith", "math", "code", "code_pro", "choice")


@pytest.mark.parametrize("task", KINDS)
def test_references_are_right(task: str) -> None:
    items = generate_items(task, split="test", count=300, seed=4)
    assert all(score_many(items, [item.reference for item in items]))


@pytest.mark.parametrize("task", KINDS)
def test_references_of_other_items_and_empty_answers_are_wrong(task: str) -> None:
    items = generate_items(task, split="train", count=100, seed=4)
    assert not any(score_many(items, [""] * 100))
    assert not any(score_many(items, [item.reference.replace("####", "") + "\n???" for item in items]))


@pytest.mark.parametrize("task", ["arith", "math", "choice"])
def test_changed_final_answers_are_wrong(task: str) -> None:
    items = generate_items(task, split="train", count=300, seed=4)
    changed = []
    for item in items:
        steps, mark, final = item.reference.rpartition("#### ")
        broken = re.sub(r"\d+", lambda m: str(int(m[0]) + 1), final, count=1)
        changed.append(steps + mark + (broken if broken != final else f"{final}s"))
    assert not any(score_many(items, changed))


def _mutants(reference: str) -> list[str]:
    """One number raised by one, or one sign turned, everywhere that is possible."""
    spots = [(m, str(int(m[0]) + 1)) for m in re.finditer(r"\d+", reference)]
    spots += [(m, {" + ": " - ", " - ": " + "}[m[0]]) for m in re.finditer(r" [-+] ", reference)]
    return [reference[: m.start()] + text + reference[m.end() :] for m, text in spots]


@pytest.mark.parametrize(("task", "least"), [("code", 0.98), ("code_pro", 0.98)])
def test_mutated_programs_fail_their_tests(task: str, least: float) -> None:
    """The few that pass mean the same: "x if x > 8 else 9" and "x if x > 9 else 9"."""
    items = generate_items(task, split="train", count=250, seed=6)
    pairs = [(item, mutant) for item in items for mutant in _mutants(item.reference)]
    caught = [not right for right in score_many([i for i, _ in pairs], [m for _, m in pairs])]
    assert sum(caught) / len(caught) >= least


def test_the_second_function_must_call_the_first() -> None:
    item = next(
        item
        for item in iterate_items("code_pro", split="train", seed=0)
        if "times 3. Then" in item.prompt and item.level == 1 and item.reference.count("(") == 3
    )
    first, second = item.reference.split("\ndef ")
    name = re.match(r"def (\w+)", first)
    assert name is not None
    inlined = re.sub(rf"{name[1]}\((\w+)\)", r"(\1 * 3)", second)
    assert inlined != second
    assert score_many([item, item], [item.reference, f"{first}\ndef {inlined}"]) == [True, False]
    namespace: dict[str, object] = {}
    exec("\n".join([f"{first}\ndef {inlined}", *item.tests[:-1]]), namespace)  # only the last test minds


ARITH = TaskItem(task="arith", prompt="p", reference="12 + 7 = 19\n#### 19", level=1)
THOUSANDS = TaskItem(task="arith", prompt="p", reference="#### 1,234", level=1)
MATH = TaskItem(task="math", prompt="p", reference="2 * 3 = 6\n#### 6x + 5", level=2)
CHOICE = TaskItem(task="choice", prompt="p", reference="#### iron", level=1)


@pytest.mark.parametrize(
    ("item", "answer", "right"),
    [
        (ARITH, "#### 19", True),
        (ARITH, "#### 3\n#### 19", True),
        (ARITH, "#### 19 apples", True),
        (ARITH, "#### 019", True),
        (ARITH, "#### 19\n#### 3", False),
        (ARITH, "#### 19.5", False),
        (ARITH, "#### 19...", True),
        (ARITH, "#### $19.00", True),
        (ARITH, "#### 19/2", False),
        (ARITH, "#### 38/2", True),
        (ARITH, "#### 19/0", False),
        (ARITH, "#### -19", False),
        (ARITH, "#### 1,9", False),
        (THOUSANDS, "#### 1234", True),
        (THOUSANDS, "#### $1,234.00.", True),
        (THOUSANDS, "#### 1,2345", False),
        (ARITH, "#### 190", False),
        (ARITH, "19", False),
        (MATH, "####6x+5\n", True),
        (MATH, "#### 6x + 5x", False),
        (MATH, "#### 5 + 6x", False),
        (CHOICE, "a metal\n####  iron\n", True),
        (CHOICE, "#### iron or tin", False),
        (CHOICE, "iron", False),
    ],
)
def test_final_answers(item: TaskItem, answer: str, right: bool) -> None:
    assert score(item, answer) is right


def test_records_without_a_task() -> None:
    assert score(PromptRecord(prompt="p", reference="a b"), " a  b\n")
    assert score(PromptRecord(prompt="p", reference="x\n#### 4"), "y\n#### 4")
    assert score(PromptRecord(prompt="p", tests=("assert f() == 1",)), "def f(): return 1")
    with pytest.raises(InputError, match='"reference"'):
        score(PromptRecord(prompt="p"), "a")
    with pytest.raises(InputError, match='"tests"'):
        score(PromptRecord(prompt="p", task="code", reference="a"), "a")
    with pytest.raises(InputError, match="Did you mean 'choice'"):
        score(PromptRecord(prompt="p", task="choise", reference="a"), "a")


def test_counts_must_agree() -> None:
    with pytest.raises(InputError, match="got 0 for 1 items"):
        score_many([ARITH], [])


def test_programs_that_leave_early_or_hide_the_tests_are_wrong() -> None:
    item = generate_items("code", split="train", count=1, seed=0)[0]
    answers = [
        f"{item.reference}\nimport os; os._exit(0)",
        f"{item.reference}\nraise SystemExit",
        f'{item.reference}\n"""',
        f"{item.reference}\nif False:",
        f"{item.reference}\n(",
    ]
    assert score_many([item] * len(answers), answers) == [False] * len(answers)


def test_a_number_too_long_to_read_is_wrong() -> None:
    """A model that repeats itself must not stop an evaluation."""
    item = PromptRecord(prompt="1 + 1", reference="#### 2", task="arith")
    assert score_many([item, item], ["#### " + "1" * 5000, "#### 2"]) == [False, True]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("She earns 5 * 9 = 45.\n#### 72...", 72),
        ("#### $29.00", 29),
        ("The answer is 72.00", 72),
        ("costs $70,000.00 in all.", 70_000),
        ("so 7/2 of 10", 10),
        ("none", None),
        ("#### none, but 3", 3),
        ("it falls to -4", -4),
    ],
)
def test_the_value_of_a_free_answer(answer: str, value: int | None) -> None:
    assert last_number(answer) == value
