"""The one training loop: deterministic from its seeds, resumable, on one process or several, with inference's routing.

What is trained for comes in as an `Objective`: the batches of every step, and how their tokens are routed. Coresets
that change from step to step (a curriculum, elastic training) are its choice; the loop does not know them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertshare.errors import TrainingError
from expertshare.models.moe import MoE
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer
from expertshare.routing import RoutingPolicy
from expertshare.training.batches import Sample, TrainingBatch
from expertshare.training.config import RunConfig
from expertshare.training.objective import Objective, check_elastic
from expertshare.training.processes import Processes
from expertshare.training.run_folder import RunFolder

_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimiser step saw, over all processes. loss: mean weighted cross-entropy in nats over masked tokens.

    unique_experts: mean over MoE layers and blocks that are learnt from. load_imbalance: largest expert load over the
    mean load, worst layer. positions: forwarded, padding included.
    """

    step: int
    loss: float
    unique_experts: float
    load_imbalance: float
    positions: int
    elapsed_s: float


class BatchLoss(nn.Module):
    """A model with its loss as one module, so that what shards modules sees a single forward."""

    def __init__(self, model: MoETransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TrainingBatch, runtime: Runtime) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum of the cross-entropies (targets at the same position, no shift), the mean number of unique
        experts of a noisy block, and the load of every expert [N, E]."""
        output = self.model(batch.inputs, runtime)
        rows_R = (batch.weights_BS > 0).flatten().nonzero().squeeze(1)
        hidden_RD = output.hidden_BSD.flatten(0, 1).index_select(0, rows_R)
        logits_RV = self.model.logits(hidden_RD).float()
        loss_R = F.cross_entropy(logits_RV, batch.targets_BS.flatten()[rows_R], reduction="none")
        experts_NG = output.routing.group_experts_NG
        experts_NBG = experts_NG.view(len(experts_NG), len(batch.targets_BS), -1)[:, :, : batch.num_noisy]
        unique = experts_NBG[:, batch.live_noisy_BN].float().mean()
        return (loss_R * batch.weights_BS.flatten()[rows_R]).sum(), unique, output.routing.load_NE


class LoadBalance:
    """What keeps the load of experts even: a step of the selection bias after every update (`rate`), or for routers
    without a bias an auxiliary loss of that weight (Switch Transformers, arXiv 2101.03961, section 2.2)."""

    def __init__(self, model: MoETransformer, *, rate: float, weight: float) -> None:
        self.rate, self.weight = rate, weight
        self._moes = [module for module in model.modules() if isinstance(module, MoE)]
        self._logits: list[Tensor] = []
        for moe in self._moes:
            if moe.router.bias is None:
                moe.register_forward_pre_hook(self._keep)

    def _keep(self, moe: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Score the layer's tokens once more: a backend that routes them keeps its scores to itself."""
        assert isinstance(moe, MoE)
        if torch.is_grad_enabled():
            self._logits.append(moe.router(inputs[0]))

    def loss(self, load_NE: Tensor, live_BS: Tensor) -> Tensor:
        """E times the sum over experts of their share of the pairs and their mean probability, mean over the layers of
        the forward that has just run; 0 where routers have a bias. 1 is an even load."""
        taken, self._logits = self._logits, []
        if not taken:
            return torch.zeros(())
        live_T = live_BS.flatten()
        share_NE = load_NE / load_NE.sum(dim=1, keepdim=True)
        probability_NE = torch.stack([x.flatten(0, 1)[live_T].softmax(dim=-1).mean(dim=0) for x in taken])
        return (share_NE * probability_NE).sum(dim=1).mean() * share_NE.shape[1]

    def update(self, load_NE: Tensor, factor: float) -> None:
        """Raise the selection bias of experts that got less than their share, lower the others'. factor: of `rate`."""
        for moe, load_E in zip(self._moes, load_NE.float(), strict=True):
            if moe.router.bias is not None:
                moe.router.bias.add_(torch.sign(load_E.mean() - load_E), alpha=self.rate * factor)


class Trainer:
    """Owns the model, which it trains in place, its optimisers, and the position in the data."""

    def __init__(
        self,
        model: MoETransformer,
        config: RunConfig,
        make_optimisers: Callable[[MoETransformer], Sequence[torch.optim.Optimizer]],
        *,
        draw: Callable[[int], Sequence[Sample]],
        policy: Callable[[int], RoutingPolicy],
        balance: LoadBalance | None = None,
        processes: Processes | None = None,
    ) -> None:
        """make_optimisers: called once the model is sharded; the rates of their groups are taken as peaks. draw,
        policy: of the objective."""
        check_elastic(config, model.config.router)
        self.model, self.config = model.train(), config
        self.balance, self.processes = balance, processes or Processes()
        self.objective = Objective(
            draw=draw, policy=policy, model=model.config, config=config, processes=self.processes
        )
        self.module = BatchLoss(model)
        self.processes.shard(self.module, model.layers)
        self.optimisers = make_optimisers(model)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["peak_lr"] = group["lr"]
        self.step_index = 0

    def step(self) -> StepResult:
        """Draw, forward, backward, update, balance."""
        started, config, step = time.perf_counter(), self.config, self.step_index
        batches, device = self.objective.batches(step), self.model.device
        weight, blocks, rows, positions = self.processes.total(
            sum(float(batch.weights_BS.sum()) for batch in batches),
            sum(int(batch.live_noisy_BN.sum()) for batch in batches),
            sum(len(batch.targets_BS) for batch in batches),
            sum(batch.inputs.tokens_BS.numel() for batch in batches),
        )
        weight = weight or 1.0  # where the masks hit nothing that is learnt: such a step has a loss of 0
        loss_sum, experts_sum, load_NE = 0.0, 0.0, torch.zeros((), device=device)
        for batch in batches:
            batch = batch.to(device)
            runtime = Runtime(policy=self.objective.routing(step, batch))
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                loss, unique, load = self.module(batch, runtime)
                # Sharding averages gradients over the processes; the sum is wanted.
                scaled = loss / (weight / self.processes.count)
                if self.balance is not None:
                    even = self.balance.loss(load, batch.inputs.live_BS)
                    scaled = scaled + self.balance.weight * (len(batch.targets_BS) / rows) * even
            scaled.backward()
            loss_sum, load_NE = loss_sum + float(loss.detach()), load_NE + load
            experts_sum += float(unique) * int(batch.live_noisy_BN.sum())
        loss_sum, experts_sum = self.processes.total(loss_sum, experts_sum)
        if not math.isfinite(loss_sum):
            raise TrainingError(f"the loss is not finite at step {step}; lower {config.RATES} and start again")
        factor, load_NE = config.learning_rate_factor(step), self.processes.sum(load_NE)
        self._update(factor)
        if self.balance is not None:
            self.balance.update(load_NE, factor)
        self.step_index += 1
        return StepResult(
            step=step,
            loss=loss_sum / weight,
            unique_experts=experts_sum / blocks,
            load_imbalance=float((load_NE.amax(dim=1) / load_NE.float().mean(dim=1)).max()),
            positions=round(positions),
            elapsed_s=time.perf_counter() - started,
        )

    def _update(self, factor: float) -> None:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        norm = self.processes.whole(torch.nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM))
        if not math.isfinite(float(norm)):  # clipped by it, every gradient is zero or NaN
            raise TrainingError(
                f"the gradient is not finite at step {self.step_index}; lower {self.config.RATES} and start again"
            )
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


def train(
    trainer: Trainer,
    folder: RunFolder,
    *,
    resume: bool,
    log_every: int,
    on_step: Callable[[StepResult], None] | None = None,
) -> None:
    """Run to the configured number of steps, saving every `checkpoint_every` and at the end, whole or not at all."""
    config, first = trainer.config, trainer.processes.rank == 0
    if folder.checkpoint.exists():
        if not resume:
            raise TrainingError(
                f"{folder.checkpoint} exists already; pass --resume to continue it, or choose another folder"
            )
        trainer.restore(folder.load_state(trainer.module.state_dict().keys()))
    if first:
        folder.cut_log(trainer.step_index)
    window: list[StepResult] = []
    while trainer.step_index < config.steps:
        result = trainer.step()
        window.append(result)
        done = trainer.step_index
        saves = done % config.checkpoint_every == 0 or done == config.steps
        if saves or done % log_every == 0:
            if first:
                folder.append_log(_log_line(window))
            window.clear()
        if saves:
            state = trainer.state()
            if first:
                folder.save_state(state)
            trainer.processes.wait()
        if on_step is not None:
            on_step(result)


def _log_line(window: Sequence[StepResult]) -> dict[str, Any]:
    return {
        "step": window[-1].step + 1,
        "loss": sum(r.loss for r in window) / len(window),
        "unique_experts": sum(r.unique_experts for r in window) / len(window),
        "load_imbalance": window[-1].load_imbalance,
        "positions_per_s": sum(r.positions for r in window) / sum(r.elapsed_s for r in window),
    }
