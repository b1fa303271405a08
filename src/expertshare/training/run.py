"""One training run as a folder: configuration in, checkpoint while it runs, a model that loads anywhere out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from expertshare.config import ModelConfig
from expertshare.errors import TrainingError
from expertshare.models import save_model
from expertshare.models.transformer import MoETransformer, initialise
from expertshare.training.config import TrainingConfig, reference_architecture
from expertshare.training.loop import Problems, StepResult, Trainer, train
from expertshare.training.run_files import append_line, cut_log, read_settings, write_whole

_VOCABULARY_MULTIPLE = 64
"""The embedding is padded to a multiple of this many rows, for kernels that want round shapes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPaths:
    """Files of a run inside its folder."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """Model, optimisers and position, for --resume."""
        return self.folder / "checkpoint.pt"

    @property
    def config(self) -> Path:
        """Resolved configuration of the run."""
        return self.folder / "run.json"

    @property
    def log(self) -> Path:
        """One JSON line per logged step."""
        return self.folder / "train.jsonl"

    @property
    def model(self) -> Path:
        """The finished model in Hugging Face layout."""
        return self.folder / "model"


def prepare(
    paths: RunPaths,
    config: TrainingConfig,
    problems: Problems,
    *,
    family: str = "llada2_moe",
    hidden: int,
    layers: int,
    expert_hidden: int,
    num_experts: int = 64,
    resume: bool,
) -> Trainer:
    """Build model and trainer; record the configuration. A resumed run must ask for the same one.

    Raises TrainingError if the folder holds another run, ConfigError for an unknown family.
    """
    entries = -(-problems.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    architecture = reference_architecture(
        family=family,
        vocab_size=entries,
        mask_id=problems.mask_id,
        eos_id=problems.eos_id,
        pad_id=problems.pad_id,
        hidden=hidden,
        layers=layers,
        expert_hidden=expert_hidden,
        num_experts=num_experts,
    )
    _record(paths, config, architecture, resume=resume)
    model = MoETransformer(architecture)
    initialise(model, seed=config.seed)
    return Trainer(model, config, problems)


def _record(paths: RunPaths, config: TrainingConfig, architecture: ModelConfig, *, resume: bool) -> None:
    wanted = json.loads(json.dumps({"training": asdict(config), "model": asdict(architecture)}))
    if paths.config.exists():
        if not resume:
            raise TrainingError(
                f"{paths.folder} already holds a training run; pass --resume to continue it or choose another folder"
            )
        found = read_settings(paths.config)
        changed = sorted(_differences(found, wanted))
        if changed:
            raise TrainingError(
                f"cannot resume {paths.folder}: it was started with other settings for {', '.join(changed)}; "
                "repeat its flags (see run.json) or choose another folder"
            )
        return
    if resume:
        raise TrainingError(f"nothing to resume in {paths.folder}: it has no run.json; leave out --resume to start")
    paths.folder.mkdir(parents=True, exist_ok=True)
    write_whole(paths.config, json.dumps(wanted, indent=2) + "\n")


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"{section}.{key}"
        for section in wanted
        for key in wanted[section]
        if found.get(section, {}).get(key) != wanted[section][key]
    ]


def run(
    trainer: Trainer,
    paths: RunPaths,
    *,
    resume: bool,
    log_every: int = 50,
    on_step: Callable[[StepResult], None] | None = None,
) -> Path:
    """Train to the end and export the model with its tokenizer. Returns the model's folder."""
    window: list[StepResult] = []
    is_first = True

    def record(result: StepResult) -> None:
        nonlocal is_first
        if is_first:
            cut_log(paths.log, result.step)
        is_first = False
        window.append(result)
        if len(window) == log_every or result.step + 1 == trainer.config.steps:
            _log(paths.log, window)
            window.clear()
        if on_step is not None:
            on_step(result)

    train(trainer, paths.checkpoint, resume=resume, on_step=record)
    trainer.problems.save_tokenizer(paths.model)
    save_model(trainer.model, paths.model, dtype=torch.bfloat16)
    return paths.model


def _log(path: Path, window: list[StepResult]) -> None:
    line = {
        "step": window[-1].step + 1,
        "loss": sum(r.loss for r in window) / len(window),
        "load_imbalance": window[-1].load_imbalance,
        "positions_per_s": sum(r.positions for r in window) / sum(r.elapsed_s for r in window),
    }
    append_line(path, line)
