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

    codes_ptr: of one matrix. BITS 0: weights in the dtype of x, row by row. Otherwise codes in panels
    (kernels/quantise), four bytes of them in an int32, to which codes_ptr points. A row's scale of 8 bits is applied to
    the sum; codes of 4 bits are widened in float32 and rounded to the dtype of x.
    """
    if BITS == 4:
        total = _panels_of_4(
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
    elif BITS == 8:
        total = _panels_of_8(x_ptr, x_at, x_exists, codes_ptr, row, row_exists, DEPTH, BM, BN, BK)
        total = total * tl.load(scales_ptr + row, mask=row_exists, other=0.0)[None, :]
    else:
        total = _rows(x_ptr, x_at, x_exists, codes_ptr, row, row_exists, DEPTH, BM, BN, BK)
    return total


@triton.jit
def _rows(
    x_ptr,
    x_at,
    x_exists,
    w_ptr,
    row,
    row_exists,
    DEPTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Weights row by row."""
    total = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, DEPTH, BK):
        depth = begin + tl.arange(0, BK)
        inside = depth < DEPTH
        x = tl.load(x_ptr + x_at[:, None] + depth[None, :], mask=x_exists[:, None] & inside[None, :], other=0.0)
        w_at = w_ptr + row[None, :] * DEPTH + depth[:, None]
        w = tl.load(w_at, mask=row_exists[None, :] & inside[:, None], other=0)
        total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit
def _panels_of_8(
    x_ptr,
    x_at,
    x_exists,
    words_ptr,
    row,
    row_exists,
    DEPTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Byte b of word q of a row is its code 4 q + b, so that each b is a product over every fourth feature."""
    WORDS: tl.constexpr = DEPTH // 4
    STEP: tl.constexpr = BK // 4 if BK >= 64 else 16  # a product takes no fewer features
    total = tl.zeros((BM, BN), tl.float32)
    first_of_row = row // 16 * (16 * WORDS) + row % 16
    for begin in range(0, WORDS, STEP):
        word = begin + tl.arange(0, STEP)
        inside = word < WORDS
        there = row_exists[None, :] & inside[:, None]
        codes = tl.load(words_ptr + first_of_row[None, :] + word[:, None] * 16, mask=there, other=0)
        x_ptrs = x_ptr + x_at[:, None] + word[None, :] * 4
        x_there = x_exists[:, None] & inside[None, :]
        for byte in tl.static_range(4):
            x = tl.load(x_ptrs + byte, mask=x_there, other=0.0)
            code = (codes << (24 - 8 * byte)) >> 24
            total = tl.dot(x, code.to(x.dtype), total, input_precision="ieee")
    return total


@triton.jit
def _panels_of_4(
    x_ptr,
    x_at,
    x_exists,
    words_ptr,
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
    """Byte b of word q of a group holds its codes 4 q + b (low half) and GROUP / 2 + 4 q + b (high half)."""
    WORDS: tl.constexpr = DEPTH // 8
    STEP: tl.constexpr = BK // 8 if BK >= 128 else 16
    total = tl.zeros((BM, BN), tl.float32)
    panel = row // 16
    lane = row % 16
    for begin in range(0, WORDS, STEP):
        word = begin + tl.arange(0, STEP)
        inside = word < WORDS
        there = row_exists[None, :] & inside[:, None]
        group = word // (GROUP // 8)
        codes_at = (panel * (16 * WORDS) + lane)[None, :] + word[:, None] * 16
        codes = tl.load(words_ptr + codes_at, mask=there, other=0)
        of_group = (panel * (DEPTH // GROUP * 16) + lane)[None, :] + group[:, None] * 16
        scale = tl.load(scales_ptr + of_group, mask=there, other=0.0).to(tl.float32)
        least = -8.0 * scale
        if HAS_MINIMA:
            least = tl.load(minima_ptr + of_group, mask=there, other=0.0).to(tl.float32)
        x_ptrs = x_ptr + x_at[:, None] + (group * GROUP + word % (GROUP // 8) * 4)[None, :]
        x_there = x_exists[:, None] & inside[None, :]
        for half in tl.static_range(2):
            for byte in tl.static_range(4):
                x = tl.load(x_ptrs + (half * (GROUP // 2) + byte), mask=x_there, other=0.0)
                code = (codes >> (8 * byte + 4 * half)) & 15
                weight = code.to(tl.float32) * scale + least
                total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    return total
