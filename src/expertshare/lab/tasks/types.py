"""Value types of the task room: a generated item, a prompt file's record, a kind of task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "test"]
AnswerRule = Literal["number", "text", "program"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskItem:
    """One generated problem with its gold answer.

    `reference` is the text the model is trained to emit. `tests` are Python statements that must run without
    an exception after the answer's code (code kinds only, else empty). `level` is 1, 2 or 3, or 4 for
    test items that go one step beyond what training items ask.
    """

    task: str
    prompt: str
    reference: str
    tests: tuple[str, ...] = ()
    level: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """One line of a prompt file; only `prompt` is required there."""

    prompt: str
    reference: str | None = None
    task: str | None = None
    tests: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a level's draw returns, before the kind's name and level are attached."""

    prompt: str
    reference: str
    tests: tuple[str, ...] = ()


Draw = Callable[[Random], Draft]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A kind of task: one draw per level, easiest first, and the rule that judges answers.

    `beyond` is level 4, which only the test split has: known steps in a number or combination never trained on.

    `number` and `text` compare what follows the last "####" of answer and reference (as an integer, with blanks
    ignored); `program` runs the item's tests after the answer.
    """

    name: str
    description: str
    levels: tuple[Draw, Draw, Draw]
    beyond: Draw
    answer_rule: AnswerRule
