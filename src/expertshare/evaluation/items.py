"""What an evaluation asks, and how an answer is judged: the values between task sources and the runner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from expertshare.errors import InputError
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.sandbox import run_programs
from expertshare.evaluation.scoring import find_rule, program, score

DEFAULT_COUNT = 100
DEFAULT_GEN_LENGTH = 64
"""Longer than any reference answer of the generated tasks."""
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
    """correct: None where the answer was not judged. reason: why not, or why a program failed; None where right.

    harness: what lm-evaluation-harness says, where we judge in another way.
    """

    correct: bool | None
    reason: str | None = None
    harness: bool | None = None


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """What decides about items. limit: items of each task, the first ones (None: all; of generated kinds, 100).

    gen_length: of every answer (None: each task's own). shots: examples before a benchmark's question (None: the
    harness's number). data: folder of benchmark files (None: the hub). chat: None where the model has a template.
    """

    limit: int | None = None
    seed: int = 0
    gen_length: int | None = None
    shots: int | None = None
    data: Path | None = None
    chat: bool | None = None
    allow_code: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and (isinstance(self.limit, bool) or self.limit < 1):
            raise InputError(f"limit must be at least 1, got {self.limit!r}")
        if self.shots is not None and (isinstance(self.shots, bool) or self.shots < 0):
            raise InputError(f"shots must be at least 0, got {self.shots!r}")
        if self.gen_length is not None and self.gen_length < 1:
            raise InputError(f"gen_length must be at least 1, got {self.gen_length!r}")
        if self.data is not None and not self.data.is_dir():
            raise InputError(f"expected a folder of benchmark files, got {self.data}: check the path")


@dataclass(frozen=True, kw_only=True)
class GeneratedSource:
    """Prompts of one task that a generator draws from a seed. draw: gives `count` distinct prompts of a task and seed,
    fewer being the first of more."""

    task: str
    options: SourceOptions
    draw: Callable[..., Sequence[PromptRecord]]
    _drawn: list[PromptRecord] = field(default_factory=list)

    def items(self) -> Sequence[EvalItem]:
        """As many as the limit says; fewer items of the same seed are the first of more."""
        if not self._drawn:
            count = self.options.limit or DEFAULT_COUNT
            self._drawn.extend(self.draw(self.task, count=count, seed=self.options.seed))
        return [
            EvalItem(
                task=self.task,
                id=str(number),
                prompt=record.prompt,
                chat=self.options.chat,
                gen_length=self.options.gen_length or DEFAULT_GEN_LENGTH,
                content=sha256_text(json.dumps(asdict(record))),
            )
            for number, record in enumerate(self._drawn)
        ]

    def judge(self, item: EvalItem, answer: str) -> Judgement:
        """By the rule of the task; programs run in the sandbox, if code is allowed."""
        record = self._drawn[int(item.id)]
        if find_rule(self.task) != "program":
            return Judgement(correct=score(record, answer))
        if not self.options.allow_code:
            return Judgement(correct=None, reason=CODE_NOT_ALLOWED)
        [verdict] = run_programs([program(record, answer)])
        return Judgement(correct=verdict.passed, reason=None if verdict.passed else failure(verdict.reason))
