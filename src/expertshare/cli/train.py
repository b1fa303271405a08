"""`expertshare train`: a small MoE diffusion model from scratch, on generated tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from expertshare.cli.threads import ThreadsFlag, set_threads
from expertshare.errors import InputError
from expertshare.lab.tasks.problems import TaskProblems
from expertshare.training.config import TrainingConfig
from expertshare.training.loop import StepResult
from expertshare.training.run import RunPaths, prepare, run

EXAMPLE = "Example: expertshare train runs/small --steps 2000 --seed 1   (and the same with --resume to go on)"


def train(
    folder: Annotated[Path, typer.Argument(help="Folder of the run: checkpoint, log and the finished model.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = TrainingConfig().steps,
    samples_per_step: Annotated[int, typer.Option(help="Problems per step.")] = TrainingConfig().samples_per_step,
    seed: Annotated[int, typer.Option(help="Seed of weights, data and masks.")] = 0,
    family: Annotated[
        str, typer.Option(help="Layout: llada2_moe (blocks, grouped router) or llada_moe (full attention).")
    ] = "llada2_moe",
    hidden: Annotated[int, typer.Option(help="Model features; a multiple of 64.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers; in llada2_moe the first is dense.")] = 4,
    expert_hidden: Annotated[int, typer.Option(help="Hidden features of one expert.")] = 32,
    num_experts: Annotated[
        int, typer.Option("--experts", help="Experts of a layer, a multiple of 8 and at least 16; a token runs 8.")
    ] = 64,
    matrix_lr: Annotated[float, typer.Option(help="Peak learning rate of matrices (Muon).")] = 0.02,
    scalar_lr: Annotated[float, typer.Option(help="Peak learning rate of the rest (AdamW).")] = 0.003,
    dtype: Annotated[str, typer.Option(help="Arithmetic: bfloat16 (autocast) or float32.")] = "bfloat16",
    threads: ThreadsFlag = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in this folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")] = False,
) -> None:
    """Train a small model (8 experts per token) on the generated tasks, from recorded seeds."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"expected a folder, or the name of one to be made, got the file {folder}: choose another")
    if hidden < 1 or hidden % 64:
        raise InputError(f"hidden must be a multiple of 64, got {hidden}")
    set_threads(threads)
    config = TrainingConfig(
        steps=steps,
        samples_per_step=samples_per_step,
        seed=seed,
        matrix_lr=matrix_lr,
        scalar_lr=scalar_lr,
        dtype=dtype,
    )
    paths = RunPaths(folder=folder)
    trainer = prepare(
        paths,
        config,
        TaskProblems(seed),
        family=family,
        hidden=hidden,
        layers=layers,
        expert_hidden=expert_hidden,
        num_experts=num_experts,
        resume=resume,
    )
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("train", total=steps, loss=float("nan"))

        def show(result: StepResult) -> None:
            progress.update(bar, completed=result.step + 1, loss=result.loss)

        model = run(trainer, paths, resume=resume, on_step=show)
    if as_json:
        typer.echo(json.dumps({"model": str(model), "steps": trainer.step_index, "seed": seed}))
    else:
        typer.echo(f"The model is in {model}. Try: expertshare generate {model} --prompt 'Solve x + 5 = 12.'")
