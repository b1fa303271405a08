"""Errors that a user can cause or act on. Each message says what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExpertShareError(Exception):
    """Base class: catch this to handle every error that expertshare raises on purpose."""


class InputError(ExpertShareError):
    """A prompt, prompt file, flag or path is unusable."""


class ConfigError(ExpertShareError):
    """A configuration value is missing, unknown or not supported."""


class PolicyError(ExpertShareError):
    """A policy name or one of its knobs is unusable for this model."""


class CheckpointError(ExpertShareError):
    """A checkpoint directory or one of its tensors is unusable."""


class ExpertMemoryError(ExpertShareError):
    """The memory for experts does not hold what a step needs at once."""


class NumericsError(ExpertShareError):
    """The model produced values that are not finite. row: of the batch, where it is known: others may go on."""

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class SandboxError(ExpertShareError):
    """The sandbox that runs generated code could not be started or broke down."""


class EvaluationError(ExpertShareError):
    """An evaluation cannot go on, or its run directory holds something else."""


class TrainingError(ExpertShareError):
    """A training run cannot start or cannot go on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Suffix for an error about an unknown `name`: the nearest known one, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."
