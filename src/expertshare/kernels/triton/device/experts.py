"""Grouped SwiGLU over the experts that a plan uses. Pairs are (token, slot) of the plan, numbered token * K + slot.

Grids are persistent: a program walks through tiles of used experts only, which it counts itself from what
schedule_kernel left in memory. Unused experts cost nothing, and the host never learns which those are.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def project_kernel(
    x_ptr,
    y_ptr,
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
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One projection of the scheduled pairs, from DEPTH features to WIDTH.

    GATED: y [P, WIDTH] = silu(gate x) * up x in its own dtype, x by token, y by place in the schedule. A tile has BN
    features: gate and up rows by turns, so that both lie in one product and meet in one thread. Otherwise y = down x in
    float32, x by place in the schedule, y by the number of the pair, ready to be summed by token.
    """
    PARTS: tl.constexpr = 2 if GATED else 1
    COLUMNS: tl.constexpr = (WIDTH + BN - 1) // BN
    lane = tl.arange(0, EXPERTSP)
    tiles = (tl.load(count_ptr + lane, mask=lane < NUM_EXPERTS, other=0) + BM - 1) // BM
    ends = tl.cumsum(tiles, axis=0)
    for tile in range(tl.program_id(0), tl.sum(tiles, axis=0) * COLUMNS, tl.num_programs(0)):
        expert, place, exists = _rows_of_tile(tile // COLUMNS, lane, tiles, ends, first_ptr, count_ptr, BM)
        pair = tl.load(order_ptr + place, mask=exists, other=0)
        turn = tl.arange(0, PARTS * BN)
        feature = tile % COLUMNS * BN + turn // PARTS
        x_row = pair // TOP_K if GATED else place
        y = product(
            x_ptr,
            x_row.to(tl.int64) * DEPTH,
            exists,
            codes_ptr + expert * codes_stride,
            scales_ptr + expert * scales_stride,
            minima_ptr + expert * minima_stride,
            feature + turn % PARTS * WIDTH,
            feature < WIDTH,
            DEPTH,
            BITS,
            GROUP,
            HAS_MINIMA,
            BM,
            PARTS * BN,
            BK,
        )
        y_row = pair
        if GATED:
            gate, up = tl.split(tl.reshape(y, (BM, BN, 2)))
            y = gate / (1.0 + tl.exp(-gate)) * up
            y_row = place
        column = tile % COLUMNS * BN + tl.arange(0, BN)
        at = y_ptr + y_row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=exists[:, None] & (column < WIDTH)[None, :])


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
    total = tl.zeros((BM, BN), tl.float32)
    if BITS == 0:
        for begin in range(0, DEPTH, BK):
            depth = begin + tl.arange(0, BK)
            inside = depth < DEPTH
            x = tl.load(x_ptr + x_at[:, None] + depth[None, :], mask=x_exists[:, None] & inside[None, :], other=0.0)
            w_at = codes_ptr + row[None, :] * DEPTH + depth[:, None]
            w = tl.load(w_at, mask=row_exists[None, :] & inside[:, None], other=0)
            total = tl.dot(x, w, total, input_precision="ieee")
    else:
        WORDS: tl.constexpr = DEPTH * BITS // 32  # of a row
        STEP: tl.constexpr = BK * BITS // 32 if BK * BITS >= 512 else 16  # a product takes no fewer
        panel = row // 16
        lane = row % 16
        for begin in range(0, WORDS, STEP):
            word = begin + tl.arange(0, STEP)
            inside = word < WORDS
            there = row_exists[None, :] & inside[:, None]
            x_there = x_exists[:, None] & inside[None, :]
            codes_at = (panel * (16 * WORDS) + lane)[None, :] + word[:, None] * 16
            codes = tl.load(codes_ptr + codes_at, mask=there, other=0)
            if BITS == 8:
                # Byte b of word q of a row is its code 4 q + b, so that each b is a product over every fourth feature.
                x_ptrs = x_ptr + x_at[:, None] + word[None, :] * 4
                for byte in tl.static_range(4):
                    x = tl.load(x_ptrs + byte, mask=x_there, other=0.0)
                    code = (codes << (24 - 8 * byte)) >> 24
                    total = tl.dot(x, code.to(x.dtype), total, input_precision="ieee")
            else:
                # Byte b of word q of a group holds its codes 4 q + b (low half) and GROUP / 2 + 4 q + b (high half).
                group = word // (GROUP // 8)
                of_group = (panel * (DEPTH // GROUP * 16) + lane)[None, :] + group[:, None] * 16
                scale = tl.load(scales_ptr + of_group, mask=there, other=0.0).to(tl.float32)
                least = -8.0 * scale
                if HAS_MINIMA:
                    least = tl.load(minima_ptr + of_group, mask=there, other=0.0).to(tl.float32)
                x_ptrs = x_ptr + x_at[:, None] + (group * GROUP + word % (GROUP // 8) * 4)[None, :]
                for half in tl.static_range(2):
                    for byte in tl.static_range(4):
                        x = tl.load(x_ptrs + (half * (GROUP // 2) + byte), mask=x_there, other=0.0)
                        code = (codes >> (8 * byte + 4 * half)) & 15
                        weight = code.to(tl.float32) * scale + least
                        total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
        if BITS == 8:
            total = total * tl.load(scales_ptr + row, mask=row_exists, other=0.0)[None, :]
    return total
