"""What an evaluation asks, how an answer is judged, and under which settings papers did (PRESETS): the values between
task sources and the runner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from expertshare.errors import InputError, nearest
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.sandbox import Verdict, run_programs
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


def judge_code(run: Callable[[], Verdict], *, allowed: bool) -> Judgement:
    """What running an answer's code says, if that is allowed.

    Of a failure the kind alone is kept: messages may hold addresses, which no second run repeats.
    """
    if not allowed:
        return Judgement(correct=None, reason=CODE_NOT_ALLOWED)
    verdict = run()
    return Judgement(correct=verdict.passed, reason=None if verdict.passed else verdict.reason.partition(":")[0])


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
        for name, least in (("limit", 1), ("shots", 0), ("gen_length", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < least):
                raise InputError(f"{name} must be at least {least}, got {value!r}")
        if self.data is not None and not self.data.is_dir():
            raise InputError(f"expected a folder of benchmark files, got {self.data}: check the path")


@dataclass(frozen=True, kw_only=True)
class GeneratedSource:
    """Prompts of one task that a generator draws from a seed. draw: gives `count` distinct prompts of a task and seed,
    fewer being the first of more."""

    task: str
    options: SourceOptions
    draw: Callable[..., Sequence[PromptRecord]]

    @cached_property
    def _drawn(self) -> Sequence[PromptRecord]:
        return self.draw(self.task, count=self.options.limit or DEFAULT_COUNT, seed=self.options.seed)

    def items(self) -> Sequence[EvalItem]:
        """As many as the limit says; fewer items of the same seed are the first of more."""
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
        return judge_code(lambda: run_programs([program(record, answer)])[0], allowed=self.options.allow_code)


DecodingValue = int | float | str | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """decoding: fields of DecodingOptions. shots: examples before a benchmark's question (None: the harness's number).

    source: where these were read. unknown: what was not found, and what stands in for it here.
    """

    name: str
    source: str
    decoding: Mapping[str, DecodingValue]
    shots: int | None
    chat: bool | None
    unknown: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The settings as plain values for JSON."""
        return {**asdict(self), "unknown": list(self.unknown)}


_BLOCKS_OF_32 = {"block_length": 32, "steps_per_block": 32, "threshold": 0.95, "temperature": 0.0}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="dmoe",
            source="github.com/fscdc/dMoE at a5b7679, evaluations/scripts_moe (length, block, steps, temperature), "
            "generate() of its model (threshold), evaluations/evaluation/*/prompt.py (no examples, chat template)",
            decoding={"gen_length": 2048, **_BLOCKS_OF_32},
            shots=0,
            chat=None,
            unknown=(
                "its prompts are its own (step by step, answer in \\boxed{}); here they are the harness's, and ARC-C "
                "and MMLU answer with a letter at once",
                "its MMLU is high_school_mathematics only: task mmlu_hs_math",
            ),
        ),
        Preset(
            name="des",
            source="arXiv 2602.00879 as summarised in this project's notes: LLaDA2.0-mini and LLaDA-MoE, blocks of 32; "
            "threshold, steps and temperature are those that LLaDA2.0 was released with",
            decoding={"gen_length": 512, **_BLOCKS_OF_32},
            shots=None,
            chat=None,
            unknown=(
                "its answer length was not found; 512 is ours",
                "its number of examples was not found; the harness's own number is used",
                "its threshold, steps and prompts were not found",
            ),
        ),
    )
}


def find_preset(name: str) -> Preset:
    """The preset called `name`; InputError with the nearest known name."""
    if name not in PRESETS:
        raise InputError(f"expected the name of a preset, got {name!r}. {nearest(name, PRESETS)}")
    return PRESETS[name]
