"""What vanilla did: the state of the current block before every denoising step, and what was written in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.decoding.forwards import Forwards
from expertshare.decoding.row import Row, RowGeometry, Window
from expertshare.evaluation.runner import Setup, decode_batches, own_policy
from expertshare.models import LoadedModel
from expertshare.models.runtime import ForwardInput


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One row before one denoising step. block: index on the canvas; step: from 0 in that block; tokens_L int64.

    masked_L: undecided positions; written_L: those of them that vanilla decided in this step.
    """

    block: int
    step: int
    tokens_L: Tensor
    masked_L: Tensor
    written_L: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One prompt's decoding. final_C: canvas after the last step, int64; snapshots in the order of decoding."""

    geometry: RowGeometry
    final_C: Tensor
    snapshots: tuple[Snapshot, ...]


class _Recorder:
    """Stands before the forwards of a stream and keeps what each denoising step starts from."""

    def __init__(self, forwards: Forwards) -> None:
        self._forwards = forwards
        self.seen: list[tuple[int, int, int, Tensor, Tensor]] = []

    def prefill(self, rows: Sequence[Row]) -> None:
        self._forwards.prefill(rows)

    def denoise(self, rows: Sequence[Row], window: Window) -> Tensor:
        for row, tokens_L, masked_L in zip(rows, window.tokens_RL, window.masked_RL, strict=True):
            self.seen.append((row.number, row.block, row.steps, tokens_L, masked_L))
        return self._forwards.denoise(rows, window)

    def commit(self, rows: Sequence[Row]) -> None:
        self._forwards.commit(rows)


def record_trajectories(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], options: DecodingOptions, *, setup: Setup
) -> list[Trajectory]:
    """Decode `prompts` under vanilla and keep every step. Raises NumericsError."""
    decoder = BlockDecoder(loaded.model, setup.runtime(loaded, own_policy(loaded)), options)
    found: list[Trajectory] = []
    for _, stream in decode_batches(decoder, prompts, setup.batch_size):
        recorder = _Recorder(stream.forwards)
        stream.forwards = recorder
        for _ in stream:
            pass
        for row in stream.rows:
            steps = [(b, s, t, m) for number, b, s, t, m in recorder.seen if number == row.number]
            found.append(_trajectory(row, steps))
    return found


def _trajectory(row: Row, steps: Sequence[tuple[int, int, Tensor, Tensor]]) -> Trajectory:
    """steps: block, step, tokens_L and masked_L before each; what a step wrote shows in the next one of its block, or
    at the end of decoding."""
    length = row.geometry.block_length
    final_CL = row.masked_C.view(-1, length)
    snapshots: list[Snapshot] = []
    for (block, step, tokens_L, masked_L), following in zip_longest(steps, steps[1:]):
        masked_after_L = following[3] if following is not None and following[0] == block else final_CL[block]
        written_L = masked_L & ~masked_after_L
        snapshots.append(Snapshot(block=block, step=step, tokens_L=tokens_L, masked_L=masked_L, written_L=written_L))
    return Trajectory(geometry=row.geometry, final_C=row.tokens_C, snapshots=tuple(snapshots))


def thin_out(trajectory: Trajectory, most: int) -> Trajectory:
    """At most `most` of the snapshots, evenly spaced."""
    count = len(trajectory.snapshots)
    if count <= most:
        return trajectory
    kept = torch.linspace(0, count - 1, most).round().long().tolist()
    return replace(trajectory, snapshots=tuple(trajectory.snapshots[index] for index in kept))


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
    snapshot: Snapshot | None = None
    is_ahead: bool = False


def pack(trajectories: Sequence[Trajectory], config: ModelConfig) -> list[Pack]:
    """Forwards that run every snapshot once.

    Block-causal models: a row is [final blocks | snapshots]; a final block sees those before it and itself, as in the
    prefill and the commit forwards, and a snapshot sees the final blocks before it and itself, as in decoding with a
    cache. Full attention: a row is the whole canvas of one snapshot.
    """
    rows = [(pieces, t.geometry.padding) for t in trajectories for pieces in _rows(t, config)]
    packs: list[Pack] = []
    batch: list[tuple[list[_Piece], int]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batch and (len(batch) + 1) * len(row[0]) * len(row[0][0].tokens_L) > MAX_POSITIONS:
            packs.append(_stack(batch, config))
            batch = []
        batch.append(row)
    return [*packs, _stack(batch, config)] if batch else packs


def _rows(trajectory: Trajectory, config: ModelConfig) -> list[list[_Piece]]:
    """The pieces of each row: one row for all snapshots, or under full attention one for each."""
    blocks = trajectory.final_C.view(-1, trajectory.geometry.block_length)
    finals = [_Piece(number, tokens_L) for number, tokens_L in enumerate(blocks)]
    own = [_Piece(s.block, s.tokens_L, s) for s in trajectory.snapshots]
    if config.attention != "full":
        return [finals[: max(piece.block for piece in own)] + own]
    ahead = [replace(piece, tokens_L=torch.full_like(blocks[0], config.mask_id), is_ahead=True) for piece in finals]
    return [[*finals[: piece.block], piece, *ahead[piece.block + 1 :]] for piece in own]


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
    if config.attention != "full":
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
        groups_G=(live if config.attention == "full" else is_snapshot).flatten(),
    )
