"""Coreset -> plan: every token's K best experts inside its coreset, their weights, and what the layer asks for."""

from __future__ import annotations

import triton
import triton.language as tl

from expertshare.kernels.triton.device.ranking import NEVER_KEY, experts_of_lanes, ranking_keys, within_reach


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
