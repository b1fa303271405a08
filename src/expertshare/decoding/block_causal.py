"""Block diffusion: the current block attends to itself and to a cache of all blocks before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertshare.decoding.cache import KeyValueCache, visible
from expertshare.decoding.canvas import Canvas
from expertshare.decoding.forwards import AccountedModel
from expertshare.decoding.row import Row
from expertshare.measure.cost import ForwardKind
from expertshare.models.runtime import ForwardInput, ForwardOutput


class CachedPrefix:
    """Forwards of one block per row, each row at its own block. The cache holds keys and values of final
    tokens only: full prompt blocks from the prefill, decoded blocks from a forward of their own after their
    last token."""

    def __init__(self, run: AccountedModel, canvas: Canvas, cache: KeyValueCache | None = None) -> None:
        """cache: one that holds no row; by default of its own."""
        self._run, self._canvas = run, canvas
        model = run.model
        self.cache = cache or KeyValueCache(
            model.config, num_rows=0, capacity=0, dtype=model.dtype, device=model.device
        )
        self._mask_RLP: Tensor | None = None
        self._mask_is_for: list[int] = []

    def prefill(self, rows: Sequence[Row]) -> None:
        """Make room for new rows and cache their full prompt blocks in one forward; rows without one stay out of it."""
        self.cache.add([row.number for row in rows], max(row.geometry.canvas_length for row in rows))
        rows = [row for row in rows if row.start > 0]
        if not rows:
            return
        lengths, index, numbers = ([getattr(row, at) for row in rows] for at in ("start", "index", "number"))
        length, canvas = max(lengths), self._canvas
        live_RS = visible(lengths, canvas.tokens_BC.device)
        inputs = ForwardInput(
            tokens_BS=canvas.tokens_BC[index, :length],
            positions_BS=canvas.positions_BC[index, :length],
            live_BS=live_RS,
            mask_BSP=block_causal_mask(live_RS, rows[0].geometry.block_length),
            block_length=rows[0].geometry.block_length,
        )
        rooms = self.cache.rooms(numbers, [0] * len(rows))
        self._run("prefill", rows, inputs, rooms)
        self.cache.put_back(numbers, rooms)

    def denoise(self, rows: Sequence[Row]) -> Tensor:
        """Run the current blocks as they stand. Every step overwrites what the one before left in the cache."""
        self.cache.keep([row.number for row in rows])
        return self._forward("denoise", rows).hidden_BSD

    def commit(self, rows: Sequence[Row]) -> None:
        """Run the finished blocks once more, from their final tokens: those keys and values stay."""
        if rows:
            self._forward("commit", rows)

    def _forward(self, kind: ForwardKind, rows: Sequence[Row]) -> ForwardOutput:
        window, numbers = self._canvas.window(rows), [row.number for row in rows]
        at = (window.rows_R1, window.index_RL)
        inputs = ForwardInput(
            tokens_BS=window.tokens_RL,
            positions_BS=self._canvas.positions_BC[at],
            live_BS=self._canvas.live_BC[at],
            mask_BSP=self._mask(rows),
            block_length=window.tokens_RL.shape[1],
            masked_BS=window.masked_RL,
        )
        rooms = self.cache.rooms(numbers, [row.start for row in rows])
        output = self._run(kind, rows, inputs, rooms)
        self.cache.put_back(numbers, rooms)
        return output

    def _mask(self, rows: Sequence[Row]) -> Tensor | None:
        """A block attends to everything before it and to all of itself, undecided positions included. None where the
        blocks of all rows are equally far; made once for as long as the rows stay where they are."""
        length = rows[0].geometry.block_length
        ends = [row.start + length for row in rows]
        if len(set(ends)) == 1:
            return None
        if ends != self._mask_is_for:
            self._mask_RLP = visible(ends, self._canvas.tokens_BC.device).unsqueeze(1).expand(-1, length, -1)
            self._mask_is_for = ends
        return self._mask_RLP


def block_causal_mask(live_RS: Tensor, block_length: int) -> Tensor:
    """Keys of the own block and of those before it, padding left out: bool [R, S, S]."""
    block_S = torch.arange(live_RS.shape[1], device=live_RS.device) // block_length
    causal_SS = block_S.unsqueeze(1) >= block_S
    # padding sees itself, else its softmax would have nothing to sum over
    itself_SS = torch.eye(live_RS.shape[1], dtype=torch.bool, device=live_RS.device)
    return (causal_SS & live_RS.unsqueeze(1)) | itself_SS
