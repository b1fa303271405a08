"""The oracle: every token, every expert, in a loop that can be read against the formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.types import ExpertBank, RoutingPlan


def moe_ffn_reference(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> Tensor:
    """y_t = sum_k w_tk * down_e(silu(gate_e x_t) * up_e x_t) with e = expert_ids[t, k]; float32 accumulation."""
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
