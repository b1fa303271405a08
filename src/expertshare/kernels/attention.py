"""Attention of the queries of a block to all cached and own keys: torch, or our own kernel under the backend "cpu"."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.projection import raise_for


class _Attention(Structure):
    """es_attention of native/csrc/abi.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "mask", "y")),
        *((name, c_int64) for name in ("batch", "num_heads", "num_kv_heads", "length", "num_keys", "head_dim")),
        *((name, c_int64) for name in ("q_batch_stride", "q_head_stride", "q_stride")),
        *((name, c_int64) for name in ("k_batch_stride", "k_head_stride", "v_batch_stride", "v_head_stride")),
        *((name, c_int64) for name in ("mask_batch_stride", "mask_stride")),
        ("scale", c_float),
        ("is_bfloat16", c_int32),
        *native.HOW,
    )


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


def attend_cpu(q_BHSD: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask_BSP: Tensor | None) -> Tensor:
    """`attend` by our own kernel. Scores and sums are float32; the softmax's weights are rounded to the dtype once.

    A query's result does not depend on other queries, on keys that it does not see (unless those are not finite), or
    on the number of threads. Raises ConfigError for gradients, another device or dtype, shapes that do not fit.
    """
    _check(q_BHSD, k_BHPD, v_BHPD, mask_BSP)
    batch, num_heads, length, head_dim = q_BHSD.shape
    num_keys = k_BHPD.shape[2]
    q_BHSD = q_BHSD if q_BHSD.stride(3) == 1 else q_BHSD.contiguous()
    k_BHPD, v_BHPD = _with_positions_together(k_BHPD), _with_positions_together(v_BHPD)
    if mask_BSP is not None:
        mask_BSP = mask_BSP.expand(batch, length, num_keys)
        mask_BSP = mask_BSP if mask_BSP.stride(2) == 1 else mask_BSP.contiguous()
    y_BSHD = torch.empty(batch, length, num_heads, head_dim, dtype=q_BHSD.dtype)
    call = _Attention(
        *(tensor.data_ptr() for tensor in (q_BHSD, k_BHPD, v_BHPD)),
        None if mask_BSP is None else mask_BSP.data_ptr(),
        y_BSHD.data_ptr(),
        batch,
        num_heads,
        k_BHPD.shape[1],
        length,
        num_keys,
        head_dim,
        *q_BHSD.stride()[:3],
        *k_BHPD.stride()[:2],
        *v_BHPD.stride()[:2],
        *((0, 0) if mask_BSP is None else mask_BSP.stride()[:2]),
        head_dim**-0.5,
        q_BHSD.dtype is torch.bfloat16,
    )
    raise_for(native.status_of("es_attend", call))
    return y_BSHD.view(batch, length, num_heads * head_dim)


def _with_positions_together(keys_BHPD: Tensor) -> Tensor:
    together = keys_BHPD.stride(3) == 1 and keys_BHPD.stride(2) == keys_BHPD.shape[3]
    return keys_BHPD if together else keys_BHPD.contiguous()


def _fit(q_BHSD: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask_BSP: Tensor | None) -> bool:
    """What `_check` asks of them, gradients apart, at a fraction of its cost; masks to be expanded are for `_check`."""
    q_shape, k_shape, dtype = q_BHSD.shape, k_BHPD.shape, q_BHSD.dtype
    return (
        dtype in (torch.bfloat16, torch.float32)
        and k_BHPD.dtype is dtype
        and v_BHPD.dtype is dtype
        and q_BHSD.is_cpu
        and k_BHPD.is_cpu
        and v_BHPD.is_cpu
        and len(q_shape) == 4
        and len(k_shape) == 4
        and v_BHPD.shape == k_shape
        and 0 not in k_shape
        and k_shape[0] == q_shape[0]
        and k_shape[3] == q_shape[3]
        and q_shape[1] % k_shape[1] == 0
        and (mask_BSP is None or (mask_BSP.is_cpu and mask_BSP.dtype is torch.bool))
        and (mask_BSP is None or mask_BSP.shape == (q_shape[0], q_shape[2], k_shape[2]))
    )


def _check(q_BHSD: Tensor, k_BHPD: Tensor, v_BHPD: Tensor, mask_BSP: Tensor | None) -> None:
    features = (q_BHSD, k_BHPD, v_BHPD)
    if not torch.is_grad_enabled() and _fit(*features, mask_BSP):
        return
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in features):
        raise ConfigError("the backend 'cpu' has no gradients: call it under torch.no_grad(), or use 'grouped'.")
    devices = {tensor.device.type for tensor in (*features, *(() if mask_BSP is None else (mask_BSP,)))}
    if devices != {"cpu"}:
        raise ConfigError(f"the backend 'cpu' expects tensors on the CPU, got {', '.join(sorted(devices))}.")
    dtypes = {tensor.dtype for tensor in features}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        raise ConfigError(
            "the backend 'cpu' expects queries, keys and values all in float32 or all in bfloat16, got "
            f"{', '.join(sorted(map(str, dtypes)))}: convert them, or use the backend 'grouped'."
        )
    if any(tensor.dim() != 4 for tensor in features):
        raise ConfigError(f"expected queries, keys and values of 4 dimensions, got {[x.dim() for x in features]}.")
    batch, num_heads, length, head_dim = q_BHSD.shape
    fits = k_BHPD.shape == v_BHPD.shape and (k_BHPD.shape[0], k_BHPD.shape[3]) == (batch, head_dim)
    if not fits or 0 in k_BHPD.shape or num_heads % k_BHPD.shape[1]:
        raise ConfigError(
            "expected queries [B, H, S, D] and as many keys as values [B, a divisor of H, P, D], got shapes "
            f"{[tuple(tensor.shape) for tensor in features]}."
        )
    if mask_BSP is None:
        return
    wide = mask_BSP.dim() == 3 and all(
        size in (1, wanted) for size, wanted in zip(mask_BSP.shape, (batch, length, k_BHPD.shape[2]), strict=True)
    )
    if mask_BSP.dtype != torch.bool or not wide:
        raise ConfigError(
            f"expected a bool mask {[batch, length, k_BHPD.shape[2]]}, got {mask_BSP.dtype} {tuple(mask_BSP.shape)}."
        )
