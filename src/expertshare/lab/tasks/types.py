"""What all kinds of generated tasks share: an item, a kind, and arithmetic facts, each written in one way: "a + b = c".

One spelling and one small table per operation, so that a fact learnt in a worded problem also serves
equations. All values lie in 0..48. Added and subtracted operands are 1..10; products are 2..9 times 2..6;
a division undoes such a product and divides by its second factor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from expertshare.evaluation.prompts import PromptRecord

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskItem(PromptRecord):
    """One generated problem with its gold answer.

    `reference` is the text the model is trained to emit. `tests` are Python statements that must run without
    an exception after the answer's code (code kinds only, else empty). `level` is 1, 2 or 3, or 4 for
    test items that go one step beyond what training items ask.
    """

    task: str
    reference: str
    level: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a level's draw returns, before the kind's name and level are attached."""

    prompt: str
    reference: str
    tests: tuple[str, ...] = ()


Draw = Callable[[Random], Draft]


def one_of(draws: Sequence[Draw]) -> Draw:
    """A draw that chooses among `draws`, each as likely as the others."""
    return lambda rng: rng.choice(draws)(rng)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A kind of task: one draw per level, easiest first. `evaluation.scoring.ANSWER_RULES` says how answers are judged.

    `beyond` is level 4, which only the test split has: known steps in a number or combination never trained on.
    """

    name: str
    levels: tuple[Draw, Draw, Draw]
    beyond: Draw


MAX_VALUE = 48
MAX_OPERAND = 10
FACTORS = range(2, 10)
MULTIPLIERS = range(2, 7)
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}


@dataclass(frozen=True, slots=True)
class Fact:
    """`left symbol right = result`, all integers in 0..MAX_VALUE; divisions leave no rest."""

    left: int
    symbol: str
    right: int

    @property
    def result(self) -> int:
        """The number that the operation gives."""
        return OPERATIONS[self.symbol](self.left, self.right)

    @property
    def text(self) -> str:
        """The one spelling of this fact."""
        return f"{self.left} {self.symbol} {self.right} = {self.result}"


SUMS = tuple(Fact(a, "+", b) for b in range(1, MAX_OPERAND + 1) for a in range(MAX_VALUE - b + 1))
DIFFERENCES = tuple(Fact(fact.result, "-", fact.right) for fact in SUMS)
PRODUCTS = tuple(Fact(a, "*", b) for a in FACTORS for b in MULTIPLIERS if a * b <= MAX_VALUE)
QUOTIENTS = tuple(Fact(fact.result, "/", fact.right) for fact in PRODUCTS)


def sum_onto(rng: Random, value: int) -> Fact:
    """A sum that starts from `value` (below MAX_VALUE)."""
    return Fact(value, "+", rng.randint(1, min(MAX_OPERAND, MAX_VALUE - value)))


def difference_from(rng: Random, value: int) -> Fact:
    """A difference that starts from `value` (at least 1)."""
    return Fact(value, "-", rng.randint(1, min(MAX_OPERAND, value)))


def worked(facts: Sequence[Fact], final: object) -> str:
    """A worked answer: one fact per line, then the final answer behind "####"."""
    return "\n".join([*(fact.text for fact in facts), f"#### {final}"])
