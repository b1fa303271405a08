"""Backends by name, and the plain loop over tokens and experts that all of them are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.kernels import Backend, TorchBackend
from expertshare.kernels.cpu_backend import CpuBackend
from expertshare.kernels.quantise import dequantised_experts
from expertshare.kernels.triton.backend import TritonBackend
from expertshare.types import Arrivals, Bank, ExpertBank, RoutingPlan


def backend_named(name: str) -> Backend:
    """Whether or not it can run here."""
    kinds: dict[str, type[Backend]] = {"torch": TorchBackend, "cpu": CpuBackend, "triton": TritonBackend}
    return kinds[name]()


def moe_ffn(
    x_TD: Tensor, plan: RoutingPlan, bank: Bank, *, backend: str = "torch", arrivals: Arrivals | None = None
) -> Tensor:
    """Of the backend of that name."""
    return backend_named(backend).moe_ffn(x_TD, plan, bank, arrivals)


def moe_ffn_loop(x_TD: Tensor, plan: RoutingPlan, bank: Bank) -> Tensor:
    """The oracle, in a loop that can be read against the formula.

    y_t = sum_k w_tk * down_e(silu(gate_e x_t) * up_e x_t) with e = expert_ids[t, k]; float32 accumulation.
    """
    if not isinstance(bank, ExpertBank):
        plan, bank = dequantised_experts(plan, bank, x_TD.dtype)
    rows = []
    for token, x_D in enumerate(x_TD):
        y_D = torch.zeros(x_TD.shape[1], dtype=torch.float32, device=x_TD.device)
        for slot, expert in enumerate(plan.expert_ids_TK[token].tolist()):
            if expert < 0:
                continue
            gate_F, up_F = (bank.gate_up_EHD[expert] @ x_D).chunk(2)
            out_D = bank.down_EDF[expert] @ (F.silu(gate_F) * up_F)
            y_D = y_D + plan.weights_TK[token, slot] * out_D.float()
        rows.append(y_D.to(x_TD.dtype))
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)
