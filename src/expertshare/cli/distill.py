"""`expertshare distill`: train a model on its own answers, for an expert-sharing policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from expertshare.cli.console import people, print_json
from expertshare.cli.threads import set_threads
from expertshare.decoding import DecodingOptions
from expertshare.errors import InputError, nearest
from expertshare.evaluation.prompts import read_prompts
from expertshare.lab.tasks import TASKS, generate_items
from expertshare.models import load_model
from expertshare.training.distill.config import DistillConfig
from expertshare.training.distill.processes import connect, disconnect
from expertshare.training.distill.session import AnswerSettings, Distillation
from expertshare.training.distill.session import distill as run_distillation
from expertshare.training.distill.trainer import DistillStep

EXAMPLE = (
    "Example: expertshare distill models/reference --tasks arith,math,code,code_pro,choice --count 2000 "
    "--policy block-top-p:top_p_experts=0.6 --out runs/distilled   (over two processes: torchrun --nproc-per-node 2 "
    "-m expertshare distill ..., and every command again with --resume to go on)"
)
_CONFIG, _OPTIONS = DistillConfig(policy="vanilla"), DecodingOptions()
_TRAINING, _ANSWERS = "Training", "Answers"


def _training(text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=text, rich_help_panel=_TRAINING)
    return option


def _answers(text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=text, rich_help_panel=_ANSWERS)
    return option


def distill(
    model: Annotated[str, typer.Argument(help="Directory of a model in Hugging Face layout, or a hub id.")],
    policy: Annotated[str, typer.Option(help="What to train for: policy:knob=value,...")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the distilled model and of the run.")],
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help='JSONL file of objects with "prompt".')] = None,
    tasks: Annotated[str | None, typer.Option(help=f"Instead of a file: {', '.join(TASKS)}, parted by commas.")] = None,
    count: Annotated[int, typer.Option(help="Prompts of each task, of its training split.")] = 1000,
    start_policy: Annotated[
        str | None, _training("The same policy with easier numbers, to go from evenly to those of --policy.")
    ] = None,
    curriculum_share: Annotated[float, _training("Share of the steps that this takes.")] = _CONFIG.curriculum_share,
    router_only: Annotated[bool, _training("Train the routers and nothing else.")] = False,
    steps: Annotated[int, _training("Optimiser steps.")] = _CONFIG.steps,
    batch_size: Annotated[int, _training("Answers per step, over all processes.")] = _CONFIG.samples_per_step,
    micro_batch: Annotated[int, _training("Answers in one forward of one process.")] = _CONFIG.micro_batch,
    optimiser: Annotated[str, _training("adamw, or muon (one process only).")] = _CONFIG.optimiser,
    lr: Annotated[
        float | None,
        _training(
            "Peak learning rate; default: 0.002 (adamw), 0.02 (muon); for a model of 16 G parameters 2e-6 (adamw)."
        ),
    ] = None,
    full_mask_share: Annotated[
        float, _training("Share of answers masked wholly, as decoding starts.")
    ] = _CONFIG.full_mask_share,
    dtype: Annotated[str, _training("Arithmetic: bfloat16 (autocast) or float32.")] = _CONFIG.dtype,
    checkpoint_every: Annotated[int, _training("Steps between checkpoints.")] = _CONFIG.checkpoint_every,
    gen_length: Annotated[int, _answers("Tokens of an answer, at most.")] = _OPTIONS.gen_length,
    threshold: Annotated[float, _answers("Commit tokens more probable than this.")] = 0.95,
    temperature: Annotated[float, _answers("0 takes the most probable token.")] = _OPTIONS.temperature,
    answer_batch: Annotated[int, _answers("Prompts answered together.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of prompts, sampling, order and masks.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda: one GPU for each process.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")] = False,
) -> None:
    """Train a model on its own answers with an expert-sharing policy in the forward pass.

    Answers that do not end within --gen-length are left out. Finished models are used with the same --policy.
    """
    if threads is not None:
        set_threads(threads)
    config = DistillConfig(
        policy=policy,
        start_policy=start_policy,
        curriculum_share=curriculum_share,
        router_only=router_only,
        steps=steps,
        samples_per_step=batch_size,
        micro_batch=micro_batch,
        optimiser=optimiser,  # type: ignore[arg-type]  # the configuration refuses other words
        lr=lr,
        full_mask_share=full_mask_share,
        dtype=dtype,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    texts = _texts(prompts, tasks, count, seed)
    processes = connect(device)
    base = load_model(model, device=processes.device)
    with _Bars(steps, shown=processes.rank == 0) as bars:
        result = run_distillation(
            base,
            texts,
            config,
            out,
            answering=AnswerSettings(
                options=DecodingOptions(gen_length=gen_length, threshold=threshold, temperature=temperature, seed=seed),
                batch_size=answer_batch,
                on_progress=bars.answered,
            ),
            processes=processes,
            resume=resume,
            on_step=bars.stepped,
        )
    if processes.rank == 0:
        _tell(result, config, as_json=as_json)
    disconnect(processes)


def _tell(result: Distillation, config: DistillConfig, *, as_json: bool) -> None:
    console = people(as_json=as_json)
    console.print(f"{result.unfinished} of {result.answers} answers were unfinished and left out.")
    console.print(
        f"The model is in {result.model}. Try: expertshare generate {result.model} --policy '{config.policy}' "
        "--prompt 'Solve x + 5 = 12.'",
        soft_wrap=True,
    )
    if as_json:
        print_json({**asdict(result), "model": str(result.model), "policy": config.policy, "seed": config.seed})


def _texts(prompts: Path | None, tasks: str | None, count: int, seed: int) -> list[str]:
    """Prompts of a file, or of generated tasks in a drawn order."""
    if (prompts is None) == (tasks is None):
        given = "neither" if prompts is None else "both"
        raise InputError(f"expected either --prompts FILE or --tasks NAMES, got {given}: choose one")
    if prompts is not None:
        return [record.prompt for record in read_prompts(prompts)]
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    assert tasks is not None
    names = list(dict.fromkeys(_task_names(tasks)))
    items = [item for name in names for item in generate_items(name, split="train", count=count, seed=seed)]
    texts = [item.prompt for item in items]
    Random(f"{seed}:prompts").shuffle(texts)
    return texts


def _task_names(listed: str) -> Sequence[str]:
    names = [name.strip() for name in listed.split(",") if name.strip()]
    unknown = next((name for name in names if name not in TASKS), None)
    if unknown is not None or not names:
        raise InputError(f"expected names of tasks, got {listed!r}. {nearest(unknown or '', TASKS)}")
    return names


class _Bars:
    """One bar for answers, one for steps, on a terminal only."""

    def __init__(self, steps: int, *, shown: bool) -> None:
        console = people(as_json=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[said]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self._answers = self._progress.add_task("answers", total=None, said="")
        self._steps = self._progress.add_task("steps", total=steps, said="", start=False)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()

    def answered(self, done: int, total: int) -> None:
        """So many prompts are answered."""
        self._progress.update(self._answers, completed=done, total=total)

    def stepped(self, result: DistillStep) -> None:
        """A step is done."""
        self._progress.start_task(self._steps)
        said = f"loss {result.loss:.3f}, {result.unique_experts:.1f} experts"
        self._progress.update(self._steps, completed=result.step + 1, said=said)
