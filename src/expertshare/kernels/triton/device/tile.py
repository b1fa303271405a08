"""A tile of tokens times a tile of weight rows, for weights of every kind that a bank can hold."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    x_ptr,
    x_at,
    x_exists,
    codes_ptr,
    scales_ptr,
    minima_ptr,
    row,
    row_exists,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BM, BN]: tokens, DEPTH features from x_ptr + x_at [BM] on, times the weights of rows `row` [BN].

    codes_ptr: of one matrix. BITS 0: weights in the dtype of x. BITS 8: codes; a row's scale is applied to the sum.
    BITS 4: two codes a byte within groups (kernels/quantise), widened in float32 and rounded to the dtype of x.
    """
    if BITS == 4:
        return _packed(
            x_ptr,
            x_at,
            x_exists,
            codes_ptr,
            scales_ptr,
            minima_ptr,
            row,
            row_exists,
            DEPTH,
            GROUP,
            HAS_MINIMA,
            BM,
            BN,
            BK,
        )
    total = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, DEPTH, BK):
        depth = begin + tl.arange(0, BK)
        inside = depth < DEPTH
        x = tl.load(x_ptr + x_at[:, None] + depth[None, :], mask=x_exists[:, None] & inside[None, :], other=0.0)
        w_at = codes_ptr + row[None, :] * DEPTH + depth[:, None]
        w = tl.load(w_at, mask=row_exists[None, :] & inside[:, None], other=0)
        total = tl.dot(x, w.to(x.dtype), total, input_precision="ieee")
    if BITS == 8:
        total = total * tl.load(scales_ptr + row, mask=row_exists, other=0.0)[None, :]
    return total


@triton.jit
def _packed(
    x_ptr,
    x_at,
    x_exists,
    codes_ptr,
    scales_ptr,
    minima_ptr,
    row,
    row_exists,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The low halves of BK / 2 bytes, then the high ones: byte j of a group holds codes j and j + GROUP / 2."""
    HALF: tl.constexpr = GROUP // 2
    total = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, DEPTH // 2, BK // 2):
        byte = begin + tl.arange(0, BK // 2)
        inside = byte < DEPTH // 2
        there = row_exists[None, :] & inside[:, None]
        group = byte // HALF
        packed = tl.load(codes_ptr + row[None, :] * (DEPTH // 2) + byte[:, None], mask=there, other=0)
        of_group = row[None, :] * (DEPTH // GROUP) + group[:, None]
        scale = tl.load(scales_ptr + of_group, mask=there, other=0.0).to(tl.float32)
        low = (packed & 15).to(tl.float32)
        high = (packed >> 4).to(tl.float32)
        if HAS_MINIMA:
            least = tl.load(minima_ptr + of_group, mask=there, other=0.0).to(tl.float32)
            low = low * scale + least
            high = high * scale + least
        else:
            low = (low - 8.0) * scale
            high = (high - 8.0) * scale
        x_low_at = x_ptr + x_at[:, None] + (group * GROUP + byte % HALF)[None, :]
        x_there = x_exists[:, None] & inside[None, :]
        x_low = tl.load(x_low_at, mask=x_there, other=0.0)
        x_high = tl.load(x_low_at + HALF, mask=x_there, other=0.0)
        total = tl.dot(x_low, low.to(x_low.dtype), total, input_precision="ieee")
        total = tl.dot(x_high, high.to(x_high.dtype), total, input_precision="ieee")
    return total
