"""Value types of the generated tasks: an item, and a kind of task."""

from __future__ import annotations

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
    description: str
    levels: tuple[Draw, Draw, Draw]
    beyond: Draw
