"""What test_distill_processes starts in every process: train a tiny model, and save what came of it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from expertshare.models.transformer import MoETransformer, initialise
from expertshare.training.batches import Sample
from expertshare.training.config import DistillConfig, reference_architecture
from expertshare.training.distill import distill_folder, make_trainer
from expertshare.training.processes import Processes, connect, disconnect
from expertshare.training.trainer import StepResult, Trainer, train


class Interrupted(Exception):
    """Raised behind a step, as a kill would come."""


def run(
    folder: Path, *, router_only: bool, resume: bool, processes: Processes, interrupt_at: int | None = None
) -> Trainer:
    """Three steps with a checkpoint behind the second. interrupt_at: number of steps behind which it breaks off."""
    torch.set_num_threads(1)
    architecture = reference_architecture(
        vocab_size=64, mask_id=0, eos_id=1, pad_id=2, hidden=64, layers=2, expert_hidden=8
    )
    model = MoETransformer(replace(architecture, block_length=8))
    initialise(model, seed=3, std=0.1)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 64, (6 + n % 7,), generator=generator).tolist() for n in range(10)]
    samples = [Sample(tuple(ids[:4]), (*ids[4:], 1)) for ids in drawn]
    config = DistillConfig(
        policy="block-top-p:top_p_experts=0.5",
        router_only=router_only,
        steps=3,
        samples_per_step=6,
        micro_batch=2,
        dtype="float32",
        warmup_steps=1,
        checkpoint_every=2,
    )
    trainer = make_trainer(model, samples, config, processes)
    paths = distill_folder(folder)
    paths.work.mkdir(parents=True, exist_ok=True)

    def stop(result: StepResult) -> None:
        if result.step + 1 == interrupt_at:
            raise Interrupted

    with suppress(Interrupted):
        train(trainer, paths, resume=resume, log_every=1, on_step=stop)
    return trainer


if __name__ == "__main__":
    joined = connect()
    run(Path(sys.argv[1]), router_only=sys.argv[2] == "routers", resume=sys.argv[3] == "resume", processes=joined)
    disconnect(joined)
    # Not through the interpreter's own end: threads of gloo that are still there then abort the process now and again.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
