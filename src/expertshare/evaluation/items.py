"""What an evaluation asks, and how an answer is judged: the values between task sources and the runner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.sandbox import run_programs
from expertshare.evaluation.scoring import find_rule, program, score

CODE_NOT_ALLOWED = "code is not executed without --allow-code"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalItem:
    """One question. `id` is unique within its task.

    chat: whether the prompt still has to go through the chat template (None: where the model has one; False: the
    prompt is complete). content: hash of everything that the question and its judgement depend on.
    """

    task: str
    id: str
    prompt: str
    chat: bool | None
    gen_length: int
    content: str

    @property
    def prompt_sha256(self) -> str:
        """Hash of the prompt's text."""
        return sha256_text(self.prompt)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """correct: None where the answer was not judged. reason: why not, or why a program failed; None where right."""

    correct: bool | None
    reason: str | None = None


class TaskSource(Protocol):
    """Where the items of one task come from, and who judges their answers."""

    @property
    def task(self) -> str:
        """The task's name, as on the command line."""
        ...

    def items(self) -> Sequence[EvalItem]:
        """All items, in the order in which they are asked; the same at every call."""
        ...

    def judge(self, item: EvalItem, answer: str) -> Judgement:
        """Judge the answer to one of `items`. What a model wrote never makes it raise."""
        ...


def sha256_text(text: str) -> str:
    """Hexadecimal hash of a text; lone surrogates, which no file can hold, count by their code."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def failure(reason: str) -> str:
    """The kind of a program's failure. Messages stay out: they may hold addresses, which no second run repeats."""
    return reason.partition(":")[0]


@dataclass(frozen=True, kw_only=True)
class GeneratedSource:
    """Prompts of one task that a generator draws from a seed. draw: gives `count` distinct prompts of a task and seed,
    fewer being the first of more."""

    task: str
    draw: Callable[..., Sequence[PromptRecord]]
    count: int
    seed: int
    gen_length: int
    chat: bool | None
    allow_code: bool
    _drawn: list[PromptRecord] = field(default_factory=list)

    def items(self) -> Sequence[EvalItem]:
        """`count` items; fewer items of the same seed are the first of more."""
        if not self._drawn:
            self._drawn.extend(self.draw(self.task, count=self.count, seed=self.seed))
        return [
            EvalItem(
                task=self.task,
                id=str(number),
                prompt=record.prompt,
                chat=self.chat,
                gen_length=self.gen_length,
                content=sha256_text(json.dumps(asdict(record))),
            )
            for number, record in enumerate(self._drawn)
        ]

    def judge(self, item: EvalItem, answer: str) -> Judgement:
        """By the rule of the task; programs run in the sandbox, if code is allowed."""
        record = self._drawn[int(item.id)]
        if find_rule(self.task) != "program":
            return Judgement(correct=score(record, answer))
        if not self.allow_code:
            return Judgement(correct=None, reason=CODE_NOT_ALLOWED)
        [verdict] = run_programs([program(record, answer)])
        return Judgement(correct=verdict.passed, reason=None if verdict.passed else failure(verdict.reason))
