"""Root-mean-square norms, alone or with what stands beside them: torch, or our own kernel under the backend "cpu"."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from expertshare import native
from expertshare.errors import ConfigError
from expertshare.kernels.projection import raise_for


class _Norm(Structure):
    """es_norm of native/csrc/norm.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "delta", "scale", "sum", "y")),
        *((name, c_int64) for name in ("num_tokens", "depth")),
        ("eps", c_float),
        ("is_bfloat16", c_int32),
        *native.HOW,
    )


class _Heads(Structure):
    """es_heads of native/csrc/norm.h, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "q_scale", "k_scale", "cos", "sin", "keys", "values", "starts")),
        *((name, c_int64) for name in ("batch", "length", "num_heads", "num_kv_heads", "head_dim", "rotary_dim")),
        *((name, c_int64) for name in ("keys_batch_stride", "keys_head_stride")),
        *((name, c_int64) for name in ("values_batch_stride", "values_head_stride")),
        ("eps", c_float),
        ("is_bfloat16", c_int32),
        *native.HOW,
    )


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
    return _norm_cpu(x, None, scale_D, eps)[1] if backend == "cpu" else scale_D * normalised(x, eps)


def add_and_norm(x: Tensor, delta: Tensor, scale_D: Tensor, eps: float, *, backend: str) -> tuple[Tensor, Tensor]:
    """x + delta and its norm, as `rms_norm` has it."""
    if backend == "cpu":
        return _norm_cpu(x, delta, scale_D, eps)
    total = x + delta
    return total, scale_D * normalised(total, eps)


def normalised(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square, taken in float32."""
    x_float = x.float()
    return (x_float * torch.rsqrt(x_float.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def _norm_cpu(x: Tensor, delta: Tensor | None, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, scale_D, *(() if delta is None else (delta,)))
    fits = x.dim() > 0 and scale_D.shape == x.shape[-1:] and (delta is None or delta.shape == x.shape)
    if not fits or 0 in scale_D.shape:
        shapes = [tuple(tensor.shape) for tensor in (x, scale_D, *(() if delta is None else (delta,)))]
        raise ConfigError(f"expected x [..., D], a scale [D] and what is added to x in x's shape, got shapes {shapes}.")
    x, scale_D = x.contiguous(), scale_D.contiguous()
    delta = None if delta is None else delta.contiguous()
    y = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    call = _Norm(
        x.data_ptr(),
        None if delta is None else delta.data_ptr(),
        scale_D.data_ptr(),
        None if delta is None else total.data_ptr(),
        y.data_ptr(),
        x.numel() // len(scale_D),
        len(scale_D),
        eps,
        x.dtype is torch.bfloat16,
    )
    raise_for(native.status_of("es_normalise", call))
    return total, y


def turn_heads_cpu(
    qkv_BSHD: Tensor,
    num_heads: int,
    scales: tuple[Tensor, Tensor],
    eps: float,
    tables: tuple[Tensor, Tensor],
    place: Place | None,
) -> None:
    """Norm and rotate the heads of queries, then of keys, where they lie, the values' behind them; then copy keys and
    values to `place`.

    qkv: contiguous. scales: of queries and keys, [D] each. tables: cosine and sine, [B, 1, S, rotated features] each,
    in the heads' dtype. Rounds wherever the torch path does (models/layers.py). Raises ConfigError for what the kernel
    cannot take, before it writes anything.
    """
    _check(qkv_BSHD, *scales, *tables, *(() if place is None else (place.keys_BHCD, place.values_BHCD)))
    num_kv_heads = _check_heads(qkv_BSHD, num_heads, scales, tables)
    if place is not None:
        _check_place(place, qkv_BSHD, num_kv_heads)
    (q_scale, k_scale), (cos, sin) = ([tensor.contiguous() for tensor in pair] for pair in (scales, tables))
    batch, length, _, head_dim = qkv_BSHD.shape
    starts = (c_int64 * batch)(*(() if place is None else place.starts))
    call = _Heads(
        *(tensor.data_ptr() for tensor in (qkv_BSHD, q_scale, k_scale, cos, sin)),
        *((None, None) if place is None else (place.keys_BHCD.data_ptr(), place.values_BHCD.data_ptr())),
        addressof(starts),
        batch,
        length,
        num_heads,
        num_kv_heads,
        head_dim,
        cos.shape[-1],
        *((0, 0) if place is None else place.keys_BHCD.stride()[:2]),
        *((0, 0) if place is None else place.values_BHCD.stride()[:2]),
        eps,
        qkv_BSHD.dtype is torch.bfloat16,
    )
    raise_for(native.status_of("es_turn_heads", call))


def _check(*tensors: Tensor) -> None:
    dtype = tensors[0].dtype
    fit = all([tensor.dtype is dtype and tensor.is_cpu for tensor in tensors])
    if fit and not torch.is_grad_enabled() and dtype in (torch.bfloat16, torch.float32):
        return
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ConfigError("the backend 'cpu' has no gradients: call it under torch.no_grad(), or use 'grouped'.")
    if not all(tensor.is_cpu for tensor in tensors):
        devices = sorted({tensor.device.type for tensor in tensors})
        raise ConfigError(f"the backend 'cpu' expects tensors on the CPU, got {', '.join(devices)}.")
    if dtype not in (torch.float32, torch.bfloat16) or any(tensor.dtype != dtype for tensor in tensors):
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        raise ConfigError(
            f"the backend 'cpu' expects features, scales and tables all in float32 or all in bfloat16, got "
            f"{', '.join(dtypes)}: convert them, or use the backend 'grouped'."
        )


def _check_heads(qkv_BSHD: Tensor, num_heads: int, scales: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor]) -> int:
    """The number of heads of keys, and of values."""
    if qkv_BSHD.dim() != 4 or not qkv_BSHD.is_contiguous() or 0 in qkv_BSHD.shape[2:]:
        raise ConfigError(
            f"expected contiguous queries, keys and values [B, S, H, D], got shape {tuple(qkv_BSHD.shape)} and strides "
            f"{qkv_BSHD.stride()}."
        )
    batch, length, heads, head_dim = qkv_BSHD.shape
    if not 0 < num_heads < heads or (heads - num_heads) % 2:
        raise ConfigError(f"expected as many heads of keys as of values, got {heads} heads, {num_heads} of queries.")
    rotated = tables[0].shape[-1]
    right = all(scale.shape == (head_dim,) for scale in scales)
    right &= all(table.shape == (batch, 1, length, rotated) for table in tables)
    if not right or rotated % 2 or rotated > head_dim:
        raise ConfigError(
            f"expected scales [{head_dim}] and tables [{batch}, 1, {length}, even and at most {head_dim}], got shapes "
            f"{[tuple(tensor.shape) for tensor in (*scales, *tables)]}."
        )
    return (heads - num_heads) // 2


def _check_place(place: Place, qkv_BSHD: Tensor, num_kv_heads: int) -> None:
    batch, length, _, head_dim = qkv_BSHD.shape
    for tensor in (place.keys_BHCD, place.values_BHCD):
        capacity = tensor.shape[2] if tensor.dim() == 4 else -1
        if tensor.shape != (batch, num_kv_heads, capacity, head_dim) or tensor.stride()[2:] != (head_dim, 1):
            raise ConfigError(
                f"expected room for keys and values [{batch}, {num_kv_heads}, positions, {head_dim}] with the "
                f"positions of a head together, got shape {tuple(tensor.shape)} and strides {tensor.stride()}."
            )
        if len(place.starts) != batch or any(not 0 <= start <= capacity - length for start in place.starts):
            raise ConfigError(
                f"expected {batch} places for {length} positions within 0..{capacity}, got {list(place.starts)}."
            )
