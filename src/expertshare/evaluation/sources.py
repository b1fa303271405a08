"""From task names to sources of items: generated kinds, and benchmarks by way of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from expertshare.errors import InputError, nearest
from expertshare.evaluation.harness.benchmarks import BENCHMARKS
from expertshare.evaluation.harness.loading import installed_version
from expertshare.evaluation.harness.source import HarnessSource
from expertshare.evaluation.items import GeneratedSource, TaskSource
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.scoring import ANSWER_RULES
from expertshare.models import LoadedModel

DEFAULT_COUNT = 100
DEFAULT_GEN_LENGTH = 64
"""Longer than any reference answer of the generated tasks."""


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


def check_task_names(names: Sequence[str]) -> tuple[str, ...]:
    """Each name once, in order; InputError for none, or one that is no task's."""
    known = [*ANSWER_RULES, *BENCHMARKS]
    if not names:
        raise InputError(f"expected at least one task, got none. {nearest('', known)}")
    for name in names:
        if name not in known:
            raise InputError(f"expected the name of a task, got {name!r}. {nearest(name, known)}")
    return tuple(dict.fromkeys(names))


def harness_version(names: Sequence[str]) -> str | None:
    """Version of lm-evaluation-harness where one of these tasks is asked through it; else nothing depends on it."""
    return installed_version() if any(name in BENCHMARKS for name in names) else None


def make_sources(
    names: Sequence[str], options: SourceOptions, loaded: LoadedModel, *, draw: Callable[..., Sequence[PromptRecord]]
) -> list[TaskSource]:
    """A source for each task, ready to give items. draw: the generator of `GeneratedSource`.

    Raises InputError, also where an extra is not installed.
    """
    sources: list[TaskSource] = []
    for name in check_task_names(names):
        if name in ANSWER_RULES:
            sources.append(
                GeneratedSource(
                    task=name,
                    draw=draw,
                    count=options.limit or DEFAULT_COUNT,
                    seed=options.seed,
                    gen_length=options.gen_length or DEFAULT_GEN_LENGTH,
                    chat=options.chat,
                    allow_code=options.allow_code,
                )
            )
        else:
            sources.append(
                HarnessSource.load(
                    BENCHMARKS[name],
                    limit=options.limit,
                    seed=options.seed,
                    gen_length=options.gen_length,
                    shots=options.shots,
                    data=options.data,
                    chat=options.chat,
                    allow_code=options.allow_code,
                    tokenizer=loaded.tokenizer,
                )
            )
    return sources
