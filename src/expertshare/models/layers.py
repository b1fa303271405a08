"""Dense building blocks shared by all families: norm, rotary embedding, attention, MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertshare.config import ModelConfig
from expertshare.kernels import (
    Place,
    add_and_norm,
    attend,
    linear,
    normalised,
    one_expert_cpu,
    rms_norm,
    swiglu,
    turn_heads_cpu,
)
from expertshare.models.runtime import LayerKeyValues, Past
from expertshare.types import ExpertBank


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, *, backend: str = "grouped") -> Tensor:
        """Normalise the last dimension; returns the input's dtype."""
        return rms_norm(x, self.weight, self.eps, backend=backend)

    def of_sum(self, x: Tensor, delta: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
        """x + delta, and that normalised."""
        return add_and_norm(x, delta, self.weight, self.eps, backend=backend)


def rotary_tables(positions_BS: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine for the first `rotary_dim` features of a head: float32 [B, 1, S, rotary_dim] each."""
    half = config.rotary_dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=positions_BS.device) * 2 / config.rotary_dim
    frequency = 1.0 / config.rope_theta**exponent
    angle = positions_BS.float().unsqueeze(-1) * frequency
    angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
    return angle.cos(), angle.sin()


def rotate(x_BHSD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first features of each head by position (half rotation); the rest pass through."""
    cos, sin = (table.to(x_BHSD.dtype) for table in tables)
    size = cos.shape[-1]
    turned, passed = x_BHSD[..., :size], x_BHSD[..., size:]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with per-head query and key norm before the rotation. Fused q|k|v projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, width, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        tables: tuple[Tensor, Tensor],
        mask_BSP: Tensor | None,
        past: Past | None,
        *,
        backend: str,
    ) -> tuple[Tensor, LayerKeyValues]:
        """Attend from the S new positions to cached and new ones; no mask: to all of them. Returns the output and the
        new keys and values."""
        batch, length, _ = x_BSD.shape
        qkv_BSHD = linear(x_BSD, self.qkv.weight, backend=backend).view(batch, length, -1, self.head_dim)
        place = past.place() if past is not None and backend == "cpu" else None
        q, new = self._turned(qkv_BSHD, tables, place, backend)
        if place is not None:
            seen = LayerKeyValues(*place.reach(length))
        else:
            seen = new if past is None else past.extended_by(new)
        y_BSD = attend(q, seen.keys_BHSD, seen.values_BHSD, mask_BSP, backend=backend)
        return linear(y_BSD, self.out.weight, backend=backend), new

    def _turned(
        self, qkv_BSHD: Tensor, tables: tuple[Tensor, Tensor], place: Place | None, backend: str
    ) -> tuple[Tensor, LayerKeyValues]:
        """Queries, and keys with values, [B, heads, S, D] each: normed and rotated. Those at `place` are, too."""
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        if backend == "cpu":
            scales = (self.q_norm.weight, self.k_norm.weight)
            turn_heads_cpu(qkv_BSHD, self.num_heads, scales, self.q_norm.eps, tables, place)
            q, k, v = torch.split(qkv_BSHD.transpose(1, 2), heads, dim=1)
            return q, LayerKeyValues(k, v)
        qk, v = torch.split(qkv_BSHD.transpose(1, 2), [heads[0] + heads[1], heads[2]], dim=1)
        qk = rotate(self._scales_H1D() * normalised(qk, self.q_norm.eps), tables)
        q, k = torch.split(qk, heads[:2], dim=1)
        return q, LayerKeyValues(k, v)

    def _scales_H1D(self) -> Tensor:
        """The norms' scales for all heads of queries, then of keys: both are normed and rotated in one go."""
        q_HD = self.q_norm.weight.expand(self.num_heads, -1)
        k_HD = self.k_norm.weight.expand(self.num_kv_heads, -1)
        return torch.cat((q_HD, k_HD)).unsqueeze(1)


class SwiGLU(nn.Module):
    """Dense gated MLP: down(silu(gate x) * up x). Gate and up are one projection, gate rows first."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden_size, bias=False)
        self._bank: ExpertBank | None = None

    def forward(self, x: Tensor, *, backend: str) -> Tensor:
        """Same shape and dtype as the input."""
        if backend == "cpu" and not torch.is_grad_enabled():
            return one_expert_cpu(x, self._as_bank())
        return swiglu(x, self.gate_up.weight, self.down.weight, backend=backend)

    def _as_bank(self) -> ExpertBank:
        """The weights as one expert's: the same views for as long as they lie where they do."""
        gate_up_HD, down_DF, bank = self.gate_up.weight, self.down.weight, self._bank
        if (
            bank is None
            or bank.gate_up_EHD.data_ptr() != gate_up_HD.data_ptr()
            or bank.down_EDF.data_ptr() != down_DF.data_ptr()
        ):
            bank = self._bank = ExpertBank(gate_up_HD.detach().unsqueeze(0), down_DF.detach().unsqueeze(0))
        return bank
