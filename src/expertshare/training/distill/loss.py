"""The loss of self-distillation: plain cross-entropy at the masked answer positions of the noisy part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertshare.models.moe import Router
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer
from expertshare.training.distill.batch import DistillBatch
from expertshare.training.muon import Muon


class DistillLoss(nn.Module):
    """A model with its loss as one module, so that what shards modules sees a single forward."""

    def __init__(self, model: MoETransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: DistillBatch, runtime: Runtime) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross-entropies (targets at the same position, no shift), and the mean number of
        unique experts of a noisy block."""
        output = self.model(batch.inputs, runtime)
        rows_R = (batch.weights_BS > 0).flatten().nonzero().squeeze(1)
        hidden_RD = output.hidden_BSD.flatten(0, 1).index_select(0, rows_R)
        logits_RV = self.model.logits(hidden_RD).float()
        loss_R = F.cross_entropy(logits_RV, batch.targets_BS.flatten()[rows_R], reduction="none")
        loss = (loss_R * batch.weights_BS.flatten()[rows_R]).sum()
        return loss, _unique_experts(batch, output.routing.group_experts_NG)


def _unique_experts(batch: DistillBatch, experts_NG: Tensor) -> Tensor:
    rows = len(batch.targets_BS)
    experts_NBG = experts_NG.view(len(experts_NG), rows, -1)[:, :, : batch.num_noisy]
    return experts_NBG[:, batch.live_noisy_BN].float().mean()


def choose_trained(model: MoETransformer, *, router_only: bool) -> None:
    """Ask for gradients of all parameters, or of the routers' alone. Selection biases are buffers: never trained."""
    routers = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(not router_only or id(parameter) in routers)


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those that ask for gradients, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether muon trains it: weights between hidden features; not embeddings, head, routers or norms."""
    parts = name.split(".")
    return parameter.ndim >= 2 and not {"embed", "head", "router"} & set(parts)


def optimisers_for(
    model: nn.Module, *, muon: bool, lr: float, scalar_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW over everything that is trained, or Muon for its matrices beside AdamW for the rest."""
    trained = trained_parameters(model)
    matrices = [parameter for name, parameter in trained if muon and is_matrix(name, parameter)]
    others = [parameter for name, parameter in trained if not (muon and is_matrix(name, parameter))]
    result: list[torch.optim.Optimizer] = []
    if matrices:
        result.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
    if others:
        rate = scalar_lr if muon else lr
        result.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay))
    for optimiser in result:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return result
