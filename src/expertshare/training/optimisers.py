"""What is trained, and by which optimiser: AdamW, or Muon for matrices and stacks of them.

Muon is momentum whose update is orthogonalised matrix by matrix. torch.optim.Muon takes only two-dimensional
parameters; the experts of a layer are one three-dimensional parameter whose matrices must be orthogonalised one by one,
in one batched product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from expertshare.models.moe import Router

_QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of the Newton-Schulz iteration in torch.optim.Muon


def orthogonalise(update: Tensor, iterations: int = 5) -> Tensor:
    """Push the singular values of each matrix [..., rows, columns] towards 1 by a quintic Newton-Schulz iteration."""
    a, b, c = _QUINTIC
    wide = update.shape[-2] <= update.shape[-1]
    x: Tensor = update if wide else update.mT
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / columns)), with decoupled weight decay."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. The loss is not needed: `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        buffer = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(buffer, group["momentum"])
        scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalise(ahead), alpha=-group["lr"] * scale)


def choose_trained(model: nn.Module, *, router_only: bool) -> None:
    """Ask for gradients of all parameters, or of the routers' alone. Selection biases are buffers: never trained."""
    routers = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(not router_only or id(parameter) in routers)


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW over everything that asks for gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [_adamw(trained, lr, weight_decay)]


def muon_and_adamw(
    model: nn.Module, *, lr: float, scalar_lr: float, weight_decay: float, scalar_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon at `lr` for the trained matrices between hidden features; AdamW for embeddings, head, routers and norms."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not {"embed", "head", "router"} & set(name.split("."))
            (matrices if is_matrix else others).append(parameter)
    muon = [Muon(matrices, lr=lr, weight_decay=weight_decay)] if matrices else []
    return [*muon, *([_adamw(others, scalar_lr, scalar_decay)] if others else [])]


def _adamw(parameters: Iterable[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
