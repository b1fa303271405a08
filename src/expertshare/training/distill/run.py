"""One distillation as a folder: answers, configuration and checkpoint while it runs, a model that loads anywhere out.

The finished model lies in the folder itself, the run's own files below `distillation/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expertshare.errors import TrainingError
from expertshare.measure.environment import capture_environment
from expertshare.models import LoadedModel, MoETransformer, save_model
from expertshare.routing import knobs
from expertshare.training.distill.answers import StoredAnswer
from expertshare.training.distill.model_card import model_card
from expertshare.training.distill.trainer import DistillStep, DistillTrainer
from expertshare.training.run_files import append_line, cut_log, load_state, read_settings, save_state, write_whole

StepListener = Callable[[DistillStep], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillPaths:
    """Files of a run. folder: where the finished model goes."""

    folder: Path

    @property
    def work(self) -> Path:
        """Everything that is not the model."""
        return self.folder / "distillation"

    @property
    def answers(self) -> Path:
        """The model's own answers."""
        return self.work / "answers.jsonl"

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

    @property
    def record(self) -> Path:
        """What the finished model was distilled for, and how; `expertshare info` shows its policy."""
        return self.folder / "distillation.json"


def check_folder(paths: DistillPaths, *, resume: bool) -> None:
    """Raise TrainingError where the folder holds a model, a run that is not resumed, or none that could be."""
    if paths.settings.exists():
        if not resume:
            raise TrainingError(
                f"{paths.folder} already holds a distillation; pass --resume to continue it or choose another folder"
            )
        return
    if resume:
        raise TrainingError(f"nothing to resume in {paths.folder}; leave out --resume to start")
    if (paths.folder / "config.json").exists():
        raise TrainingError(f"{paths.folder} holds a model already, which would be overwritten: choose another folder")


def record_settings(paths: DistillPaths, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Write what a new run is started with, or compare it with what a resumed one was.

    Raises TrainingError where the folder holds another run or another model, or none that could be resumed.
    """
    check_folder(paths, resume=resume)
    wanted = json.loads(json.dumps(settings))
    if paths.settings.exists():
        found = read_settings(paths.settings)
        changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        if changed:
            raise TrainingError(
                f"cannot resume {paths.folder}: it was started with other settings for {', '.join(changed)}; repeat "
                f"its flags (see {paths.settings.name}) or choose another folder"
            )
        return
    paths.work.mkdir(parents=True, exist_ok=True)
    write_whole(paths.settings, json.dumps(wanted, indent=2) + "\n")


def train(
    trainer: DistillTrainer,
    paths: DistillPaths,
    *,
    resume: bool,
    log_every: int = 10,
    on_step: StepListener | None = None,
) -> None:
    """Run to the configured number of steps, saving every `checkpoint_every` and at the end, whole or not at all."""
    config, first = trainer.config, trainer.processes.rank == 0
    if resume and paths.checkpoint.exists():
        trainer.restore(load_state(paths.checkpoint))
    if first:
        cut_log(paths.log, trainer.step_index)
    window: list[DistillStep] = []
    while trainer.step_index < config.steps:
        result = trainer.step()
        window.append(result)
        done = trainer.step_index
        save = done % config.checkpoint_every == 0 or done == config.steps
        if save or done % log_every == 0:
            if first:
                _log(paths.log, window)
            window.clear()
        if save:
            state = trainer.state()
            if first:
                save_state(state, paths.checkpoint)
            trainer.processes.wait()
        if on_step is not None:
            on_step(result)


def export(trainer: DistillTrainer, base: LoadedModel, answers: Sequence[StoredAnswer], paths: DistillPaths) -> Path:
    """Write the trained model, its tokenizer, what it was distilled for, and its model card. All processes must call.

    The dtype is that of `base`, the model that was started from. Returns the model's folder.
    """
    state = trainer.state()["model"]
    if trainer.processes.rank == 0:
        model = MoETransformer(base.config)
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
        record = _record(trainer, base, answers)
        write_whole(paths.record, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_whole(paths.folder / "README.md", model_card(record))
        save_model(model, paths.folder, dtype=base.model.dtype, tokenizer_dir=base.path)
    trainer.processes.wait()
    return paths.folder


def _record(trainer: DistillTrainer, base: LoadedModel, answers: Sequence[StoredAnswer]) -> dict[str, Any]:
    target = trainer.curriculum.target
    environment = capture_environment(trainer.model.device)
    return {
        "policy": trainer.config.policy,
        "knobs": {"name": target.name, **knobs(target)},
        "base_model": base.path.name,
        "training": asdict(trainer.config),
        "peak_lr": trainer.config.peak_lr,
        "answers": len(answers),
        "unfinished": sum(not answer.finished for answer in answers),
        "processes": trainer.processes.count,
        "commit": environment.commit,
        "versions": environment.versions,
    }


def _log(path: Path, window: Sequence[DistillStep]) -> None:
    line = {
        "step": window[-1].step + 1,
        "loss": sum(r.loss for r in window) / len(window),
        "unique_experts": sum(r.unique_experts for r in window) / len(window),
        "positions_per_s": sum(r.positions for r in window) / sum(r.elapsed_s for r in window),
    }
    append_line(path, line)
