"""Grouped SwiGLU over the experts that a plan uses. Pairs are (token, slot) of the plan, numbered token * K + slot.

Grids are persistent: a program walks through tiles of used experts only, which it counts itself from what
schedule_kernel left in memory. Unused experts cost nothing, and the host never learns which those are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from expertshare.kernels.triton.device.tile import product


@triton.jit(do_not_specialize=["num_pairs"])
def schedule_kernel(ids_ptr, order_ptr, first_ptr, count_ptr, num_pairs, PAIRS: tl.constexpr):
    """Sorts pairs by expert, in each expert by number: one program per expert. Writes order [P]: the pairs of expert e
    are count[e] entries from first[e] on. Pairs with an id that is no expert are left out."""
    expert = tl.program_id(0)
    before = 0
    for begin in range(0, num_pairs, PAIRS):
        pair = begin + tl.arange(0, PAIRS)
        ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
        before += tl.sum(((ids >= 0) & (ids < expert)).to(tl.int32), axis=0)
    count = 0
    for begin in range(0, num_pairs, PAIRS):
        pair = begin + tl.arange(0, PAIRS)
        ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
        mine = (ids == expert).to(tl.int32)
        place = before + count + tl.cumsum(mine, axis=0) - 1
        tl.store(order_ptr + place, pair, mask=mine > 0)
        count += tl.sum(mine, axis=0)
    tl.store(first_ptr + expert, before)
    tl.store(count_ptr + expert, count)


@triton.jit
def gate_up_kernel(
    x_ptr,
    hidden_ptr,
    order_ptr,
    first_ptr,
    count_ptr,
    codes_ptr,
    scales_ptr,
    minima_ptr,
    codes_stride,
    scales_stride,
    minima_stride,
    NUM_EXPERTS: tl.constexpr,
    EXPERTSP: tl.constexpr,
    TOP_K: tl.constexpr,
    DEPTH: tl.constexpr,
    INNER: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden [P, INNER] = silu(gate x) * up x in the dtype of x, pairs in the order of the schedule.

    A tile has BN features: gate and up rows by turns, so that both lie in one product and meet in one thread.
    """
    COLUMNS: tl.constexpr = (INNER + BN - 1) // BN
    lane = tl.arange(0, EXPERTSP)
    tiles = (tl.load(count_ptr + lane, mask=lane < NUM_EXPERTS, other=0) + BM - 1) // BM
    ends = tl.cumsum(tiles, axis=0)
    for tile in range(tl.program_id(0), tl.sum(tiles, axis=0) * COLUMNS, tl.num_programs(0)):
        expert, place, exists = _rows_of_tile(tile // COLUMNS, lane, tiles, ends, first_ptr, count_ptr, BM)
        token = tl.load(order_ptr + place, mask=exists, other=0) // TOP_K
        turn = tl.arange(0, 2 * BN)
        feature = tile % COLUMNS * BN + turn // 2
        both = product(
            x_ptr,
            token.to(tl.int64) * DEPTH,
            exists,
            codes_ptr + expert * codes_stride,
            scales_ptr + expert * scales_stride,
            minima_ptr + expert * minima_stride,
            feature + turn % 2 * INNER,
            feature < INNER,
            DEPTH,
            BITS,
            GROUP,
            HAS_MINIMA,
            BM,
            2 * BN,
            BK,
        )
        gate, up = tl.split(tl.reshape(both, (BM, BN, 2)))
        hidden = gate / (1.0 + tl.exp(-gate)) * up
        column = tile % COLUMNS * BN + tl.arange(0, BN)
        at = hidden_ptr + place.to(tl.int64)[:, None] * INNER + column[None, :]
        tl.store(at, hidden.to(hidden_ptr.dtype.element_ty), mask=exists[:, None] & (column < INNER)[None, :])


@triton.jit
def down_kernel(
    hidden_ptr,
    out_ptr,
    order_ptr,
    first_ptr,
    count_ptr,
    codes_ptr,
    scales_ptr,
    minima_ptr,
    codes_stride,
    scales_stride,
    minima_stride,
    NUM_EXPERTS: tl.constexpr,
    EXPERTSP: tl.constexpr,
    DEPTH: tl.constexpr,
    INNER: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out float32 [P, DEPTH] = down hidden, every pair at its own number, ready to be summed by token."""
    COLUMNS: tl.constexpr = (DEPTH + BN - 1) // BN
    lane = tl.arange(0, EXPERTSP)
    tiles = (tl.load(count_ptr + lane, mask=lane < NUM_EXPERTS, other=0) + BM - 1) // BM
    ends = tl.cumsum(tiles, axis=0)
    for tile in range(tl.program_id(0), tl.sum(tiles, axis=0) * COLUMNS, tl.num_programs(0)):
        expert, place, exists = _rows_of_tile(tile // COLUMNS, lane, tiles, ends, first_ptr, count_ptr, BM)
        pair = tl.load(order_ptr + place, mask=exists, other=0)
        column = tile % COLUMNS * BN + tl.arange(0, BN)
        inside = column < DEPTH
        out = product(
            hidden_ptr,
            place.to(tl.int64) * INNER,
            exists,
            codes_ptr + expert * codes_stride,
            scales_ptr + expert * scales_stride,
            minima_ptr + expert * minima_stride,
            column,
            inside,
            INNER,
            BITS,
            GROUP,
            HAS_MINIMA,
            BM,
            BN,
            BK,
        )
        at = out_ptr + pair.to(tl.int64)[:, None] * DEPTH + column[None, :]
        tl.store(at, out, mask=exists[:, None] & inside[None, :])


@triton.jit
def mix_kernel(
    out_ptr,
    ids_ptr,
    weights_ptr,
    y_ptr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    DEPTH: tl.constexpr,
    BN: tl.constexpr,
):
    """y [T, DEPTH]: a token's slots times their weights, added up slot by slot in float32; unused ones are not read."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < DEPTH
    total = tl.zeros((BN,), tl.float32)
    for slot in range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(ids_ptr + pair)
        if (expert >= 0) & (expert < NUM_EXPERTS):
            weight = tl.load(weights_ptr + pair)
            total += weight * tl.load(out_ptr + pair * DEPTH + column, mask=inside, other=0.0)
    tl.store(y_ptr + token * DEPTH + column, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rows_of_tile(number, lane, tiles, ends, first_ptr, count_ptr, BM: tl.constexpr):
    """Expert (int64) of the number-th tile of rows, and where its BM pairs stand in the schedule, if they exist."""
    expert = tl.sum((ends <= number).to(tl.int32), axis=0)
    begin = (number - tl.sum(tl.where(lane == expert, ends - tiles, 0), axis=0)) * BM
    place = begin + tl.arange(0, BM)
    exists = place < tl.load(count_ptr + expert)
    return expert.to(tl.int64), tl.load(first_ptr + expert) + place, exists
