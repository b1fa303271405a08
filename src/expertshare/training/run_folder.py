"""The folder of a run that can be taken up again: its settings, its log, and what it continues from."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from expertshare.errors import TrainingError

_STATE = {"step", "model", "optimisers"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """Files of a run. folder: as the user named it; work: where the run's own files are, `folder` or one in it.

    kind: what such a run is called in errors.
    """

    folder: Path
    work: Path
    kind: str

    @property
    def settings(self) -> Path:
        """What the run was started with."""
        return self.work / "run.json"

    @property
    def checkpoint(self) -> Path:
        """Model, optimisers and position, for --resume."""
        return self.work / "checkpoint.pt"

    @property
    def log(self) -> Path:
        """One JSON line per logged step."""
        return self.work / "train.jsonl"

    def check(self, *, resume: bool) -> None:
        """Raise TrainingError where there is a run that is not resumed, or none that could be."""
        if self.settings.exists() and not resume:
            raise TrainingError(
                f"{self.folder} already holds a {self.kind}; pass --resume to continue it or choose another folder"
            )
        if resume and not self.settings.exists():
            raise TrainingError(
                f"nothing to resume in {self.folder}: it has no {self.settings.relative_to(self.folder)}; leave out "
                "--resume to start"
            )

    def record(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Write what a new run is started with, or compare it with what a resumed one was.

        Raises TrainingError as `check` does, and where the settings differ or cannot be read.
        """
        self.check(resume=resume)
        wanted = json.loads(json.dumps(settings))
        if not self.settings.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            write_whole(self.settings, json.dumps(wanted, indent=2) + "\n")
            return
        found, asked = _flat(self._read_settings()), _flat(wanted)
        changed = sorted(key for key in {*found, *asked} if found.get(key) != asked.get(key))
        if changed:
            raise TrainingError(
                f"cannot resume {self.folder}: it was started with other settings for {', '.join(changed)}; repeat its "
                f"flags (see {self.settings.name}) or choose another folder"
            )

    def _read_settings(self) -> dict[str, Any]:
        path = self.settings
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path} cannot be read, expected a run's settings: choose another folder") from error
        if not isinstance(settings, dict):
            raise TrainingError(f"{path} holds no settings of a run, expected a JSON object: choose another folder")
        return settings

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write what a resumed run needs, whole or not at all."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def load_state(self, names: Collection[str]) -> dict[str, Any]:
        """What `save_state` wrote; TrainingError for a file that is damaged or something else. names: of the tensors
        of the model that is to continue."""
        path = self.checkpoint
        try:
            state = torch.load(path, weights_only=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            raise TrainingError(
                f"{path} cannot be read, expected what an interrupted run left: remove it, and the same command starts "
                f"from the first step ({type(error).__name__})"
            ) from error
        if not isinstance(state, dict) or not set(state) >= _STATE:
            raise TrainingError(f"{path} is not a training's, expected one with {', '.join(sorted(_STATE))}: remove it")
        differing = sorted({*state["model"]} ^ {*names})
        if differing:
            raise TrainingError(
                f"{path}: expected the tensors of this model ({min(names)}, ...), got those of another layout "
                f"({min(state['model'], default='none')}, ...), which an older version of expertshare wrote: finish "
                "the run with that version, or remove the file, and the same command starts from the first step"
            )
        return state

    def append_log(self, line: Mapping[str, Any]) -> None:
        """Add a line to the log, and see it on the disk."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut_log(self, steps: int) -> None:
        """Leave out what an interrupted run logged behind its last checkpoint: those steps will be run again."""
        if self.log.exists():
            lines = [line for line in self.log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            write_whole(self.log, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= steps))


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One entry for each setting of a section, as `section.name`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update({f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value})
    return flat
