"""Scores to coresets, one program per sharing group; then coresets to a plan, in programs of a few tokens.

Scores become integers that order as routing.ranking orders them, ties included. A tile has one row per token and EP
lanes, EP a power of two. Lanes hold experts in the order of their ids, group by group: lane = group * GSP + place, with
GSP the size of a group rounded up to a power of two. Lanes without an expert rank behind everything.
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
    tl.store(used_ptr + group * NUM_EXPERTS + expert, 0, mask=exists)
    tl.store(unique_ptr + group, 0)
    if group == 0:
        tl.store(active_ptr + expert, False, mask=exists)
        tl.store(load_ptr + expert, 0, mask=exists)
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


@triton.jit(do_not_specialize=["slots", "drop_bits"])
def plan_kernel(
    choice_ptr,
    affinity_ptr,
    live_ptr,
    member_ptr,
    expert_scale_ptr,
    ids_ptr,
    weights_ptr,
    active_ptr,
    load_ptr,
    used_ptr,
    unique_ptr,
    length,
    slots,
    drop_bits,
    scaling,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_KP: tl.constexpr,
    HAS_DROP: tl.constexpr,
    RENORMALISE: tl.constexpr,
    HAS_EXPERT_SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    NGP: tl.constexpr,
    GSP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Writes ids [T, K] and weights [T, K]; adds to active [E], load [E], used [G, E] and unique [G], which
    coreset_kernel has cleared. Additions are of integers: their order leaves no trace.

    slots: of the K that a token keeps. drop_bits: float64 as an integer, see coreset_kernel.
    """
    LANES: tl.constexpr = NGP * GSP
    group = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    token = group * length + place
    exists_token = place < length
    lane = tl.arange(0, LANES)
    expert, exists = experts_of_lanes(lane, NUM_EXPERTS // NUM_GROUPS, GSP, NUM_GROUPS)
    live = tl.load(live_ptr + token, mask=exists_token, other=0) != 0
    member = tl.load(member_ptr + group * NUM_EXPERTS + expert, mask=exists, other=0) != 0
    usable = live[:, None] & member[None, :]
    row = token[:, None] * NUM_EXPERTS + expert[None, :]
    choice = tl.load(choice_ptr + row, mask=usable, other=-float("inf"))
    affinity = tl.load(affinity_ptr + row, mask=usable, other=0.0)
    if KEPT < NUM_GROUPS:
        choice = within_reach(choice, TOKENS, NUM_GROUPS, NGP, GSP, KEPT)
    key = ranking_keys(choice, lane[None, :], exists[None, :], LANES)
    slot = tl.arange(0, TOP_KP)[None, :]
    ids = tl.full((TOKENS, TOP_KP), -1, tl.int32)
    weight = tl.zeros((TOKENS, TOP_KP), tl.float32)
    for rank in tl.static_range(TOP_K):
        best = tl.max(key, axis=1)[:, None]
        hit = (key == best) & (best > NEVER_KEY)
        found = tl.max(tl.where(hit, expert[None, :], -1), axis=1)[:, None]
        ids = tl.where(slot == rank, found, ids)
        weight = tl.where(slot == rank, tl.sum(tl.where(hit, affinity, 0.0), axis=1)[:, None], weight)
        key = tl.where(hit, -1, key)
    kept = slot < slots
    weight = tl.where(kept, weight, 0.0)
    if HAS_DROP:
        kept = kept & _heavy(weight, slot, drop_bits, TOKENS, TOP_K, TOP_KP)
    ids = tl.where(kept, ids, -1)
    used = ids >= 0
    weight = tl.where(used, weight, 0.0)
    if RENORMALISE:
        weight = tl.div_rn(weight, tl.broadcast_to(_sum_of_slots(weight, slot, TOP_K), (TOKENS, TOP_KP)) + 1e-20)
    weight = weight * scaling
    if HAS_EXPERT_SCALE:
        weight = weight * tl.load(expert_scale_ptr + ids, mask=used, other=0.0)
    at = token[:, None] * TOP_K + slot
    inside = exists_token[:, None] & (slot < TOP_K)
    tl.store(ids_ptr + at, ids.to(tl.int64), mask=inside)
    tl.store(weights_ptr + at, weight, mask=inside)
    tl.store(active_ptr + ids, used, mask=used)
    tl.atomic_add(load_ptr + ids, used.to(tl.int64), mask=used, sem="relaxed")
    seen = tl.atomic_xchg(used_ptr + group * NUM_EXPERTS + ids, used.to(tl.int32), mask=used, sem="relaxed")
    fresh = used & (seen == 0)
    tl.atomic_add(unique_ptr + group, tl.sum(tl.sum(fresh.to(tl.int64), axis=1), axis=0), sem="relaxed")


@triton.jit
def _sum_of_slots(weight, slot, TOP_K: tl.constexpr):
    """[TOKENS, 1], the slots in an order that depends on K alone: weights do not depend on a token's neighbours."""
    total = tl.sum(tl.where(slot == 0, weight, 0.0), axis=1)
    for rank in tl.static_range(1, TOP_K):
        total += tl.sum(tl.where(slot == rank, weight, 0.0), axis=1)
    return total[:, None]


@triton.jit
def _heavy(weight, slot, drop_bits, TOKENS: tl.constexpr, TOP_K: tl.constexpr, TOP_KP: tl.constexpr):
    """routing.assign.drop_lightest, in its order of addition: from the lightest up, of equals the last slot first."""
    share = drop_bits.to(tl.int64).to(tl.float64, bitcast=True)
    mass = weight.to(tl.float64)
    total = tl.zeros((TOKENS,), tl.float64)
    for rank in tl.static_range(TOP_K):
        total += tl.sum(tl.where(slot == rank, mass, 0.0), axis=1)
    part = mass / tl.broadcast_to(tl.maximum(total, 1e-20)[:, None], (TOKENS, TOP_KP))
    waiting = tl.broadcast_to(slot < TOP_K, (TOKENS, TOP_KP))
    kept = tl.zeros((TOKENS, TOP_KP), tl.int32)
    upto = tl.zeros((TOKENS,), tl.float64)
    for rank in tl.static_range(TOP_K):
        least = tl.min(tl.where(waiting, part, float("inf")), axis=1)
        last = tl.max(tl.where(waiting & (part == least[:, None]), slot, -1), axis=1)
        upto += least
        one = slot == last[:, None]
        heavy = (upto >= share) | (rank == TOP_K - 1)
        kept = tl.where(one & heavy[:, None], 1, kept)
        waiting = waiting & (slot != last[:, None])
    return kept > 0
