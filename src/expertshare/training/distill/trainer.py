"""The loop of self-distillation: deterministic from its seeds, resumable, on one process or several."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import torch

from expertshare.config import ModelConfig
from expertshare.errors import TrainingError
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer
from expertshare.training.distill.batch import DistillBatch, distill_batch, noise_seed
from expertshare.training.distill.config import DistillConfig
from expertshare.training.distill.curriculum import make_curriculum
from expertshare.training.distill.loss import DistillLoss, choose_trained, optimisers_for
from expertshare.training.distill.processes import Processes
from expertshare.training.objective import Sample, geometry

_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillStep:
    """What one optimiser step saw, over all processes. loss: mean cross-entropy in nats over masked tokens.

    unique_experts: mean over MoE layers and noisy blocks. positions: forwarded, padding included.
    """

    step: int
    loss: float
    unique_experts: float
    positions: int
    elapsed_s: float


def draw_indices(count: int, config: DistillConfig, step: int) -> list[int]:
    """Which of `count` answers a step sees: epoch after epoch, each in its own order; a function of the step alone."""
    start = step * config.samples_per_step
    places = range(start, start + config.samples_per_step)
    return [_epoch(count, config.seed, place // count)[place % count] for place in places]


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    Random(f"{seed}:epoch:{epoch}").shuffle(order)
    return order


def check_trainable(model: ModelConfig, config: DistillConfig, processes: Processes) -> None:
    """Refuse what cannot be trained before anything costs time: TrainingError or PolicyError."""
    if model.attention != "block_causal":
        raise TrainingError(
            f"distillation trains under the block-diffusion mask and needs a block-causal model, got {model.family} "
            "with full attention: choose another model"
        )
    processes.check(config)
    make_curriculum(config, model.router)


def _size(sample: Sample, block_length: int) -> tuple[int, int]:
    """Noisy blocks and all blocks: samples that are alike in both pad each other the least."""
    num_blocks, first = geometry(sample, block_length)
    return num_blocks - first, num_blocks


class DistillTrainer:
    """Owns the model, its optimisers and the position in the data."""

    def __init__(
        self,
        model: MoETransformer,
        samples: Sequence[Sample],
        config: DistillConfig,
        processes: Processes | None = None,
    ) -> None:
        """Trains `model` in place. Raises PolicyError for a policy that does not fit, TrainingError without samples."""
        if not samples:
            raise TrainingError("expected at least one finished answer to train on, got none")
        self.config, self.samples = config, samples
        self.processes = processes or Processes()
        check_trainable(model.config, config, self.processes)
        self.curriculum = make_curriculum(config, model.config.router)
        self.model = model.train()
        choose_trained(model, router_only=config.router_only)
        self.module = DistillLoss(model)
        self.processes.shard(self.module)
        self.optimisers = optimisers_for(
            model,
            muon=config.optimiser == "muon",
            lr=config.peak_lr,
            scalar_lr=config.peak_scalar_lr,
            weight_decay=config.weight_decay,
        )
        self.step_index = 0

    def batches(self, step: int) -> list[DistillBatch]:
        """This process's share of a step, in forwards of similar lengths; their number is the same in every process."""
        config, model = self.config, self.model.config
        indices = draw_indices(len(self.samples), config, step)
        drawn = [(self.samples[index], noise_seed(config.seed, step, place)) for place, index in enumerate(indices)]
        drawn.sort(key=lambda pair: _size(pair[0], model.block_length))
        mine = drawn[self.processes.rank :: self.processes.count]
        size = config.micro_batch
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        return [distill_batch([s for s, _ in part], [n for _, n in part], model, config) for part in parts]

    def step(self) -> DistillStep:
        """Draw, forward, backward, update."""
        start, config = time.perf_counter(), self.config
        batches = self.batches(self.step_index)
        runtime = Runtime(policy=self.curriculum.policy(self.step_index))
        device = self.model.device
        weight, blocks, positions = self.processes.total(
            sum(float(batch.weights_BS.sum()) for batch in batches),
            sum(int(batch.live_noisy_BN.sum()) for batch in batches),
            sum(batch.inputs.tokens_BS.numel() for batch in batches),
        )
        loss_sum = experts_sum = 0.0
        for batch in batches:
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                loss, unique = self.module(batch, runtime)
            # Sharding averages gradients over the processes; the sum is wanted.
            (loss * (self.processes.count / weight)).backward()
            loss_sum, experts_sum = (
                loss_sum + float(loss.detach()),
                experts_sum + float(unique) * int(batch.live_noisy_BN.sum()),
            )
        loss_sum, experts_sum = self.processes.total(loss_sum, experts_sum)
        if not torch.isfinite(torch.tensor(loss_sum)):
            raise TrainingError(f"the loss is not finite at step {self.step_index}; lower lr and start again")
        self._update(config.learning_rate_factor(self.step_index))
        self.step_index += 1
        return DistillStep(
            step=self.step_index - 1,
            loss=loss_sum / weight,
            unique_experts=experts_sum / blocks,
            positions=round(positions),
            elapsed_s=time.perf_counter() - start,
        )

    def _update(self, factor: float) -> None:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        norm = self.processes.whole(torch.nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM))
        if not math.isfinite(float(norm)):  # clipped by it, every gradient is zero or NaN
            raise TrainingError(f"the gradient is not finite at step {self.step_index}; lower lr and start again")
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the same for any number of processes. All processes must ask."""
        return {"step": self.step_index, **self.processes.gather(self.module, self.optimisers)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.step_index = state["step"]
        self.processes.scatter(self.module, self.optimisers, state)
