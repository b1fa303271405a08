"""Dense building blocks shared by all families: norm, attention, MLP, and an embedding or head in int8.

Shapes: B rows, S new positions, P positions that are attended to, H heads, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertshare.config import ModelConfig
from expertshare.kernels import Backend, LayerKeyValues, Past
from expertshare.kernels.quantise import table_shapes
from expertshare.types import QuantisedTable


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """Normalise the last dimension; returns the input's dtype."""
        return backend.rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, delta: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """x + delta, and that normalised."""
        return backend.add_and_norm(x, delta, self.weight, self.eps)


def rotary_tables(positions_BS: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine for the first `rotary_dim` features of a head: float32 [B, 1, S, rotary_dim] each."""
    half = config.rotary_dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=positions_BS.device) * 2 / config.rotary_dim
    frequency = 1.0 / config.rope_theta**exponent
    angle = positions_BS.float().unsqueeze(-1) * frequency
    angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    """Grouped-query attention with per-head query and key norm before the rotation. Fused q|k|v projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
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
        backend: Backend,
    ) -> tuple[Tensor, LayerKeyValues]:
        """Attend from the S new positions to cached and new ones; no mask: to all of them. Returns the output and the
        new keys and values."""
        qkv_BSHD = backend.linear(x_BSD, self.qkv.weight).view(*x_BSD.shape[:2], -1, self.head_dim)
        scales = (self.q_norm.weight, self.k_norm.weight)
        q, new, seen = backend.prepare_heads(qkv_BSHD, self.num_heads, scales, self.q_norm.eps, tables, past)
        y_BSD = backend.attention(q, seen.keys_BHSD, seen.values_BHSD, mask_BSP)
        return backend.linear(y_BSD, self.out.weight), new


class SwiGLU(nn.Module):
    """Dense gated MLP: down(silu(gate x) * up x). Gate and up are one projection, gate rows first."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """Same shape and dtype as the input."""
        return backend.swiglu(x, self.gate_up.weight, self.down.weight)


class QuantisedVocabulary(nn.Module):
    """The codes and scales of a QuantisedTable: buffers, since nothing trains them."""

    def __init__(self, vocabulary: int, depth: int) -> None:
        super().__init__()
        for name, (shape, part) in table_shapes(vocabulary, depth).items():
            self.register_buffer(name, torch.empty(shape, dtype=part))
        self.codes: Tensor
        self.scales: Tensor
        self.num_rows = vocabulary

    @property
    def weight(self) -> QuantisedTable:
        """What a backend takes in the place of float weights."""
        return QuantisedTable(self.codes, self.scales, self.num_rows)
