"""Ranking with exact ties on the device: scores become integers that order as routing.ranking orders them.

A tile has one row per token and EP lanes, EP a power of two. Lanes hold experts in the order of their ids, group by
group: lane = group * GSP + place, with GSP the size of a group rounded up to a power of two. Lanes without an expert
rank behind everything.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER_KEY = tl.constexpr((0x007FFFFF << 16) | 0xFFFF)
"""The highest key of a score of -inf: whatever can be chosen lies above."""


@triton.jit
def experts_of_lanes(lane, GROUP_SIZE: tl.constexpr, GSP: tl.constexpr, NUM_GROUPS: tl.constexpr):
    """The expert of each lane, and whether there is one."""
    place = lane % GSP
    group = lane // GSP
    return group * GROUP_SIZE + place, (place < GROUP_SIZE) & (group < NUM_GROUPS)


@triton.jit
def ranking_keys(score, lane, exists, LANES: tl.constexpr):
    """int64 keys, all different, at least 0: larger for a larger score, of equal scores for the lower lane.

    score: float32, -inf allowed, NaN not; 0.0 and -0.0 tie. -1 where there is no expert. LANES at most 65536.
    """
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64) + 2147483648
    return tl.where(exists, (ordered << 16) | (LANES - 1 - lane).to(tl.int64), -1)


@triton.jit
def scores_of_keys(key):
    """The scores that keys were made of; -inf where there was no expert."""
    ordered = tl.where(key < 0, 0, ((key >> 16) & 0xFFFFFFFF) - 2147483648).to(tl.int32)
    bits = tl.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF)
    return tl.where(key < 0, -float("inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def within_reach(
    score, ROWS: tl.constexpr, NUM_GROUPS: tl.constexpr, NGP: tl.constexpr, GSP: tl.constexpr, KEPT: tl.constexpr
):
    """Scores [ROWS, NGP * GSP], -inf outside each row's KEPT best groups (routing.assign.limit_to_groups)."""
    never = -float("inf")
    grouped = tl.reshape(score, (ROWS, NGP, GSP))
    best = tl.max(grouped, axis=2)
    total = best
    if GSP > 1:
        at_best = grouped == best[:, :, None]
        several = tl.sum(at_best.to(tl.int32), axis=2) > 1
        total = best + tl.where(several, best, tl.max(tl.where(at_best, never, grouped), axis=2))
    group = tl.arange(0, NGP)[None, :]
    key = ranking_keys(total, group, group < NUM_GROUPS, NGP)
    ahead = tl.sum((key[:, None, :] > key[:, :, None]).to(tl.int32), axis=2)
    kept = (ahead < KEPT)[:, :, None]
    return tl.reshape(tl.where(kept, grouped, never), (ROWS, NGP * GSP))
