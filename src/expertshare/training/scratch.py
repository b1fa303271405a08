"""`train`: a small model on generated problems; a checkpoint while it runs, and a model that loads anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from expertshare.config import ModelConfig
from expertshare.errors import TrainingError
from expertshare.models import LoadedModel, save_model
from expertshare.models.transformer import MoETransformer, initialise
from expertshare.routing import make_policy
from expertshare.training.batches import Sample
from expertshare.training.config import TrainingConfig, reference_architecture
from expertshare.training.optimisers import muon_and_adamw
from expertshare.training.run_folder import RunFolder
from expertshare.training.trainer import LoadBalance, StepResult, Trainer, train

_VOCABULARY_MULTIPLE = 64
"""The embedding is padded to a multiple of this many rows, for kernels that want round shapes."""


class Problems(Protocol):
    """Where a run takes its samples and its vocabulary."""

    vocabulary: Mapping[str, int]
    mask_id: int
    eos_id: int
    pad_id: int

    def draw(self, config: TrainingConfig, step: int) -> list[Sample]:
        """The samples of a 0-based step; the same for the same configuration and step."""
        ...

    def save_tokenizer(self, folder: Path) -> None:
        """Put the vocabulary's files beside the finished model."""
        ...


def run_folder(folder: Path) -> RunFolder:
    """The files of a run; the finished model is in `model` below them."""
    return RunFolder(folder=folder, work=folder, kind="training run")


def prepare(
    folder: RunFolder,
    config: TrainingConfig,
    problems: Problems,
    *,
    start: LoadedModel | None = None,
    resume: bool,
    **shape: Any,
) -> Trainer:
    """Build model and trainer; record the configuration. A resumed run must ask for the same one.

    start: a model that is trained on, in place and in its own shape; None: random weights. shape: family and sizes, as
    reference_architecture takes them. Raises TrainingError if the folder holds another run or the model another
    vocabulary, ConfigError for an unknown family.
    """
    if start is not None:
        architecture = _with_vocabulary(start, problems)
    else:
        architecture = reference_architecture(
            vocab_size=-(-len(problems.vocabulary) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE,
            mask_id=problems.mask_id,
            eos_id=problems.eos_id,
            pad_id=problems.pad_id,
            **shape,
        )
    started = {"start": start.path.name} if start is not None else {}
    folder.record({"training": asdict(config), "model": asdict(architecture), **started}, resume=resume)
    if start is not None:
        model = start.model.float()
    else:
        model = MoETransformer(architecture)
        initialise(model, seed=config.seed)
    vanilla = make_policy("vanilla").bind(architecture.router)
    return Trainer(
        model,
        config,
        partial(
            muon_and_adamw,
            lr=config.matrix_lr,
            scalar_lr=config.scalar_lr,
            weight_decay=config.weight_decay,
            scalar_decay=0.0,
        ),
        draw=partial(problems.draw, config),
        policy=lambda _: vanilla,
        balance=LoadBalance(model, rate=config.balance_rate, weight=config.balance_loss),
    )


def _with_vocabulary(start: LoadedModel, problems: Problems) -> ModelConfig:
    """The shape of a model that can go on with these problems; TrainingError for one of another vocabulary."""
    config = start.config
    theirs = (config.mask_id, config.eos_ids, config.pad_id, start.tokenizer and start.tokenizer.get_vocab())
    ours = (problems.mask_id, (problems.eos_id,), problems.pad_id, dict(problems.vocabulary))
    if start.layout is not None:
        raise TrainingError(f"{start.path} keeps its experts in files of their own: give the checkpoint it came from")
    if theirs != ours:
        raise TrainingError(
            f"expected a model with the vocabulary of these problems ({len(problems.vocabulary)} tokens), got "
            f"{start.path} with {config.vocab_size}: give one that `train` made, or use distill, which takes any model"
        )
    return config


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
