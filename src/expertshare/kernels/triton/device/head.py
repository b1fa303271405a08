"""The vocabulary in one pass: best token and its probability per row, logits never in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from expertshare.kernels.triton.device.experts import product

NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def head_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    excluded_ptr,
    best_ptr,
    token_ptr,
    total_ptr,
    num_rows,
    VOCABULARY: tl.constexpr,
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    NUM_EXCLUDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Of BN ids of the vocabulary, for BM rows: the largest logit (float32 [tiles, R]), the lowest id that has it, and
    the sum of exp(logit - largest), NaN where a logit is not finite. Logits are rounded to the dtype of x first."""
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    exists = row < num_rows
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = token < VOCABULARY
    logit = product(
        x_ptr,
        row.to(tl.int64) * DEPTH,
        exists,
        codes_ptr,
        scales_ptr,
        scales_ptr,
        token.to(tl.int64),
        inside,
        DEPTH,
        BITS,
        0,
        False,
        BM,
        BN,
        BK,
    )
    logit = logit.to(x_ptr.dtype.element_ty).to(tl.float32)
    allowed = inside
    for number in tl.static_range(NUM_EXCLUDED):
        allowed = allowed & (token != tl.load(excluded_ptr + number))
    wrong = tl.sum((inside[None, :] & ((logit != logit) | (tl.abs(logit) == float("inf")))).to(tl.int32), axis=1)
    logit = tl.where(allowed[None, :] & (logit == logit), logit, -float("inf"))
    best = tl.max(logit, axis=1)
    first = tl.min(tl.where((logit == best[:, None]) & allowed[None, :], token[None, :], NO_TOKEN), axis=1)
    base = tl.where(best == -float("inf"), 0.0, best)
    total = tl.sum(tl.exp(logit - base[:, None]), axis=1)
    at = tl.program_id(0).to(tl.int64) * num_rows + row
    tl.store(best_ptr + at, best, mask=exists)
    tl.store(token_ptr + at, first, mask=exists)
    tl.store(total_ptr + at, tl.where(wrong > 0, float("nan"), total), mask=exists)


@triton.jit
def best_of_tiles_kernel(
    best_ptr, token_ptr, total_ptr, found_ptr, probability_ptr, num_rows, NUM_TILES: tl.constexpr, TILES: tl.constexpr
):
    """One program per row: int64 token (0 where no logit is a number) and float32 probability, tiles in order."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((TILES,), -float("inf"), tl.float32)
    for begin in range(0, NUM_TILES, TILES):
        tile = begin + tl.arange(0, TILES)
        best = tl.load(best_ptr + tile.to(tl.int64) * num_rows + row, mask=tile < NUM_TILES, other=-float("inf"))
        highest = tl.maximum(highest, best)
    most = tl.max(highest, axis=0)
    first = tl.full((TILES,), NO_TOKEN, tl.int32)
    total = tl.zeros((TILES,), tl.float32)
    for begin in range(0, NUM_TILES, TILES):
        tile = begin + tl.arange(0, TILES)
        at = tile.to(tl.int64) * num_rows + row
        there = tile < NUM_TILES
        best = tl.load(best_ptr + at, mask=there, other=-float("inf"))
        token = tl.load(token_ptr + at, mask=there, other=NO_TOKEN)
        part = tl.load(total_ptr + at, mask=there, other=0.0)
        first = tl.minimum(first, tl.where(best == most, token, NO_TOKEN))
        # a tile of excluded ids alone has nothing to add, but its NaN counts
        total += tl.where(best == -float("inf"), part * 0.0, part * tl.exp(best - most))
    token = tl.min(first, axis=0)
    tl.store(found_ptr + row, tl.where(token == NO_TOKEN, 0, token).to(tl.int64))
    tl.store(probability_ptr + row, 1.0 / tl.sum(total, axis=0))
