"""Dense building blocks shared by all families: norm, rotary embedding, attention, MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertshare.config import ModelConfig
from expertshare.kernels import attend, linear, swiglu
from expertshare.models.runtime import LayerKeyValues, Past


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; returns the input's dtype."""
        return self.weight * normalised(x, self.eps)


def normalised(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square, taken in float32."""
    x_float = x.float()
    return (x_float * torch.rsqrt(x_float.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


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
        qkv = linear(x_BSD, self.qkv.weight, backend=backend).view(batch, length, -1, self.head_dim).transpose(1, 2)
        qk, v = torch.split(qkv, [self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        qk = rotate(self._scales_H1D() * normalised(qk, self.q_norm.eps), tables)
        q, k = torch.split(qk, [self.num_heads, self.num_kv_heads], dim=1)
        new = LayerKeyValues(k, v)
        seen = new if past is None else past.extended_by(new)
        y_BSD = attend(q, seen.keys_BHSD, seen.values_BHSD, mask_BSP, backend=backend)
        return linear(y_BSD, self.out.weight, backend=backend), new

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

    def forward(self, x: Tensor, *, backend: str) -> Tensor:
        """Same shape and dtype as the input."""
        return swiglu(x, self.gate_up.weight, self.down.weight, backend=backend)
