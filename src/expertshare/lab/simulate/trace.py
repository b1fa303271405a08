"""Recorded routing as blocks of tokens: the supply that simulated steps are drawn from.

Shape legend, here and in the other files of this package: N recorded MoE layers, X blocks of a record, L tokens of a
block, K experts of a token, E experts, S slots (for one expert each; more than E where some have copies), R ranks (GPUs
of a replica), P simulated steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertshare.errors import InputError
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
