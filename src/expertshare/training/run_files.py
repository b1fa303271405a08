"""Files of a run that can be taken up again: its settings, its log, and what it continues from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from expertshare.errors import TrainingError

_STATE = {"step", "model", "optimisers"}


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write what a resumed run needs, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; TrainingError for a file that is damaged or something else."""
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise TrainingError(
            f"{path} cannot be read, expected what an interrupted run left: remove it, and the same command starts "
            f"from the first step ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not set(state) >= _STATE:
        raise TrainingError(f"{path} is not a training's, expected one with {', '.join(sorted(_STATE))}: remove it")
    return state


def read_settings(path: Path) -> dict[str, Any]:
    """What a run was started with; TrainingError for a file that is no such record."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read, expected a run's settings: choose another folder") from error
    if not isinstance(settings, dict):
        raise TrainingError(f"{path} holds no settings of a run, expected a JSON object: choose another folder")
    return settings


def write_whole(path: Path, text: str) -> None:
    """Put a text in its place, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a log, and see it on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut_log(path: Path, steps: int) -> None:
    """Leave out what an interrupted run logged behind its last checkpoint: those steps will be run again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write_whole(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= steps))
