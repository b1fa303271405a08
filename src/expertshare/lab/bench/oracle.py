"""What is right: experts in float32, written once more, so that no kernel is checked against itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.kernels.quantise import dequantise, only_expert
from expertshare.types import Bank, ExpertBank, RoutingPlan

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest relative error of a token's output. One wrong expert of eight is about ten times the bfloat16 one."""
QUANTISED_TOLERANCE = 5e-2
"""The same with quantised experts, against what their codes stand for: tokens and hidden features are 8 bits."""


def expected_output(x_TD: Tensor, plan: RoutingPlan, bank: Bank) -> Tensor:
    """The layer in float32 from the same (rounded or quantised) weights, an expert at a time: [T, D]."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in plan.active_E.nonzero().flatten().tolist():
        token_R, slot_R = (plan.expert_ids_TK == expert).nonzero(as_tuple=True)
        gate_up_HD, down_DF = _floats(bank, expert)
        gate_RF, up_RF = F.linear(x_TD[token_R].float(), gate_up_HD).chunk(2, dim=-1)
        out_RD = F.linear(F.silu(gate_RF) * up_RF, down_DF)
        y_TD.index_add_(0, token_R, out_RD * plan.weights_TK[token_R, slot_R].unsqueeze(-1))
    return y_TD


def _floats(bank: Bank, expert: int) -> tuple[Tensor, Tensor]:
    if isinstance(bank, ExpertBank):
        return bank.gate_up_EHD[expert].float(), bank.down_EDF[expert].float()
    gate_up, down = (dequantise(only_expert(weight, expert)) for weight in (bank.gate_up, bank.down))
    return gate_up, down


def relative_error(y_TD: Tensor, expected_TD: Tensor) -> float:
    """The worst token's error, as a share of that token's output; infinite for a wrong shape or values not finite."""
    if y_TD.shape != expected_TD.shape or not bool(y_TD.isfinite().all()):
        return math.inf
    difference_T = (y_TD.float() - expected_TD).norm(dim=-1)
    return float((difference_T / expected_TD.norm(dim=-1).clamp_min(1e-12)).max())
