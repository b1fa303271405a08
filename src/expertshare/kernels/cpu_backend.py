"""Backend "cpu": our own kernels (native/csrc), for inference on the CPU; what they do not compute stays with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertshare.kernels.backend import LayerKeyValues, Past
from expertshare.kernels.cpu_experts import moe_ffn_cpu, one_expert_cpu, swiglu_cpu
from expertshare.kernels.cpu_ops import (
    add_and_norm_cpu,
    attend_cpu,
    best_token_cpu,
    linear_cpu,
    quantised_head_cpu,
    quantised_logits_cpu,
    rms_norm_cpu,
    turn_heads_cpu,
)
from expertshare.kernels.cpu_route import route_layer_cpu
from expertshare.kernels.torch_backend import TorchBackend
from expertshare.types import ExpertBank, QuantisedTable


class CpuBackend(TorchBackend):
    """Weights are read once, in place, and never copied. It has no gradients, but for those of routing, which are
    torch's."""

    name = "cpu"
    takes_arrivals = True

    route = staticmethod(route_layer_cpu)
    moe_ffn = staticmethod(moe_ffn_cpu)
    linear = staticmethod(linear_cpu)
    rms_norm = staticmethod(rms_norm_cpu)
    add_and_norm = staticmethod(add_and_norm_cpu)
    attention = staticmethod(attend_cpu)

    def __init__(self) -> None:
        self._dense: dict[tuple[int, int], ExpertBank] = {}

    def swiglu(self, x: Tensor, gate_up_HD: Tensor, down_DF: Tensor) -> Tensor:
        """A layer of one expert, which every token uses. Its bank is kept, since a kept bank is checked once."""
        if torch.is_grad_enabled():
            return swiglu_cpu(x, gate_up_HD, down_DF)
        key = gate_up_HD.data_ptr(), down_DF.data_ptr()
        bank = self._dense.get(key)
        if bank is None or bank.gate_up_EHD.shape[1:] != gate_up_HD.shape:
            bank = self._dense[key] = ExpertBank(gate_up_HD.unsqueeze(0), down_DF.unsqueeze(0))
        return one_expert_cpu(x, bank)

    def prepare_heads(
        self,
        qkv_BSHD: Tensor,
        num_heads: int,
        scales: tuple[Tensor, Tensor],
        eps: float,
        tables: tuple[Tensor, Tensor],
        past: Past | None,
    ) -> tuple[Tensor, LayerKeyValues, LayerKeyValues]:
        """In one call: heads are normed and rotated in place, and copied into the cache where the past has one."""
        cached = None if past is None else past.cache_slice()
        turn_heads_cpu(qkv_BSHD, num_heads, scales, eps, tables, cached)
        num_kv_heads = (qkv_BSHD.shape[2] - num_heads) // 2
        q, k, v = torch.split(qkv_BSHD.transpose(1, 2), [num_heads, num_kv_heads, num_kv_heads], dim=1)
        new = LayerKeyValues(k, v)
        if cached is not None:
            return q, new, LayerKeyValues(*cached.reach(qkv_BSHD.shape[1]))
        return q, new, new if past is None else past.extended_by(new)

    def logits(self, hidden: Tensor, weight_VD: Tensor | QuantisedTable) -> Tensor:
        """An int8 table is multiplied by its codes."""
        if isinstance(weight_VD, Tensor):
            return linear_cpu(hidden, weight_VD)
        return quantised_logits_cpu(hidden, weight_VD)

    def best_token(
        self, hidden_RD: Tensor, weight_VD: Tensor | QuantisedTable, excluded: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """One pass over the vocabulary, which keeps no logits."""
        if isinstance(weight_VD, Tensor):
            return best_token_cpu(hidden_RD, weight_VD, excluded)
        return quantised_head_cpu(hidden_RD, weight_VD, excluded)
