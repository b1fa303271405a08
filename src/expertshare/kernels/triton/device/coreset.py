"""Scores of a block -> its coreset: one program per sharing group, in one pass over its tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from expertshare.kernels.triton.device.ranking import (
    NEVER_KEY,
    experts_of_lanes,
    ranking_keys,
    scores_of_keys,
    within_reach,
)


@triton.jit(do_not_specialize=["size", "share_bits"])
def coreset_kernel(
    choice_ptr,
    live_ptr,
    member_ptr,
    keys_ptr,
    used_ptr,
    unique_ptr,
    active_ptr,
    load_ptr,
    length,
    size,
    share_bits,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RANKING: tl.constexpr,
    FRONT: tl.constexpr,
    WHOLE_FRONT: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    NGP: tl.constexpr,
    GSP: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS_AT_A_TIME: tl.constexpr,
):
    """Writes member [G, E], keys [G, LANES] (scratch), and zeros into what plan_kernel adds to: used [G, E],
    unique [G], active [E] and load [E].

    RANKING 0: all, 1: votes, 2: highest. share_bits: the share's float64, as an integer: Triton would round a
    float argument to float32, and a share on the edge would cut elsewhere. KEYS_AT_A_TIME divides LANES: every expert
    is compared with so many others together, because all of 256 would not fit into registers.
    """
    LANES: tl.constexpr = NGP * GSP
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    expert, exists = experts_of_lanes(lane, NUM_EXPERTS // NUM_GROUPS, GSP, NUM_GROUPS)
    _clear(used_ptr, unique_ptr, active_ptr, load_ptr, group, expert, exists, NUM_EXPERTS)
    member_at = member_ptr + group * NUM_EXPERTS + expert
    if RANKING == 0:
        tl.store(member_at, exists, mask=exists)
    else:
        votes = tl.zeros((LANES,), tl.float64)
        voted = tl.zeros((LANES,), tl.int32)
        first_choice = tl.zeros((LANES,), tl.int32)
        highest = tl.full((LANES,), -float("inf"), tl.float32)
        for begin in range(0, length, TOKENS):
            place = begin + tl.arange(0, TOKENS)
            token = group * length + place
            live = tl.load(live_ptr + token, mask=place < length, other=0) != 0
            choice = tl.load(
                choice_ptr + token[:, None] * NUM_EXPERTS + expert[None, :],
                mask=live[:, None] & exists[None, :],
                other=-float("inf"),
            )
            if RANKING == 2:
                highest = tl.maximum(highest, tl.max(choice, axis=0))
            else:
                reach = choice
                if KEPT < NUM_GROUPS:
                    reach = within_reach(choice, TOKENS, NUM_GROUPS, NGP, GSP, KEPT)
                key = ranking_keys(reach, lane[None, :], exists[None, :], LANES)
                cast = tl.zeros((TOKENS, LANES), tl.int32)
                for rank in tl.static_range(TOP_K):
                    best = tl.max(key, axis=1)[:, None]
                    hit = (key == best) & (best > NEVER_KEY)
                    cast = tl.where(hit, 1, cast)
                    key = tl.where(hit, -1, key)
                    if rank + 1 == FRONT:
                        first_choice = tl.maximum(first_choice, tl.max(cast, axis=0))
                votes += tl.sum(tl.where(cast > 0, choice, 0.0).to(tl.float64), axis=0)
                voted = tl.maximum(voted, tl.max(cast, axis=0))
        score = highest
        if RANKING == 1:
            score = tl.where(voted > 0, votes.to(tl.float32), -float("inf"))
        key = ranking_keys(score, lane, exists, LANES)
        if FRONT > 0:
            key += tl.where(exists, first_choice, 0).to(tl.int64) << 48
        keys_at = keys_ptr + group * LANES
        tl.store(keys_at + lane, key)
        tl.debug_barrier()  # the loop below reads what other threads of this program wrote
        count = size
        if WHOLE_FRONT:
            count = tl.maximum(count, tl.sum(first_choice, axis=0))
        if HAS_SHARE:
            count = tl.maximum(count, _prefix(key, keys_at, share_bits, LANES, KEYS_AT_A_TIME))
        place = tl.zeros((LANES,), tl.int32)
        for begin in range(0, LANES, KEYS_AT_A_TIME):
            other = tl.load(keys_at + begin + tl.arange(0, KEYS_AT_A_TIME))
            place += tl.sum((other[None, :] > key[:, None]).to(tl.int32), axis=1)
        tl.store(member_at, place < count, mask=exists)


@triton.jit
def _clear(used_ptr, unique_ptr, active_ptr, load_ptr, group, expert, exists, NUM_EXPERTS: tl.constexpr):
    tl.store(used_ptr + group * NUM_EXPERTS + expert, 0, mask=exists)
    tl.store(unique_ptr + group, 0)
    if group == 0:
        tl.store(active_ptr + expert, False, mask=exists)
        tl.store(load_ptr + expert, 0, mask=exists)


@triton.jit
def _prefix(key, keys_at, share_bits, LANES: tl.constexpr, KEYS_AT_A_TIME: tl.constexpr):
    """Length of the shortest prefix of a ranking that passes the share: routing.select.shortest_prefix."""
    share = share_bits.to(tl.int64).to(tl.float64, bitcast=True)
    score = scores_of_keys(key)
    ahead = tl.zeros((LANES,), tl.float64)
    for begin in range(0, LANES, KEYS_AT_A_TIME):
        other = tl.load(keys_at + begin + tl.arange(0, KEYS_AT_A_TIME))
        ahead += tl.sum(tl.where(other[None, :] > key[:, None], _mass(scores_of_keys(other))[None, :], 0.0), axis=1)
    total = tl.where(share == 1.0, float("inf"), share * tl.sum(_mass(score), axis=0))  # 1: all, whatever the rounding
    return tl.sum(((ahead <= total) & (score > -float("inf"))).to(tl.int32), axis=0)


@triton.jit
def _mass(score):
    return tl.maximum(score, 0.0).to(tl.float64)
