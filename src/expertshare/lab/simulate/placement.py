"""Recorded routing as blocks of tokens, which steps are drawn from; which GPU of a replica holds which experts
of a layer; and what steps then ask of it: which GPU computes what, and sends how many tokens to which.

Shape legend, here and in the other files of this package: N recorded MoE layers, X blocks of a record, L tokens of a
block, K experts of a token, E experts, S slots (for one expert each; more than E where some have copies), R ranks (GPUs
of a replica), P simulated steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertshare.errors import ConfigError, InputError, nearest
from expertshare.experts.recording import RoutingRecord, TokenExperts

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BlockTrace:
    """experts_NXLK: int64, the experts of every token, -1 where a token has fewer. label: what to call it."""

    label: str
    num_experts: int
    experts_NXLK: Ints

    def load_NE(self) -> Ints:
        """(token, expert) pairs of every layer and expert."""
        flat = self.experts_NXLK.reshape(len(self.experts_NXLK), -1)
        return np.stack([np.bincount(ids[ids >= 0], minlength=self.num_experts) for ids in flat])

    def mean_unique(self) -> float:
        """Experts that a block uses in a layer, mean over blocks and layers."""
        blocks = self.experts_NXLK.reshape(-1, *self.experts_NXLK.shape[2:])
        return float(np.mean([len(np.unique(block[block >= 0])) for block in blocks]))


def cut_into_blocks(record: RoutingRecord, block_length: int, label: str) -> BlockTrace:
    """The blocks of every forward of a record, prefill and commit included; those of nothing but padding left out.

    Raises InputError for a record without tokens, or whose forwards are no whole blocks.
    """
    if not record.tokens:
        raise InputError(
            f"the routing record {label} says which experts a forward used, but not which token used them: record it "
            "again with this version's `generate --record-routing`"
        )
    most = max(len(ids) for layers in record.tokens for tokens in layers for ids in tokens)
    forwards = [_forward(layers, block_length, most, label) for layers in record.tokens]
    blocks_NXLK = np.concatenate(forwards, axis=1)
    live_X = (blocks_NXLK >= 0).any(axis=(0, 2, 3))
    if not live_X.any():
        raise InputError(f"the routing record {label} holds nothing but padding: record a generation with a prompt")
    return BlockTrace(label, record.num_experts, blocks_NXLK[:, live_X])


def _forward(layers: Sequence[TokenExperts], block_length: int, most: int, label: str) -> Ints:
    num_tokens = len(layers[0])
    if num_tokens % block_length:
        raise InputError(
            f"a forward of the routing record {label} has {num_tokens} tokens, expected a multiple of the block length "
            f"{block_length}: give the block length that it was recorded with (--block-length)"
        )
    padded = [[(*ids, *(-1,) * (most - len(ids))) for ids in tokens] for tokens in layers]
    return np.asarray(padded, dtype=np.int64).reshape(len(layers), -1, block_length, most)


@dataclass(frozen=True, slots=True)
class Placement:
    """expert_of_S: the expert in every slot; rank_of_S: the GPU that has the slot. Every expert has a slot, some have
    several: its tokens alternate between these."""

    expert_of_S: Ints
    rank_of_S: Ints
    num_ranks: int

    def slots_of(self, experts_XLK: Ints) -> Ints:
        """The slot that each token goes to for each of its experts; -1 where it has none. Token l of a block takes copy
        l mod copies."""
        order = np.argsort(self.expert_of_S, kind="stable")
        copies_E = np.bincount(self.expert_of_S)
        first_E = np.cumsum(copies_E) - copies_E
        token_L = np.arange(experts_XLK.shape[1])[None, :, None]
        safe = np.maximum(experts_XLK, 0)
        slots = order[first_E[safe] + token_L % copies_E[safe]]
        return np.where(experts_XLK < 0, -1, slots)

    def most_slots(self) -> int:
        """Slots of the GPU that has most."""
        return int(np.bincount(self.rank_of_S, minlength=self.num_ranks).max())


PLACEMENTS = ("round-robin", "balanced", "replicated")


def place(name: str, load_E: Ints, num_ranks: int, num_copies: int) -> Placement:
    """Experts of one layer on `num_ranks` GPUs. Raises ConfigError for an unknown name, InputError for GPUs or copies
    that cannot be.

    round-robin: expert e on GPU e mod R, whatever its load. balanced: the heaviest experts first, each to the GPU with
    the least load that has a slot free; as many on each GPU. replicated: as balanced, and `num_copies` more slots, each
    for the expert that is busiest per copy by then.
    """
    if name not in PLACEMENTS:
        raise ConfigError(f"unknown placement {name!r}. {nearest(name, PLACEMENTS)}")
    if num_copies < 0:
        raise InputError(f"copies of experts must be at least 0, got {num_copies}")
    if not 1 <= num_ranks <= len(load_E) + num_copies:
        raise InputError(
            f"the expert-parallel degree must lie in 1..{len(load_E) + num_copies} (experts of a layer and their "
            f"copies), got {num_ranks}"
        )
    if num_copies and name != "replicated":
        raise InputError(f"{name} makes no copies of experts, got {num_copies}: leave --copies out, or replicate")
    experts = np.arange(len(load_E))
    if name == "round-robin":
        return Placement(experts, experts % num_ranks, num_ranks)
    copies_E = np.ones(len(load_E), dtype=np.int64)
    for _ in range(num_copies):
        may_grow = copies_E < num_ranks  # a second copy on the same GPU helps nobody
        if not may_grow.any():
            break
        copies_E[np.argmax(np.where(may_grow, load_E / copies_E, -1.0))] += 1
    expert_of_S = np.repeat(experts, copies_E)
    return _lightest_first(expert_of_S, (load_E / copies_E)[expert_of_S], num_ranks)


def _lightest_first(expert_of_S: Ints, load_S: NDArray[np.float64], num_ranks: int) -> Placement:
    most = math.ceil(len(expert_of_S) / num_ranks)
    rank_of_S = np.zeros(len(expert_of_S), dtype=np.int64)
    load_R, count_R = np.zeros(num_ranks), np.zeros(num_ranks, dtype=np.int64)
    holds: list[set[int]] = [set() for _ in range(num_ranks)]
    for slot in np.argsort(-load_S, kind="stable"):
        expert = int(expert_of_S[slot])
        fresh_R = np.array([expert not in held for held in holds])
        open_R = count_R < most
        choice_R = open_R & fresh_R if (open_R & fresh_R).any() else open_R
        rank = int(np.argmin(np.where(choice_R, load_R, np.inf)))
        rank_of_S[slot] = rank
        load_R[rank] += load_S[slot]
        count_R[rank] += 1
        holds[rank].add(expert)
    return Placement(expert_of_S, rank_of_S, num_ranks)


@dataclass(frozen=True, slots=True)
class LayerSteps:
    """One layer over P steps. unique_PR: experts that each GPU has to read; pairs_PR: (token, expert) pairs it
    computes; tokens_PRR: tokens of GPU h (first) that have any expert on GPU r (second), each counted once."""

    unique_PR: Ints
    pairs_PR: Ints
    tokens_PRR: Ints


def draw_blocks(num_blocks: int, *, num_ranks: int, per_rank: int, steps: int, seed: int) -> Ints:
    """Which recorded blocks are at work [P, R, per_rank]: drawn evenly, with repetition, the same for a seed."""
    return np.random.default_rng(seed).integers(num_blocks, size=(steps, num_ranks, per_rank))


def run_layer(experts_XLK: Ints, placement: Placement, draws_PRB: Ints) -> LayerSteps:
    """What one layer asks of every GPU in every step."""
    slots_XLK, ranks = placement.slots_of(experts_XLK), placement.num_ranks
    num_blocks, length, _ = slots_XLK.shape
    used = slots_XLK >= 0
    block, token, _ = np.nonzero(used)
    slots = slots_XLK[used]
    rank = placement.rank_of_S[slots]
    member_XS = np.zeros((num_blocks, len(placement.rank_of_S)), dtype=np.bool_)
    member_XS[block, slots] = True
    pairs_XR = np.zeros((num_blocks, ranks), dtype=np.int64)
    np.add.at(pairs_XR, (block, rank), 1)
    visits_XLR = np.zeros((num_blocks, length, ranks), dtype=np.bool_)
    visits_XLR[block, token, rank] = True
    tokens_XR = visits_XLR.sum(axis=1)
    unique, pairs, tokens = [], [], []
    for draw_RB in draws_PRB:
        active_S = member_XS[np.unique(draw_RB)].any(axis=0)
        unique.append(np.bincount(placement.rank_of_S[active_S], minlength=ranks))
        times_RX = np.stack([np.bincount(row, minlength=num_blocks) for row in draw_RB])
        pairs.append(times_RX.sum(axis=0) @ pairs_XR)
        tokens.append(times_RX @ tokens_XR)
    return LayerSteps(np.stack(unique), np.stack(pairs), np.stack(tokens))
