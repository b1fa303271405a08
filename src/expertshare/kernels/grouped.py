"""Sorted grouped computation in torch: tokens of one expert side by side, one matrix product per expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.types import ExpertBank, RoutingPlan


def moe_ffn_grouped(x_TD: Tensor, plan: RoutingPlan, bank: ExpertBank) -> Tensor:
    """As the reference, for float32 and bfloat16, differentiable, without a host synchronisation.

    Pairs of (token, expert) are sorted by expert; unused slots sort behind the last expert, where no group covers
    them. The outputs go back to token order before they are summed, so a token's sum does not depend on its batch.
    """
    num_tokens, top_k = plan.expert_ids_TK.shape
    num_experts = bank.gate_up_EHD.shape[0]
    flat = plan.expert_ids_TK.flatten()
    used_P = flat >= 0
    sort_key = torch.where(used_P, flat, num_experts)
    order_P = sort_key.argsort(stable=True)
    ends_E = torch.searchsorted(
        sort_key[order_P], torch.arange(num_experts, device=flat.device), right=True, out_int32=True
    )
    x_PD = x_TD.index_select(0, order_P // top_k)
    # The gradient of a row that no group covers is never written either: cut it off here.
    x_PD = torch.where(used_P[order_P].unsqueeze(-1), x_PD, 0.0)
    hidden = F.grouped_mm(x_PD, bank.gate_up_EHD.transpose(1, 2), offs=ends_E)
    gate_PF, up_PF = hidden.chunk(2, dim=-1)
    out_PD = F.grouped_mm(F.silu(gate_PF) * up_PF, bank.down_EDF.transpose(1, 2), offs=ends_E)
    place_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(order_P.numel(), device=flat.device))
    y_TKD = out_PD.index_select(0, place_P).float().view(num_tokens, top_k, x_TD.shape[1])
    y_TKD = torch.where(used_P.view(num_tokens, top_k, 1), y_TKD, 0.0)  # rows of unused slots were never written
    return (y_TKD * plan.weights_TK.unsqueeze(-1)).sum(dim=1).to(x_TD.dtype)
