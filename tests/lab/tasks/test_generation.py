"""Items are deterministic, distinct, disjoint between the splits, within the token budget, and true."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from hashlib import blake2b
from itertools import islice

import pytest
from tokenizers import Tokenizer

from expertshare.errors import InputError
from expertshare.lab.tasks.generation import TASKS, generate_items, iterate_items
from expertshare.lab.tasks.multiple_choice import CATEGORIES, PROPERTIES
from expertshare.lab.tasks.types import TaskItem

KINDS = ("arith", "math", "code", "code_pro", "choice")
FACT = re.compile(r"^(\d+) ([-+*/]) (\d+) = (\d+)$", re.MULTILINE)


def _test(task: str, count: int) -> list[TaskItem]:
    return list(islice(iterate_items(task, split="test", seed=3), count))


def _train(task: str, count: int, seed: int = 3) -> list[TaskItem]:
    return list(islice(iterate_items(task, split="train", seed=seed), count))


def test_the_table_holds_the_five_kinds() -> None:
    assert set(TASKS) == set(KINDS)


@pytest.mark.parametrize("task", KINDS)
def test_same_arguments_same_items_and_distinct_prompts(task: str) -> None:
    items = generate_items(task, split="train", count=400, seed=11)
    assert items == generate_items(task, split="train", count=400, seed=11)
    assert items != generate_items(task, split="train", count=400, seed=12)
    assert len({item.prompt for item in items}) == 400


@pytest.mark.parametrize("task", KINDS)
def test_splits_are_disjoint_whatever_the_seeds(task: str) -> None:
    train = {item.prompt for seed in (0, 1) for item in _train(task, 3000, seed)}
    test = {i.prompt for seed in (0, 1) for i in generate_items(task, split="test", count=150, seed=seed)}
    assert not train & test
    for prompts, held_out in ((train, False), (test, True)):
        for prompt in prompts:
            number = int.from_bytes(blake2b(prompt.encode(), digest_size=8).digest(), "big")
            assert (number % 16 == 0) is held_out


@pytest.mark.parametrize("task", KINDS)
def test_level_shares(task: str) -> None:
    shares = Counter(item.level for item in _train(task, 4000))
    assert [shares[level] / 4000 for level in (1, 2, 3)] == pytest.approx([0.30, 0.35, 0.35], abs=0.03)
    held_out = Counter(item.level for item in generate_items(task, split="test", count=500, seed=0))
    assert all(held_out[level] >= 60 for level in (1, 2, 3, 4))


@pytest.mark.parametrize("task", KINDS)
def test_token_budget(task: str, tokenizer: Tokenizer) -> None:
    sample_limit = 80 if task == "code_pro" else 64
    for item in _train(task, 2000) + _test(task, 500):
        prompt, reference = (len(tokenizer.encode(text).ids) for text in (item.prompt, item.reference))
        assert reference <= 36, item
        assert prompt + reference + 3 <= sample_limit, item


@pytest.mark.parametrize("task", ["arith", "math", "choice"])
def test_written_facts_are_true_and_in_range(task: str) -> None:
    operations: dict[str, Callable[[int, int], object]] = {
        "+": operator.add,
        "-": operator.sub,
        "*": operator.mul,
        "/": Fraction,
    }
    for item in _train(task, 2000):
        for left, symbol, right, result in FACT.findall(item.reference):
            assert operations[symbol](int(left), int(right)) == int(result)
            assert max(int(left), int(right), int(result)) <= 48


def _follow(story: str) -> int:
    """Read an arith story sentence by sentence, from its wording alone."""
    value = 0
    for sentence in story.split(". "):
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        if " has " in sentence and numbers:
            value = numbers[0] * (numbers[1] if "each" in sentence else 1)
        elif "more" in sentence:
            value += numbers[0]
        elif "doubles" in sentence:
            value *= 2
        elif "half" in sentence:
            value //= 2
        elif numbers:
            value -= numbers[0]
    return value


def test_arith_golds_follow_from_the_wording() -> None:
    for item in _train("arith", 2000) + _test("arith", 500):
        assert item.reference.endswith(f"#### {_follow(item.prompt)}"), item
        assert item.level == len(FACT.findall(item.reference))


def _value(expression: str, name: str, at: int) -> int:
    """Evaluate algebra as it is printed: implicit products, ^ for powers."""
    text = re.sub(rf"(\d)({name}|\()", r"\1*\2", expression).replace("^", "**")
    return int(eval(text, {name: at}))


def test_math_golds_hold_as_algebra() -> None:
    for item in _train("math", 3000) + _test("math", 500):
        verb, body = item.prompt.rstrip(".").split(" ", 1)
        final = item.reference.rpartition("#### ")[2]
        name = re.search(r"[a-z]", body.split(" at ")[0])
        assert name is not None
        v = name[0]
        if verb == "Solve":
            left, right = body.split(" = ")
            assert _value(left, v, int(final)) == _value(right, v, int(final))
        elif verb == "Evaluate":
            body, _, at = body.partition(f" at {v} = ")
            assert _value(body, v, int(at)) == int(final)
        elif verb == "Differentiate":  # exact for cubics: central difference minus the cubic coefficient
            cubic = int(body[0]) if "^3" in body else 0
            for x in (2, 5):
                slope = (_value(body, v, x + 1) - _value(body, v, x - 1)) // 2 - cubic
                assert slope == _value(final, v, x), item
        else:
            assert all(_value(body, v, x) == _value(final, v, x) for x in (1, 2, 7)), item


def test_choice_has_one_right_option_and_names_it() -> None:
    for item in _train("choice", 2000) + _test("choice", 500):
        question, _, listed = item.prompt.rstrip("?").partition(": ")
        options = re.split(r", | or ", listed)
        assert len(set(options)) == len(options) == 4
        right = [option for option in options if _answers(question.removeprefix("Which of these "), option, options)]
        steps, _, final = item.reference.rpartition("#### ")
        assert right == [final]
        assert not steps or steps.split(" = ")[-1] == f"{final}\n"


def _answers(asked: str, option: str, options: list[str]) -> bool:
    """Whether an option is right, from the word tables and plain arithmetic."""
    if asked in PROPERTIES:
        return option in PROPERTIES[asked]
    verb, _, rest = asked.partition(" ")
    if verb == "equals":
        left, symbol, right = rest.split()
        return int(option) == (int(left) + int(right) if symbol == "+" else int(left) - int(right))
    if rest in ("the largest", "the smallest"):
        return int(option) == (max if "largest" in rest else min)(map(int, options))
    if rest.startswith("not "):
        return not any(option in CATEGORIES[name] for name in rest.removeprefix("not ").split(" and not "))
    return option in CATEGORIES[rest]


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'arith'"):
        generate_items("arit", split="test", count=1, seed=0)
    with pytest.raises(InputError, match="0 or more"):
        generate_items("arith", split="test", count=-1, seed=0)
    with pytest.raises(InputError, match="ask for fewer"):
        generate_items("math", split="test", count=100_000, seed=0)
