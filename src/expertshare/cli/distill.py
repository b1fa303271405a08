"""`expertshare distill`: train a model on its own answers, for an expert-sharing policy or for any."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from random import Random

from expertshare.cli import flags
from expertshare.cli.console import people, print_json, told_bars
from expertshare.cli.options import OptionGroup, check_at_least_one, option, split_names
from expertshare.decoding import DecodingOptions
from expertshare.errors import InputError, nearest
from expertshare.evaluation.prompts import read_prompts
from expertshare.models import load_model
from expertshare.training.config import DistillConfig
from expertshare.training.distill import AnswerSettings
from expertshare.training.distill import distill as run_distillation
from expertshare.training.processes import connect, disconnect
from expertshare.training.trainer import StepResult


class DistillOptions(OptionGroup):
    """How to train; `arguments` are fields of DistillConfig."""

    panel = "Training"
    defaults = DistillConfig()
    start_policy: str | None = option("The same policy with easier numbers, to go from evenly to those of --policy.")
    curriculum_share: float = option("Share of the steps that this takes.")
    router_only: bool = option("Train the routers and nothing else.")
    steps: int = option("Optimiser steps.")
    batch_size: int = option("Answers per step, over all processes.", argument="samples_per_step")
    micro_batch: int = option("Answers in one forward of one process.")
    optimiser: str = option("adamw, or muon (one process only).")
    lr: float | None = option(
        "Peak learning rate; default: 0.002 (adamw), 0.02 (muon); for a model of 16 G parameters 2e-6 (adamw)."
    )
    full_mask_share: float = option("Share of answers masked wholly, as decoding starts.")
    dtype: str = option("Arithmetic: bfloat16 (autocast) or float32.")
    checkpoint_every: int = option("Steps between checkpoints.")
    elastic: int | None = option(f"In place of a policy. {flags.ELASTIC}")
    elastic_free: float = option(flags.ELASTIC_FREE)
    elastic_sets: str = option(flags.ELASTIC_SETS)


class OwnAnswerOptions(OptionGroup):
    """How the model answers what it is trained on; `arguments` are fields of DecodingOptions."""

    panel = "Answers"
    defaults = DecodingOptions()
    gen_length: int = option("Tokens of an answer, at most.")
    threshold: float = option("Commit tokens more probable than this.", 0.95)
    temperature: float = option("0 takes the most probable token.")


def distill(
    model: flags.Model,
    *,
    out: Path = option("Folder of the distilled model and of the run.", metavar="DIR"),
    training: DistillOptions,
    answers: OwnAnswerOptions,
    policy: str | None = option("What to train for: policy:knob=value,...", None),
    answer_batch: int = option("Prompts answered together.", 32, rich_help_panel="Answers"),
    prompts: Path | None = option('JSONL file of objects with "prompt".', None, metavar="FILE"),
    tasks: str | None = option("Instead of a file: tasks of `expertshare tasks`, parted by commas.", None),
    count: int = option("Prompts of each task, of its training split.", 1000),
    seed: int = option("Seed of prompts, sampling, order and masks.", 0),
    device: str = option("cpu, or cuda: one GPU for each process.", "cpu"),
    threads: int | None = option("CPU threads; default: torch's choice.", None),
    resume: bool = option("Continue the run in --out.", False, "--resume"),
    as_json: flags.Json = False,
) -> None:
    """Train a model on its own answers with an expert-sharing policy in the forward pass.

    With --elastic every block draws its number of experts instead, so that the model serves any policy and budget.
    Answers that do not end within --gen-length are left out. Finished models are used with the same --policy.

    Example: expertshare distill models/reference --tasks arith,math,code,code_pro,choice --count 2000 --policy
    block-top-p:top_p_experts=0.6 --out runs/distilled   (over two processes: torchrun --nproc-per-node 2 -m expertshare
    distill ..., and every command again with --resume to go on)
    """
    if threads is not None:
        flags.set_threads(threads)
    if (policy is None) == (training.elastic is None):
        given = "neither" if policy is None else "both"
        raise InputError(
            f"expected either --policy, to train for one, or --elastic N, for any, got {given}: choose one"
        )
    config = DistillConfig(policy=policy or "vanilla", seed=seed, **training.arguments())
    texts = _texts(prompts, tasks, count, seed)
    processes = connect(device)
    base = load_model(model, device=processes.device)
    with told_bars(shown=processes.rank == 0) as bars:

        def stepped(step: StepResult) -> None:
            said = f"loss {step.loss:.3f}, {step.unique_experts:.1f} experts"
            bars.hear("steps", step.step + 1, training.steps, said=said)

        result = run_distillation(
            base,
            texts,
            config,
            out,
            answering=AnswerSettings(
                options=DecodingOptions(seed=seed, **answers.arguments()),
                batch_size=answer_batch,
                on_progress=lambda done, total: bars.hear("answers", done, total, said=""),
            ),
            processes=processes,
            resume=resume,
            on_step=stepped,
        )
    if processes.rank == 0:
        wanted = policy or f"des-vote:budget={training.elastic}"
        console = people(as_json=as_json)
        console.print(f"{result.unfinished} of {result.answers} answers were unfinished and left out.")
        console.print(
            f"The model is in {result.model}. Try: expertshare generate {result.model} --policy '{wanted}' "
            "--prompt 'Solve x + 5 = 12.'",
            soft_wrap=True,
        )
        if as_json:
            print_json({**asdict(result), "model": str(result.model), "policy": policy, "seed": seed})
    disconnect(processes)


def _texts(prompts: Path | None, tasks: str | None, count: int, seed: int) -> list[str]:
    """Prompts of a file, or of generated tasks in a drawn order."""
    if prompts is not None and tasks is None:
        return [record.prompt for record in read_prompts(prompts)]
    if prompts is not None or tasks is None:
        given = "neither" if prompts is None else "both"
        raise InputError(f"expected either --prompts FILE or --tasks NAMES, got {given}: choose one")
    check_at_least_one("count", count)
    from expertshare.lab.tasks.generation import (  # only here: a file of prompts needs no generators
        TASKS,
        generate_items,
    )

    names = list(dict.fromkeys(split_names(tasks)))
    unknown = next((name for name in names if name not in TASKS), None)
    if unknown is not None or not names:
        raise InputError(f"expected names of tasks, got {tasks!r}. {nearest(unknown or '', TASKS)}")
    items = [item for name in names for item in generate_items(name, split="train", count=count, seed=seed)]
    texts = [item.prompt for item in items]
    Random(f"{seed}:prompts").shuffle(texts)
    return texts
