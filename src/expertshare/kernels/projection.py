"""Dense projections on the CPU by our own kernel (native/csrc): a row of weights is read once for all tokens."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError


class _Dense(Structure):
    """es_dense of native/csrc/abi.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "w", "y")),
        *((name, c_int64) for name in ("num_tokens", "num_rows", "depth")),
        ("is_bfloat16", c_int32),
        *native.HOW,
    )


def linear_cpu(x: Tensor, weight_ND: Tensor) -> Tensor:
    """x [..., D] times the transpose of weight_ND: [..., N] in their dtype, float32 or bfloat16.

    Sums are float32 and rounded once. The result depends on the instruction set, but not on the number of threads or
    on the other tokens: no other kernel takes over where there are many. The weights must be contiguous; they need no
    alignment beyond that of an element. Raises ConfigError for what the kernel cannot take: gradients, another device
    or dtype, other layouts.
    """
    check_dense(x, weight_ND)
    num_rows, depth = weight_ND.shape
    x_TD = x.reshape(-1, depth).contiguous()
    y_TN = torch.empty(len(x_TD), num_rows, dtype=x.dtype)
    dense = _Dense(
        *(tensor.data_ptr() for tensor in (x_TD, weight_ND, y_TN)),
        len(x_TD),
        num_rows,
        depth,
        x.dtype is torch.bfloat16,
    )
    raise_for(native.status_of("es_linear", dense))
    return y_TN.view(*x.shape[:-1], num_rows)


def check_dense(x: Tensor, weight_ND: Tensor) -> None:
    """Everything that would make the kernel read outside a tensor, or compute something else."""
    if not torch.is_grad_enabled() and _fit(x, weight_ND):
        return
    if torch.is_grad_enabled() and (x.requires_grad or weight_ND.requires_grad):
        raise ConfigError("the backend 'cpu' has no gradients: call it under torch.no_grad(), or use 'grouped'.")
    if x.device.type != "cpu" or weight_ND.device.type != "cpu":
        raise ConfigError(
            f"the backend 'cpu' expects tensors on the CPU, got x on {x.device.type} and weights on "
            f"{weight_ND.device.type}: move them, or use the backend 'grouped'."
        )
    if x.dtype != weight_ND.dtype or x.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(
            "the backend 'cpu' expects features and weights both in float32 or both in bfloat16, got "
            f"{x.dtype} and {weight_ND.dtype}: convert them, or use the backend 'grouped'."
        )
    if x.dim() < 1 or weight_ND.dim() != 2 or x.shape[-1] != weight_ND.shape[1] or 0 in weight_ND.shape:
        raise ConfigError(
            f"expected x [..., D] and weights [N, D], got shapes {tuple(x.shape)} and {tuple(weight_ND.shape)}."
        )
    if not weight_ND.is_contiguous():
        raise ConfigError(
            "the backend 'cpu' reads weights where they lie and expects them contiguous, got strides "
            f"{weight_ND.stride()} for shape {tuple(weight_ND.shape)}: make them contiguous once, when they are loaded."
        )
    if weight_ND.data_ptr() % weight_ND.element_size() != 0:
        raise ConfigError(f"weights are not aligned to their elements of {weight_ND.element_size()} bytes: clone them.")


def _fit(x: Tensor, weight_ND: Tensor) -> bool:
    """What `check_dense` asks of them, gradients apart, at a fraction of its cost."""
    dtype, shape = weight_ND.dtype, weight_ND.shape
    return (
        x.dtype is dtype
        and dtype in (torch.bfloat16, torch.float32)
        and x.is_cpu
        and weight_ND.is_cpu
        and len(shape) == 2
        and 0 not in shape
        and x.shape[-1:] == shape[1:]
        and weight_ND.is_contiguous()
        and weight_ND.data_ptr() % weight_ND.element_size() == 0
    )


def raise_for(status: int) -> None:
    """ConfigError for an es_status that is not ES_OK."""
    if status == 0:
        return
    reasons = {
        2: "not enough memory for the scratch of this call: pass fewer tokens at a time",
        3: f"{native.num_threads()} threads could not be started: set fewer with set_num_threads",
        4: "the instruction set cannot run here",
    }
    raise ConfigError(f"the backend 'cpu' failed: {reasons[status]}.")
