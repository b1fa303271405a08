"""What is right: experts in float32, written once more, so that no kernel is checked against itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.types import ExpertBank, RoutingPlan

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest relative error of a token's output. One wrong expert of eight is about ten times the bfloat16 one."""


def expected_output(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> Tensor:
    """The layer in float32 from the same (rounded) weights, an expert at a time: [T, D]."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
    for expert in plan.active_E.nonzero().flatten().tolist():
        token_R, slot_R = (plan.expert_ids_TK == expert).nonzero(as_tuple=True)
        gate_RF, up_RF = F.linear(x_TD[token_R].float(), bank.gate_up_EHD[expert].float()).chunk(2, dim=-1)
        out_RD = F.linear(F.silu(gate_RF) * up_RF, bank.down_EDF[expert].float())
        y_TD.index_add_(0, token_R, out_RD * plan.weights_TK[token_R, slot_R].unsqueeze(-1))
    return y_TD


def relative_error(y_TD: Tensor, expected_TD: Tensor) -> float:
    """The worst token's error, as a share of that token's output; infinite for a wrong shape or values not finite."""
    if y_TD.shape != expected_TD.shape or not bool(y_TD.isfinite().all()):
        return math.inf
    difference_T = (y_TD.float() - expected_TD).norm(dim=-1)
    return float((difference_T / expected_TD.norm(dim=-1).clamp_min(1e-12)).max())
