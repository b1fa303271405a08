"""The training loop: deterministic from its seeds, resumable, with the routing that inference uses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.errors import TrainingError
from expertshare.models.moe import MoE
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer
from expertshare.routing import make_policy
from expertshare.training.config import TrainingConfig
from expertshare.training.muon import Muon
from expertshare.training.objective import NoiseSettings, Sample, TrainingBatch, training_batches
from expertshare.training.run_files import load_state, save_state
from expertshare.training.whole_canvas import canvas_batches
from expertshare.types import RoutingPolicy


class Problems(Protocol):
    """Where a run from scratch takes its samples and its vocabulary."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimiser step saw. loss: mean weighted cross-entropy in nats over masked answer positions.

    load_imbalance: largest expert load over the mean load, worst layer. positions: live positions forwarded.
    """

    step: int
    loss: float
    load_imbalance: float
    positions: int
    elapsed_s: float


class LoadBalance:
    """The auxiliary loss towards an even load (Switch Transformers, arXiv 2101.03961, section 2.2), for routers that
    have no selection bias: E times the sum over experts of their share of the pairs and their mean probability."""

    def __init__(self, model: MoETransformer) -> None:
        self._logits: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, MoE) and module.router.bias is None:
                module.router.register_forward_hook(self._keep)

    def _keep(self, _router: torch.nn.Module, _inputs: tuple[Tensor, ...], logits_GLE: Tensor) -> None:
        if torch.is_grad_enabled():
            self._logits.append(logits_GLE)

    def loss(self, load_NE: Tensor, live_BS: Tensor) -> Tensor:
        """Mean over the layers of the forward that has just run; 0 where routers have a bias. 1 is an even load."""
        taken, self._logits = self._logits, []
        if not taken:
            return torch.zeros(())
        live_T = live_BS.flatten()
        share_NE = load_NE / load_NE.sum(dim=1, keepdim=True)
        probability_NE = torch.stack([x.flatten(0, 1)[live_T].softmax(dim=-1).mean(dim=0) for x in taken])
        return (share_NE * probability_NE).sum(dim=1).mean() * share_NE.shape[1]


def batch_loss(model: MoETransformer, batch: TrainingBatch, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Sum of weighted cross-entropies over masked answer positions, and the load of every expert [N, E]."""
    output = model(batch.inputs, runtime)
    rows = batch.weights_BS > 0
    hidden_RD = output.hidden_BSD.flatten(0, 1).index_select(0, rows.flatten().nonzero().squeeze(1))
    logits_RV = model.logits(hidden_RD).float()
    loss_R = F.cross_entropy(logits_RV, batch.targets_BS[rows], reduction="none")
    return (loss_R * batch.weights_BS[rows]).sum(), output.routing.load_NE


class Trainer:
    """Owns the model, its two optimisers and the position in the data."""

    def __init__(self, model: MoETransformer, config: TrainingConfig, problems: Problems) -> None:
        self.model, self.config, self.problems = model, config, problems
        self.step_index = 0
        matrices = [p for n, p in model.named_parameters() if _is_matrix(n, p)]
        others = [p for n, p in model.named_parameters() if not _is_matrix(n, p)]
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (
            Muon(matrices, lr=config.matrix_lr, weight_decay=config.weight_decay),
            torch.optim.AdamW(others, lr=config.scalar_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        policy: RoutingPolicy = make_policy("vanilla").bind(model.config.router)
        self.runtime = Runtime(policy=policy)
        self.noise = NoiseSettings(config.mask_ratio, config.full_mask_share, config.fill_weight)
        self._batches = canvas_batches if model.config.attention == "full" else training_batches
        self._balance_loss = LoadBalance(model)

    def step(self) -> StepResult:
        """Draw, forward, backward, update, balance."""
        start = time.perf_counter()
        config, step = self.config, self.step_index
        samples = self.problems.draw(config, step)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        batches = list(self._batches(samples, self.model.config, self.noise, generator))
        # 1 where the masks hit nothing that is learnt: such a step has a loss of 0.
        total = sum(float(batch.weights_BS.sum()) for batch in batches) or 1.0
        loss_sum, load_NE = 0.0, torch.zeros(())
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
                loss, load = batch_loss(self.model, batch, self.runtime)
                even = self._balance_loss.loss(load, batch.inputs.live_BS)
            share = len(batch.targets_BS) / len(samples)
            (loss / total + config.balance_loss * share * even).backward()  # type: ignore[no-untyped-call]
            loss_sum, load_NE = loss_sum + float(loss.detach()), load_NE + load
        if not torch.isfinite(torch.tensor(loss_sum)):
            raise TrainingError(f"the loss is not finite at step {step}; lower matrix_lr or scalar_lr and start again")
        self._update(config.learning_rate_factor(step))
        self._balance(load_NE)
        self.step_index += 1
        imbalance = float((load_NE.amax(dim=1) / load_NE.float().mean(dim=1)).max())
        positions = sum(batch.inputs.tokens_BS.numel() for batch in batches)
        return StepResult(
            step=step,
            loss=loss_sum / total,
            load_imbalance=imbalance,
            positions=positions,
            elapsed_s=time.perf_counter() - start,
        )

    def _update(self, factor: float) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not math.isfinite(float(norm)):  # clipped by it, every gradient is zero or NaN
            raise TrainingError(
                f"the gradient is not finite at step {self.step_index}; lower matrix_lr or scalar_lr and start again"
            )
        for optimiser, peak in zip(self.optimisers, (self.config.matrix_lr, self.config.scalar_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def _balance(self, load_NE: Tensor) -> None:
        """Raise the selection bias of experts that got less than their share, lower the others'."""
        moes = [module for module in self.model.modules() if isinstance(module, MoE)]
        rate = self.config.balance_rate * self.config.learning_rate_factor(self.step_index)
        for moe, load_E in zip(moes, load_NE.float(), strict=True):
            if moe.router.bias is not None:
                moe.router.bias.add_(torch.sign(load_E.mean() - load_E), alpha=rate)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "step": self.step_index,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.step_index = state["step"]
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and not name.startswith(("embed", "head")) and "router" not in name


def train(
    trainer: Trainer, checkpoint: Path, *, resume: bool, on_step: Callable[[StepResult], None] | None = None
) -> None:
    """Run to the configured number of steps, saving every `checkpoint_every` and at the end, atomically."""
    if checkpoint.exists():
        if not resume:
            raise TrainingError(f"{checkpoint} exists already; pass --resume to continue it, or choose another folder")
        trainer.restore(load_state(checkpoint))
    while trainer.step_index < trainer.config.steps:
        result = trainer.step()
        if on_step is not None:
            on_step(result)
        if trainer.step_index % trainer.config.checkpoint_every == 0 or trainer.step_index == trainer.config.steps:
            save_state(trainer.state(), checkpoint)
