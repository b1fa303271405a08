"""Recorded steps as forwards: many snapshots of a row side by side, each seeing exactly what it saw in decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.models.runtime import ForwardInput
from expertshare.tuning.trajectories import Snapshot, Trajectory

MAX_POSITIONS = 8192  # positions in one forward


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """One forward over snapshots. scored_BS: positions that vanilla decided in the step; groups_G: sharing groups
    whose experts count, those of the snapshots."""

    inputs: ForwardInput
    scored_BS: Tensor
    groups_G: Tensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """A block of a row of a pack: a snapshot's, or final tokens (snapshot None), or masks where decoding is not yet."""

    block: int
    tokens_L: Tensor
    snapshot: Snapshot | None
    is_ahead: bool = False


def pack(trajectories: Sequence[Trajectory], config: ModelConfig) -> list[Pack]:
    """Forwards that run every snapshot once.

    Block-causal models: a row is [final blocks | snapshots]; a final block sees those before it and itself, as in the
    prefill and the commit forwards, and a snapshot sees the final blocks before it and itself, as in decoding with a
    cache. Full attention: a row is the whole canvas of one snapshot.
    """
    rows = [row for t in trajectories for row in (_full_rows(t, config) if _is_full(config) else [_causal_row(t)])]
    packs: list[Pack] = []
    batch: list[tuple[list[_Piece], int]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batch and (len(batch) + 1) * len(row[0]) * len(row[0][0].tokens_L) > MAX_POSITIONS:
            packs.append(_stack(batch, config))
            batch = []
        batch.append(row)
    if batch:
        packs.append(_stack(batch, config))
    return packs


def _is_full(config: ModelConfig) -> bool:
    return config.attention == "full"


def _causal_row(trajectory: Trajectory) -> tuple[list[_Piece], int]:
    length = trajectory.geometry.block_length
    blocks = trajectory.final_C.view(-1, length)
    finals = [_Piece(b, blocks[b], None) for b in range(max(s.block for s in trajectory.snapshots))]
    return finals + [_Piece(s.block, s.tokens_L, s) for s in trajectory.snapshots], trajectory.geometry.padding


def _full_rows(trajectory: Trajectory, config: ModelConfig) -> list[tuple[list[_Piece], int]]:
    length = trajectory.geometry.block_length
    blocks = trajectory.final_C.view(-1, length)
    masks_L = torch.full((length,), config.mask_id, device=blocks.device)
    rows: list[tuple[list[_Piece], int]] = []
    for snapshot in trajectory.snapshots:
        before = [_Piece(b, blocks[b], None) for b in range(snapshot.block)]
        after = [_Piece(b, masks_L, None, is_ahead=True) for b in range(snapshot.block + 1, len(blocks))]
        own = _Piece(snapshot.block, snapshot.tokens_L, snapshot)
        rows.append(([*before, own, *after], trajectory.geometry.padding))
    return rows


def _stack(batch: Sequence[tuple[list[_Piece], int]], config: ModelConfig) -> Pack:
    """Rows of blocks as one forward; dead blocks fill the shorter rows."""
    most, length = max(len(pieces) for pieces, _ in batch), len(batch[0][0][0].tokens_L)
    device = batch[0][0][0].tokens_L.device
    tokens = torch.full((len(batch), most, length), config.pad_id, device=device)
    block = torch.zeros(len(batch), most, dtype=torch.int64, device=device)
    is_snapshot, live = (torch.zeros(len(batch), most, dtype=torch.bool, device=device) for _ in range(2))
    scored, masked = (torch.zeros(len(batch), most, length, dtype=torch.bool, device=device) for _ in range(2))
    padding = torch.tensor([pad for _, pad in batch], device=device).view(-1, 1, 1)
    for row, (pieces, _) in enumerate(batch):
        for place, piece in enumerate(pieces):
            tokens[row, place], block[row, place], live[row, place] = piece.tokens_L, piece.block, True
            if piece.snapshot is not None:
                is_snapshot[row, place], scored[row, place] = True, piece.snapshot.written_L
                masked[row, place] = piece.snapshot.masked_L
            else:
                masked[row, place] = piece.is_ahead
    canvas = block.unsqueeze(2) * length + torch.arange(length, device=device)
    live_BS = (live.unsqueeze(2) & (canvas >= padding)).flatten(1)
    sees = live.unsqueeze(1).expand(-1, most, -1)
    if not _is_full(config):
        own = torch.eye(most, dtype=torch.bool, device=device)
        sees = own | (sees & ~is_snapshot.unsqueeze(1) & (block.unsqueeze(1) < block.unsqueeze(2)))
    mask_BSS = sees.repeat_interleave(length, 1).repeat_interleave(length, 2) & live_BS.unsqueeze(1)
    mask_BSS = mask_BSS | torch.eye(most * length, dtype=torch.bool, device=device)
    return Pack(
        inputs=ForwardInput(
            tokens_BS=tokens.flatten(1),
            positions_BS=(canvas - padding).clamp_min(0).flatten(1),
            live_BS=live_BS,
            mask_BSP=mask_BSS,
            block_length=length,
            masked_BS=masked.flatten(1),
        ),
        scored_BS=scored.flatten(1),
        groups_G=(live if _is_full(config) else is_snapshot).flatten(),
    )
