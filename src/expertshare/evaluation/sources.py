"""From task names to sources of items: generated kinds, and benchmarks by way of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expertshare.errors import InputError, nearest
from expertshare.evaluation.harness.benchmarks import BENCHMARKS
from expertshare.evaluation.harness.loading import installed_version
from expertshare.evaluation.harness.source import HarnessSource
from expertshare.evaluation.items import GeneratedSource, SourceOptions, TaskSource
from expertshare.evaluation.prompts import PromptRecord
from expertshare.evaluation.scoring import ANSWER_RULES
from expertshare.models import LoadedModel


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
    return [
        GeneratedSource(task=name, options=options, draw=draw)
        if name in ANSWER_RULES
        else HarnessSource.load(BENCHMARKS[name], options, loaded.tokenizer)
        for name in check_task_names(names)
    ]
