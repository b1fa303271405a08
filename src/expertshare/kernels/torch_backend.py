"""Every operation of a model in plain torch, to be read: what the other backends compute faster, and are tested by.

Shapes as in backend.py; P here also counts pairs of a token and an expert, X excluded ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.kernels.backend import LayerKeyValues, Past, check_excluded
from expertshare.kernels.quantise import dequantised_experts, only_used, table_rows, table_slices
from expertshare.routing import route_layer
from expertshare.types import Arrivals, Bank, ExpertBank, QuantisedTable, RoutingPlan

if TYPE_CHECKING:
    from expertshare.kernels.triton.graphs import Graphs

MOST_GROUPS = 1024
"""Of torch's grouped product on a GPU: fewer than these. A store's slots may be more."""
VOCABULARY_ROWS = 4096
"""Rows of an int8 vocabulary that are widened together: 32 MB at 2048 features in float32."""
LOGIT_ROWS = 8
"""Rows of logits that are widened to float32 together: 5 MB at 157,184 ids, which a cache holds."""


class TorchBackend:
    """Backend "torch": runs everywhere, and has gradients."""

    name = "torch"
    takes_arrivals = False

    route = staticmethod(route_layer)
    """Router scores, select, assign."""

    def graphs(self, device: torch.device) -> Graphs | str:
        """None: this backend asks the host while it runs."""
        if device.type == "cpu":
            return f"the model is on {device}; graphs are a GPU's"
        return f"the backend {self.name!r} asks the host while it runs; 'triton' does not"

    def moe_ffn(self, x_TD: Tensor, plan: RoutingPlan, bank: Bank, arrivals: Arrivals | None = None) -> Tensor:
        """One grouped product: tokens of one expert side by side, without a host synchronisation.

        Pairs of (token, expert) are sorted by expert; unused slots sort behind the last expert, where no group covers
        them. The outputs go back to token order before they are summed, so a token's sum does not depend on its batch.
        The experts in use of a quantised bank are widened to the tokens' dtype first, which is slow.
        """
        if arrivals is not None:
            arrivals.wait()
        if not isinstance(bank, ExpertBank):
            plan, bank = dequantised_experts(plan, bank, x_TD.dtype)
        elif len(bank.down_EDF) >= MOST_GROUPS and not bank.down_EDF.is_cpu:
            plan, used_U = only_used(plan)
            bank = ExpertBank(bank.gate_up_EHD[used_U], bank.down_EDF[used_U])
        num_tokens, top_k = plan.expert_ids_TK.shape
        num_experts = len(bank.gate_up_EHD)
        expert_P = plan.expert_ids_TK.flatten()
        used_P = expert_P >= 0
        key_P = torch.where(used_P, expert_P, num_experts)
        order_P = key_P.argsort(stable=True)
        experts_E = torch.arange(num_experts, device=key_P.device)
        ends_E = torch.searchsorted(key_P[order_P], experts_E, right=True, out_int32=True)
        x_PD = x_TD.index_select(0, order_P // top_k)
        # The gradient of a row that no group covers is never written either: cut it off here.
        x_PD = torch.where(used_P[order_P].unsqueeze(-1), x_PD, 0.0)
        gate_PF, up_PF = F.grouped_mm(x_PD, bank.gate_up_EHD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        out_PD = F.grouped_mm(F.silu(gate_PF) * up_PF, bank.down_EDF.transpose(1, 2), offs=ends_E)
        rank_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=key_P.device))
        y_TKD = out_PD.index_select(0, rank_P).float().view(num_tokens, top_k, x_TD.shape[1])
        y_TKD = torch.where(used_P.view(num_tokens, top_k, 1), y_TKD, 0.0)  # rows of unused slots were never written
        return (y_TKD * plan.weights_TK.unsqueeze(-1)).sum(dim=1).to(x_TD.dtype)

    def linear(self, x: Tensor, weight_ND: Tensor) -> Tensor:
        """torch's own product, as Backend.linear says."""
        return F.linear(x, weight_ND)

    def swiglu(self, x: Tensor, gate_up_HD: Tensor, down_DF: Tensor) -> Tensor:
        """The formula, by two projections."""
        gate, up = F.linear(x, gate_up_HD).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down_DF)

    def rms_norm(self, x: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        """The formula; rounded to x's dtype before the scale is applied."""
        x_float = x.float()
        return scale_D * (x_float * torch.rsqrt(x_float.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)

    def add_and_norm(self, x: Tensor, delta: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The sum, then its norm, one after the other."""
        total = x + delta
        return total, self.rms_norm(total, scale_D, eps)

    def prepare_heads(
        self,
        qkv_BSHD: Tensor,
        num_heads: int,
        scales: tuple[Tensor, Tensor],
        eps: float,
        tables: tuple[Tensor, Tensor],
        past: Past | None,
    ) -> tuple[Tensor, LayerKeyValues, LayerKeyValues]:
        """Queries and keys are normed and rotated in one go."""
        num_kv_heads = (qkv_BSHD.shape[2] - num_heads) // 2
        qk, v = torch.split(qkv_BSHD.transpose(1, 2), [num_heads + num_kv_heads, num_kv_heads], dim=1)
        scale_HD = torch.cat((scales[0].expand(num_heads, -1), scales[1].expand(num_kv_heads, -1)))
        qk = rotate(self.rms_norm(qk, scale_HD.unsqueeze(1), eps), tables)
        q, k = torch.split(qk, [num_heads, num_kv_heads], dim=1)
        new = LayerKeyValues(k, v)
        return q, new, new if past is None else past.extended_by(new)

    def attention(self, q_BHSD: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask_BSP: Tensor | None) -> Tensor:
        """torch's own, whichever of its kernels takes these."""
        batch, num_heads, length, head_dim = q_BHSD.shape
        groups = num_heads != k_BHPD.shape[1]
        if groups and mask_BSP is not None and q_BHSD.is_cuda:
            y_BHSD = attend_folded(q_BHSD, k_BHPD, v_BHPD, mask_BSP)
        else:
            mask = None if mask_BSP is None else mask_BSP.unsqueeze(1)
            y_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHPD, v_BHPD, attn_mask=mask, enable_gqa=groups)
        return y_BHSD.transpose(1, 2).reshape(batch, length, num_heads * head_dim)

    def embed(self, tokens: Tensor, weight_VD: Tensor | QuantisedTable, dtype: torch.dtype) -> Tensor:
        """A row of the table each."""
        if isinstance(weight_VD, QuantisedTable):
            return table_rows(weight_VD, tokens, dtype)
        return F.embedding(tokens, weight_VD)

    def logits(self, hidden: Tensor, weight_VD: Tensor | QuantisedTable) -> Tensor:
        """One product; an int8 table is widened a slice at a time."""
        if isinstance(weight_VD, Tensor):
            return self.linear(hidden, weight_VD)
        slices = table_slices(weight_VD, hidden.dtype, VOCABULARY_ROWS)
        return torch.cat([F.linear(hidden, part) for part in slices], dim=-1)

    def best_token(
        self, hidden_RD: Tensor, weight_VD: Tensor | QuantisedTable, excluded: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """From the logits, which are all in memory."""
        return best_of_logits(self.logits(hidden_RD, weight_VD), excluded)


def rotate(x_BHSD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first features of each head by position (half rotation); the rest pass through."""
    cos, sin = (table.to(x_BHSD.dtype) for table in tables)
    size = cos.shape[-1]
    turned, passed = x_BHSD[..., :size], x_BHSD[..., size:]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1)


def attend_folded(q_BHSD: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask_BSP: Tensor) -> Tensor:
    """Attention [B, H, S, head dim] with the query heads of a key head as more queries: torch's fused kernels take a
    mask or groups of heads, not both."""
    batch, num_heads, length, head_dim = q_BHSD.shape
    fold = num_heads // k_BHPD.shape[1]
    mask_B1QP = mask_BSP.unsqueeze(1).expand(-1, fold, -1, -1).reshape(len(mask_BSP), 1, fold * length, -1)
    q_BKQD = q_BHSD.reshape(batch, num_heads // fold, fold * length, head_dim)
    return F.scaled_dot_product_attention(q_BKQD, k_BHPD, v_BHPD, attn_mask=mask_B1QP).reshape(q_BHSD.shape)


def best_of_logits(logits_RV: Tensor, excluded: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As Backend.best_token, of logits [R, V] in any float dtype. ConfigError for excluded ids that are none."""
    check_excluded(excluded, logits_RV.shape[1])
    index_X = torch.tensor(excluded, dtype=torch.int64, device=logits_RV.device)
    slices = [_best_of_few(some_RV, index_X) for some_RV in torch.split(logits_RV, LOGIT_ROWS)]
    tokens, probabilities = zip(*slices, strict=True)
    return torch.cat(tokens), torch.cat(probabilities)


def _best_of_few(logits_RV: Tensor, excluded_X: Tensor) -> tuple[Tensor, Tensor]:
    finite_R = logits_RV.isfinite().all(dim=1)
    clean_RV = logits_RV.float().index_fill(1, excluded_X, float("-inf"))
    tokens_R = clean_RV.argmax(dim=1)
    probability_R = clean_RV.softmax(dim=1).gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    return tokens_R, probability_R.masked_fill(~finite_R, float("nan"))
