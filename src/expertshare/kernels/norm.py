"""Root-mean-square norms, alone or with what stands beside them: torch, or our own kernel under the backend "cpu"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertshare.kernels.cpu_ops import add_and_norm_cpu, rms_norm_cpu


@dataclass(frozen=True, slots=True)
class Place:
    """Where keys and values of new positions belong: [B, key/value heads, capacity, head dim] each, row b's from
    position starts[b] on."""

    keys_BHCD: Tensor
    values_BHCD: Tensor
    starts: Sequence[int]

    def reach(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values as far as the longest row goes with `length` new positions: views."""
        end = max(self.starts) + length
        return self.keys_BHCD[:, :, :end], self.values_BHCD[:, :, :end]


def rms_norm(x: Tensor, scale_D: Tensor, eps: float, *, backend: str) -> Tensor:
    """scale * (x / root mean square of x), the mean taken in float32 over the last dimension, in x's dtype.

    Raises ConfigError for what the backend "cpu" cannot take.
    """
    return rms_norm_cpu(x, scale_D, eps) if backend == "cpu" else scale_D * normalised(x, eps)


def add_and_norm(x: Tensor, delta: Tensor, scale_D: Tensor, eps: float, *, backend: str) -> tuple[Tensor, Tensor]:
    """x + delta and its norm, as `rms_norm` has it."""
    if backend == "cpu":
        return add_and_norm_cpu(x, delta, scale_D, eps)
    total = x + delta
    return total, scale_D * normalised(total, eps)


def normalised(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square, taken in float32."""
    x_float = x.float()
    return (x_float * torch.rsqrt(x_float.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
