"""Steps of a replica put together from recorded blocks: who computes what, and who sends how many tokens to whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expertshare.lab.simulate.placement import Placement
from expertshare.lab.simulate.trace import Bools, Ints


@dataclass(frozen=True, slots=True)
class LayerSteps:
    """One layer over P steps. unique_PR: experts that each GPU has to read; pairs_PR: (token, expert) pairs it
    computes; tokens_PRR: tokens of GPU h (first) that have any expert on GPU r (second), each counted once."""

    unique_PR: Ints
    pairs_PR: Ints
    tokens_PRR: Ints


@dataclass(frozen=True, slots=True)
class _BlockLoads:
    member_XS: Bools
    pairs_XR: Ints
    tokens_XR: Ints


def draw_blocks(num_blocks: int, *, num_ranks: int, per_rank: int, steps: int, seed: int) -> Ints:
    """Which recorded blocks are at work [P, R, per_rank]: drawn evenly, with repetition, the same for a seed."""
    return np.random.default_rng(seed).integers(num_blocks, size=(steps, num_ranks, per_rank))


def run_layer(experts_XLK: Ints, placement: Placement, draws_PRB: Ints) -> LayerSteps:
    """What one layer asks of every GPU in every step."""
    loads, ranks = _block_loads(experts_XLK, placement), placement.num_ranks
    unique, pairs, tokens = [], [], []
    for draw_RB in draws_PRB:
        drawn = np.unique(draw_RB)
        active_S = loads.member_XS[drawn].any(axis=0)
        unique.append(np.bincount(placement.rank_of_S[active_S], minlength=ranks))
        times_RX = np.stack([np.bincount(row, minlength=len(loads.pairs_XR)) for row in draw_RB])
        pairs.append(times_RX.sum(axis=0) @ loads.pairs_XR)
        tokens.append(times_RX @ loads.tokens_XR)
    return LayerSteps(np.stack(unique), np.stack(pairs), np.stack(tokens))


def _block_loads(experts_XLK: Ints, placement: Placement) -> _BlockLoads:
    slots_XLK = placement.slots_of(experts_XLK)
    num_blocks, length, _ = slots_XLK.shape
    used = slots_XLK >= 0
    block, token, _ = np.nonzero(used)
    slots = slots_XLK[used]
    rank = placement.rank_of_S[slots]
    member_XS = np.zeros((num_blocks, len(placement.rank_of_S)), dtype=np.bool_)
    member_XS[block, slots] = True
    pairs_XR = np.zeros((num_blocks, placement.num_ranks), dtype=np.int64)
    np.add.at(pairs_XR, (block, rank), 1)
    visits_XLR = np.zeros((num_blocks, length, placement.num_ranks), dtype=np.bool_)
    visits_XLR[block, token, rank] = True
    return _BlockLoads(member_XS, pairs_XR, visits_XLR.sum(axis=1))
