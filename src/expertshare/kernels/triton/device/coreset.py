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


@triton.jit(do_not_specialize=["size", "share_bits", "saturation_bits"])
def coreset_kernel(
    choice_ptr,
    affinity_ptr,
    live_ptr,
    masked_ptr,
    previous_ptr,
    member_ptr,
    keys_ptr,
    mass_ptr,
    used_ptr,
    unique_ptr,
    active_ptr,
    load_ptr,
    length,
    size,
    share_bits,
    saturation_bits,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RANKING: tl.constexpr,
    FRONT: tl.constexpr,
    WHOLE_FRONT: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    ONLY_MASKED: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    NGP: tl.constexpr,
    GSP: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS_AT_A_TIME: tl.constexpr,
):
    """Writes member [G, E], and zeros into what plan_kernel adds to: used [G, E], unique [G], active [E] and load [E].

    The fields of routing.rule.SharingRule. RANKING 0: all, 1: votes, 2: highest, 3: coverage. masked [G, L] with
    ONLY_MASKED, previous [G, E] with HAS_PREVIOUS. Scratch: keys [G, LANES]; mass float64 [G, L, LANES + 1] with
    RANKING 3. share_bits, saturation_bits: a float64 as an integer: Triton would round a float argument to float32,
    and a share on the edge would cut elsewhere. KEYS_AT_A_TIME divides LANES: every expert is compared with so many
    others together, because all of 256 would not fit into registers.
    """
    LANES: tl.constexpr = NGP * GSP
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    expert, exists = experts_of_lanes(lane, NUM_EXPERTS // NUM_GROUPS, GSP, NUM_GROUPS)
    _clear(used_ptr, unique_ptr, active_ptr, load_ptr, group, expert, exists, NUM_EXPERTS)
    member = exists
    if RANKING != 0:
        masked_voters = 0
        if ONLY_MASKED:
            masked_voters = _masked_and_live(live_ptr, masked_ptr, group, length, TOKENS)
        votes = tl.zeros((LANES,), tl.float64)
        voted = tl.zeros((LANES,), tl.int32)
        first_choice = tl.zeros((LANES,), tl.int32)
        highest = tl.full((LANES,), -float("inf"), tl.float32)
        for begin in range(0, length, TOKENS):
            place = begin + tl.arange(0, TOKENS)
            token = group * length + place
            voter = tl.load(live_ptr + token, mask=place < length, other=0) != 0
            if ONLY_MASKED:
                masked = tl.load(masked_ptr + token, mask=place < length, other=0) != 0
                voter = voter & (masked | (masked_voters == 0))
            row = token[:, None] * NUM_EXPERTS + expert[None, :]
            choice = tl.load(choice_ptr + row, mask=voter[:, None] & exists[None, :], other=-float("inf"))
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
                if RANKING == 3:
                    affinity = tl.load(affinity_ptr + row, mask=cast > 0, other=0.0)
                    mass = _units(affinity)
                    votes += tl.sum(mass, axis=0)
                    mass_at = mass_ptr + token[:, None] * (LANES + 1) + lane[None, :]
                    tl.store(mass_at, mass, mask=(place < length)[:, None])
                    saturation = saturation_bits.to(tl.int64).to(tl.float64, bitcast=True)
                    wanted = tl.floor(tl.sum(mass, axis=1) * saturation)
                    tl.store(mass_ptr + token * (LANES + 1) + LANES, wanted, mask=place < length)
                else:
                    votes += tl.sum(tl.where(cast > 0, choice, 0.0).to(tl.float64), axis=0)
                    voted = tl.maximum(voted, tl.max(cast, axis=0))
        if RANKING == 3:
            member = _cover(mass_ptr + group * length * (LANES + 1), votes, exists, length, size, LANES, TOKENS)
        else:
            score = highest
            if RANKING == 1:
                score = tl.where(voted > 0, votes.to(tl.float32), -float("inf"))
            key = ranking_keys(score, lane, exists, LANES)
            keys_at = keys_ptr + group * LANES
            if HAS_SHARE:
                tl.store(keys_at + lane, key)
                tl.debug_barrier()  # what follows reads what other threads of this program wrote
                in_prefix = _in_prefix(key, keys_at, share_bits, LANES, KEYS_AT_A_TIME)
            if FRONT > 0:
                tl.debug_barrier()
                key += tl.where(exists, first_choice, 0).to(tl.int64) << 48
            if FRONT > 0 or not HAS_SHARE:
                tl.store(keys_at + lane, key)
                tl.debug_barrier()
            count = size
            if WHOLE_FRONT:
                count = tl.maximum(count, tl.sum(first_choice, axis=0))
            ahead = tl.zeros((LANES,), tl.int32)
            for begin in range(0, LANES, KEYS_AT_A_TIME):
                other = tl.load(keys_at + begin + tl.arange(0, KEYS_AT_A_TIME))
                ahead += tl.sum((other[None, :] > key[:, None]).to(tl.int32), axis=1)
            member = ahead < count
            if HAS_SHARE:
                member = member | in_prefix
    if HAS_PREVIOUS:
        kept = tl.load(previous_ptr + group * NUM_EXPERTS + expert, mask=exists, other=0) != 0
        keeps = tl.max(kept.to(tl.int32), axis=0) > 0
        member = (kept & keeps) | (member & (keeps == 0))
    tl.store(member_ptr + group * NUM_EXPERTS + expert, member, mask=exists)


@triton.jit
def _masked_and_live(live_ptr, masked_ptr, group, length, TOKENS: tl.constexpr):
    """How many tokens of the group are live and still to be decided."""
    count = tl.zeros((TOKENS,), tl.int32)
    for begin in range(0, length, TOKENS):
        place = begin + tl.arange(0, TOKENS)
        live = tl.load(live_ptr + group * length + place, mask=place < length, other=0) != 0
        masked = tl.load(masked_ptr + group * length + place, mask=place < length, other=0) != 0
        count += (live & masked).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def _units(affinity):
    """Whole units of mass in float64, as routing.select.mass_of_ballots counts them; 0 for NaN."""
    known = tl.where(affinity == affinity, affinity, 0.0).to(tl.float64)
    return (known * 4294967296.0 + 6755399441055744.0) - 6755399441055744.0  # beyond 2^52 only whole numbers are left


@triton.jit
def _cover(mass_at, votes, exists, length, size, LANES: tl.constexpr, TOKENS: tl.constexpr):
    """routing.select.greedy_cover: member [LANES]. mass_at: a row of masses per token, and what it still wants."""
    lane = tl.arange(0, LANES)
    member = lane < 0
    taken = -1
    for _ in range(size):
        gains = tl.zeros((LANES,), tl.float64)
        tl.debug_barrier()
        for begin in range(0, length, TOKENS):
            place = begin + tl.arange(0, TOKENS)
            row = place[:, None] * (LANES + 1)
            mass = tl.load(mass_at + row + lane[None, :], mask=(place < length)[:, None], other=0.0)
            wanted = tl.load(mass_at + place * (LANES + 1) + LANES, mask=place < length, other=0.0)
            covered = tl.sum(tl.where(lane[None, :] == taken, mass, 0.0), axis=1)
            wanted = tl.maximum(wanted - covered, 0.0)
            tl.debug_barrier()
            tl.store(mass_at + place * (LANES + 1) + LANES, wanted, mask=place < length)
            left = tl.where(member[None, :], 0.0, mass)
            gains += tl.sum(tl.minimum(left, wanted[:, None]), axis=0)
        gains = tl.where(tl.max(gains, axis=0) > 0.0, gains, votes)
        gains = tl.where(exists & (member == 0), gains, -1.0)
        taken = tl.min(tl.where(gains == tl.max(gains, axis=0), lane, LANES), axis=0)
        member = member | (lane == taken)
    return member


@triton.jit
def _clear(used_ptr, unique_ptr, active_ptr, load_ptr, group, expert, exists, NUM_EXPERTS: tl.constexpr):
    tl.store(used_ptr + group * NUM_EXPERTS + expert, 0, mask=exists)
    tl.store(unique_ptr + group, 0)
    if group == 0:
        tl.store(active_ptr + expert, False, mask=exists)
        tl.store(load_ptr + expert, 0, mask=exists)


@triton.jit
def _in_prefix(key, keys_at, share_bits, LANES: tl.constexpr, KEYS_AT_A_TIME: tl.constexpr):
    """Members of the shortest prefix of a ranking that passes the share: routing.select.shortest_prefix."""
    share = share_bits.to(tl.int64).to(tl.float64, bitcast=True)
    score = scores_of_keys(key)
    ahead = tl.zeros((LANES,), tl.float64)
    for begin in range(0, LANES, KEYS_AT_A_TIME):
        other = tl.load(keys_at + begin + tl.arange(0, KEYS_AT_A_TIME))
        ahead += tl.sum(tl.where(other[None, :] > key[:, None], _mass(scores_of_keys(other))[None, :], 0.0), axis=1)
    total = tl.where(share == 1.0, float("inf"), share * tl.sum(_mass(score), axis=0))  # 1: all, whatever the rounding
    return (ahead <= total) & (score > -float("inf"))


@triton.jit
def _mass(score):
    return tl.maximum(score, 0.0).to(tl.float64)
