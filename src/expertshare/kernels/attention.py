"""Attention of the queries of a block to all cached and own keys: torch, or our own kernel under the backend "cpu"."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from expertshare.kernels.cpu_ops import attend_cpu


def attend(q_BHSD: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask_BSP: Tensor | None, *, backend: str) -> Tensor:
    """Softmax attention, grouped heads, scaled by 1 / sqrt(D): [B, S, H * D] in the queries' dtype.

    mask: bool, True where a query sees a key, at least one each; None: all. Raises ConfigError for what the backend
    "cpu" cannot take; the others are torch's own operation.
    """
    if backend == "cpu":
        return attend_cpu(q_BHSD, k_BHPD, v_BHPD, mask_BSP)
    batch, num_heads, length, _ = q_BHSD.shape
    groups = num_heads != k_BHPD.shape[1]
    if groups and mask_BSP is not None and q_BHSD.is_cuda:
        return _attend_folded(q_BHSD, k_BHPD, v_BHPD, mask_BSP)
    mask = None if mask_BSP is None else mask_BSP.unsqueeze(1)
    y_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHPD, v_BHPD, attn_mask=mask, enable_gqa=groups)
    return y_BHSD.transpose(1, 2).reshape(batch, length, -1)


def _attend_folded(q_BHSD: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask_BSP: Tensor) -> Tensor:
    """The same, with the query heads of a key head as more queries: torch's fused kernels take a mask or groups of
    heads, not both."""
    batch, num_heads, length, head_dim = q_BHSD.shape
    num_kv_heads = k_BHPD.shape[1]
    fold = num_heads // num_kv_heads
    mask_BFSP = mask_BSP.unsqueeze(1).expand(-1, fold, -1, -1)
    mask = mask_BFSP.reshape(mask_BSP.shape[0], 1, fold * length, mask_BSP.shape[2])
    q_BKQD = q_BHSD.reshape(batch, num_kv_heads, fold * length, head_dim)
    y_BKQD = F.scaled_dot_product_attention(q_BKQD, k_BHPD, v_BHPD, attn_mask=mask)
    return y_BKQD.reshape(batch, num_heads, length, head_dim).transpose(1, 2).reshape(batch, length, -1)
