"""`train`: a small model from scratch. Configuration in, checkpoint while it runs, a model that loads anywhere out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from expertshare.models import save_model
from expertshare.models.transformer import MoETransformer, initialise
from expertshare.routing import RoutingPolicy, make_policy
from expertshare.training.batches import Sample, TrainingBatch, canvas_batches, grouped_batches
from expertshare.training.config import TrainingConfig, reference_architecture
from expertshare.training.optimisers import muon_and_adamw
from expertshare.training.run_folder import RunFolder
from expertshare.training.trainer import LoadBalance, StepResult, Trainer, train

_VOCABULARY_MULTIPLE = 64
"""The embedding is padded to a multiple of this many rows, for kernels that want round shapes."""


class Problems(Protocol):
    """Where a run takes its samples and its vocabulary."""

    vocab_size: int
    mask_id: int
    eos_id: int
    pad_id: int

    def draw(self, config: TrainingConfig, step: int) -> list[Sample]:
        """The samples of a 0-based step; the same for the same configuration and step."""
        ...

    def save_tokenizer(self, folder: Path) -> None:
        """Put the vocabulary's files beside the finished model."""
        ...


class FromProblems:
    """The objective of a run from scratch: other problems at every step, routed without sharing."""

    def __init__(self, model: MoETransformer, config: TrainingConfig, problems: Problems) -> None:
        self.problems = problems
        self._model, self._config = model.config, config
        self._policy = make_policy("vanilla").bind(model.config.router)

    def batches(self, step: int) -> list[TrainingBatch]:
        """Whole canvases for a model with full attention, else [noisy ; clean]."""
        samples = self.problems.draw(self._config, step)
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + step)
        make = canvas_batches if self._model.attention == "full" else grouped_batches
        return list(make(samples, self._model, self._config, generator))

    def policy(self, step: int) -> RoutingPolicy:
        """Vanilla routing at every step of training."""
        del step
        return self._policy


def run_folder(folder: Path) -> RunFolder:
    """The files of a run; the finished model is in `model` below them."""
    return RunFolder(folder=folder, work=folder, kind="training run")


def prepare(
    folder: RunFolder,
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
    architecture = reference_architecture(
        family=family,
        vocab_size=-(-problems.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE,
        mask_id=problems.mask_id,
        eos_id=problems.eos_id,
        pad_id=problems.pad_id,
        hidden=hidden,
        layers=layers,
        expert_hidden=expert_hidden,
        num_experts=num_experts,
    )
    folder.record({"training": asdict(config), "model": asdict(architecture)}, resume=resume)
    model = MoETransformer(architecture)
    initialise(model, seed=config.seed)
    return Trainer(
        model,
        config,
        FromProblems(model, config, problems),
        partial(
            muon_and_adamw,
            lr=config.matrix_lr,
            scalar_lr=config.scalar_lr,
            weight_decay=config.weight_decay,
            scalar_decay=0.0,
        ),
        balance=LoadBalance(model, rate=config.balance_rate, weight=config.balance_loss),
    )


def run(
    trainer: Trainer,
    folder: RunFolder,
    problems: Problems,
    *,
    resume: bool,
    log_every: int = 50,
    on_step: Callable[[StepResult], None] | None = None,
) -> Path:
    """Train to the end and export the model with the vocabulary of its problems. Returns the model's folder."""
    train(trainer, folder, resume=resume, log_every=log_every, on_step=on_step)
    path = folder.folder / "model"
    problems.save_tokenizer(path)
    save_model(trainer.model, path, dtype=torch.bfloat16)
    return path
