"""`expertshare train`: a small MoE diffusion model, on generated tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from expertshare.cli import flags
from expertshare.cli.console import people, print_json, told_bars
from expertshare.cli.options import OptionGroup, option
from expertshare.errors import InputError
from expertshare.lab.tasks.tokenizer import TaskProblems
from expertshare.models import load_model
from expertshare.training.config import TrainingConfig
from expertshare.training.scratch import prepare, run, run_folder
from expertshare.training.trainer import StepResult


class TrainingOptions(OptionGroup):
    """How to train; `arguments` are fields of TrainingConfig."""

    defaults = TrainingConfig()
    steps: int = option("Optimiser steps.")
    samples_per_step: int = option("Problems per step.")
    seed: int = option("Seed of weights, data and masks.")
    matrix_lr: float = option("Peak learning rate of matrices (Muon).")
    scalar_lr: float = option("Peak learning rate of the rest (AdamW).")
    dtype: str = option("Arithmetic: bfloat16 (autocast) or float32.")
    micro_batch: int = option("Problems in one forward.")
    elastic: int | None = option(flags.ELASTIC)
    elastic_free: float = option(flags.ELASTIC_FREE)
    elastic_sets: str = option(flags.ELASTIC_SETS)


class ShapeOptions(OptionGroup):
    """Size and kind of the model to train."""

    family: str = option("Layout: llada2_moe (blocks, grouped router) or llada_moe (full attention).", "llada2_moe")
    hidden: int = option("Model features; a multiple of 64.", 128)
    layers: int = option("Layers; in llada2_moe the first is dense.", 4)
    expert_hidden: int = option("Hidden features of one expert.", 32)
    num_experts: int = option("Experts of a layer, a multiple of 8 and at least 16; a token runs 8.", 64, "--experts")


def train(
    folder: Annotated[Path, typer.Argument(help="Folder of the run: checkpoint, log and the finished model.")],
    training: TrainingOptions,
    shape: ShapeOptions,
    start: Path | None = option("Go on from this model of `train`, in its own shape.", None, "--from", metavar="MODEL"),
    threads: flags.Threads = None,
    resume: bool = option("Continue the run in this folder.", False, "--resume"),
    as_json: flags.Json = False,
) -> None:
    """Train a small model (8 experts per token) on the generated tasks, from recorded seeds.

    With --elastic every block draws its number of experts, so that the model serves any policy and any budget.

    Example: expertshare train runs/small --steps 2000 --seed 1   (and the same with --resume to go on)
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"expected a folder, or the name of one to be made, got the file {folder}: choose another")
    if shape.hidden < 1 or shape.hidden % 64:
        raise InputError(f"hidden must be a multiple of 64, got {shape.hidden}")
    if start is not None and shape != ShapeOptions():
        raise InputError(
            "expected either --from, whose model has its shape, or flags of a shape, got both: leave one out"
        )
    flags.set_threads(threads)
    paths, problems = run_folder(folder), TaskProblems(training.seed)
    trainer = prepare(
        paths,
        TrainingConfig(**training.arguments()),
        problems,
        start=load_model(start, torch.float32) if start is not None else None,
        resume=resume,
        **shape.arguments(),
    )
    with told_bars() as bars:

        def show(result: StepResult) -> None:
            bars.hear("steps", result.step + 1, training.steps, said=f"loss {result.loss:.3f}")

        model = run(trainer, paths, problems, resume=resume, on_step=show)
    told = f"The model is in {model}. Try: expertshare generate {model} --prompt 'Solve x + 5 = 12.'"
    people(as_json=as_json).print(told, soft_wrap=True)
    if as_json:
        print_json({"model": str(model), "steps": trainer.step_index, "seed": training.seed})
