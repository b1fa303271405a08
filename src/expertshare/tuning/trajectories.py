"""What vanilla did: the state of the current block before every denoising step, and what was written in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.decoding.forwards import Forwards
from expertshare.decoding.row import Row, RowGeometry, Window
from expertshare.models import LoadedModel, Runtime
from expertshare.routing import make_policy


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
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    options: DecodingOptions,
    *,
    runtime: Runtime,
    batch_size: int,
) -> list[Trajectory]:
    """Decode `prompts` under vanilla, not the runtime's policy, and keep every step. Raises NumericsError."""
    decoder = BlockDecoder(loaded.model, replace(runtime, policy=make_policy("vanilla")), options)
    found: list[Trajectory] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        stream = decoder.blocks(batch)
        recorder = _Recorder(stream.forwards)
        stream.forwards = recorder
        for _ in stream:
            pass
        for row in stream.rows:
            steps = [(b, s, t, m) for number, b, s, t, m in recorder.seen if number == row.number]
            found.append(_trajectory(row, steps))
    return found


def _trajectory(row: Row, steps: Sequence[tuple[int, int, Tensor, Tensor]]) -> Trajectory:
    length = row.geometry.block_length
    snapshots: list[Snapshot] = []
    for place, (block, step, tokens_L, masked_L) in enumerate(steps):
        follower = steps[place + 1] if place + 1 < len(steps) else None
        if follower is not None and follower[0] == block:
            masked_after_L = follower[3]
        else:
            masked_after_L = row.masked_C[block * length : (block + 1) * length]
        snapshots.append(
            Snapshot(
                block=block,
                step=step,
                tokens_L=tokens_L,
                masked_L=masked_L,
                written_L=masked_L & ~masked_after_L,
            )
        )
    return Trajectory(
        geometry=row.geometry,
        final_C=row.tokens_C,
        snapshots=tuple(snapshots),
    )


def thin_out(trajectory: Trajectory, most: int) -> Trajectory:
    """At most `most` of the snapshots, evenly spaced."""
    count = len(trajectory.snapshots)
    if count <= most:
        return trajectory
    places = torch.linspace(0, count - 1, most).round().long().tolist()
    return Trajectory(
        geometry=trajectory.geometry,
        final_C=trajectory.final_C,
        snapshots=tuple(trajectory.snapshots[place] for place in places),
    )
