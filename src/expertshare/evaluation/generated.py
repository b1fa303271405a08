"""Generated tasks as a source of evaluation items: unseen prompts only, drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from expertshare.evaluation.items import CODE_NOT_ALLOWED, EvalItem, Judgement, failure, sha256_text
from expertshare.lab.tasks import TASKS, TaskItem, generate_items, run_programs, score

DEFAULT_COUNT = 100
DEFAULT_GEN_LENGTH = 64
"""Longer than any reference answer of these tasks."""


@dataclass(frozen=True, kw_only=True)
class GeneratedSource:
    """Items of the test split of one kind of expertshare.lab.tasks."""

    task: str
    count: int
    seed: int
    gen_length: int
    chat: bool | None
    allow_code: bool
    _drawn: list[TaskItem] = field(default_factory=list)

    def items(self) -> Sequence[EvalItem]:
        """`count` items; fewer items of the same seed are the first of more."""
        if not self._drawn:
            self._drawn.extend(generate_items(self.task, split="test", count=self.count, seed=self.seed))
        return [
            EvalItem(
                task=self.task,
                id=str(number),
                prompt=item.prompt,
                chat=self.chat,
                gen_length=self.gen_length,
                content=sha256_text(json.dumps(asdict(item))),
            )
            for number, item in enumerate(self._drawn)
        ]

    def judge(self, item: EvalItem, answer: str) -> Judgement:
        """By the rule of the kind; programs run in the sandbox, if code is allowed."""
        drawn = self._drawn[int(item.id)]
        if TASKS[self.task].answer_rule != "program":
            return Judgement(correct=score(drawn, answer))
        if not self.allow_code:
            return Judgement(correct=None, reason=CODE_NOT_ALLOWED)
        [verdict] = run_programs(["\n".join([answer, "", *drawn.tests, ""])])
        return Judgement(correct=verdict.passed, reason=None if verdict.passed else failure(verdict.reason))
