"""Ranking with exact ties: equal scores go to the lower expert id, on every device and for every batch shape."""

from __future__ import annotations

import torch
from torch import Tensor

from expertshare.errors import ConfigError


def top_k_ids(score_xE: Tensor, k: int) -> Tensor:
    """Ids of the `k` largest scores along the last dimension, best first, ties to the lower id.

    score_xE: float32 [..., E]; -inf is allowed, NaN is not. Returns int64 [..., k]. Raises ConfigError otherwise.

    Each score becomes an integer key whose order is that of the floats, with the id in the low bits, so that keys are
    distinct and torch's own top-k has only one right answer.
    """
    if score_xE.dtype != torch.float32:
        raise ConfigError(f"a ranking expects scores in float32, got {score_xE.dtype}: convert them with .float().")
    num_experts = score_xE.shape[-1]
    bits = (score_xE.detach() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: they must tie
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(torch.int64)
    reversed_id = torch.arange(num_experts - 1, -1, -1, device=score_xE.device)
    keys = (ordered << 32) | reversed_id
    best = keys.topk(k, dim=-1).values
    return (num_experts - 1) - (best & 0xFFFFFFFF)


def top_k_mask(score_xE: Tensor, k: int, front_xE: Tensor | None = None) -> Tensor:
    """Membership (bool, same shape) of the `k` largest scores along the last dimension, ties to the lower id.

    front_xE: bool, same shape; those in front outrank all others, and rank by score among themselves.
    """
    if front_xE is None:
        order = top_k_ids(score_xE, k)
    else:
        by_score = top_k_ids(score_xE, score_xE.shape[-1])
        front = front_xE.gather(-1, by_score).to(torch.int8)
        order = by_score.gather(-1, front.argsort(dim=-1, descending=True, stable=True))[..., :k]
    return torch.zeros(score_xE.shape, dtype=torch.bool, device=score_xE.device).scatter_(-1, order, True)
