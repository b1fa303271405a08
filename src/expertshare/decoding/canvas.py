"""The tokens of all rows while they are decoded: B rows, C canvas positions, L positions in a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from expertshare.decoding.geometry import RowGeometry
from expertshare.decoding.row import Row


@dataclass(frozen=True, slots=True)
class Window:
    """The current block of R rows. index_RL: where it lies on the canvas; rows_R1: which rows.

    masked_RL: still undecided. frozen_RL: prompt. answer_RL: inside the answer that will be returned.
    """

    rows_R1: Tensor
    index_RL: Tensor
    tokens_RL: Tensor
    masked_RL: Tensor
    frozen_RL: Tensor
    answer_RL: Tensor


@dataclass(slots=True)
class Canvas:
    """Token ids and their state, [B, C] each. Undecided positions hold the mask id and are marked in
    masked_BC: a mask id that stands in a prompt is text, not a position to decode. positions_BC: 0 at the
    first prompt token."""

    tokens_BC: Tensor
    masked_BC: Tensor
    frozen_BC: Tensor
    answer_BC: Tensor
    live_BC: Tensor
    positions_BC: Tensor

    @classmethod
    def lay(
        cls,
        prompts: Sequence[Sequence[int]],
        geometries: Sequence[RowGeometry],
        *,
        mask_id: int,
        device: torch.device,
    ) -> Canvas:
        """Prompts in place, masks behind them, dead positions around the shorter rows."""
        width = max(geometry.canvas_length for geometry in geometries)
        index_BC = torch.arange(width).expand(len(prompts), width)
        padding, start, end, length = (
            torch.tensor([getattr(geometry, name) for geometry in geometries]).unsqueeze(1)
            for name in ("padding", "answer_start", "answer_end", "canvas_length")
        )
        tokens_BC = torch.full((len(prompts), width), mask_id)
        for row, (prompt, geometry) in enumerate(zip(prompts, geometries, strict=True)):
            tokens_BC[row, geometry.padding : geometry.answer_start] = torch.tensor(list(prompt))
        canvas = (
            tokens_BC,
            (index_BC >= start) & (index_BC < length),
            index_BC < start,
            (index_BC >= start) & (index_BC < end),
            (index_BC >= padding) & (index_BC < length),
            (index_BC - padding).clamp_min(0),
        )
        return cls(*(tensor.to(device) for tensor in canvas))

    @classmethod
    def empty(cls, device: torch.device, size: tuple[int, int] = (0, 0)) -> Canvas:
        """Rows and positions that are all dead: none for `paste`, which makes room."""
        kinds = (torch.int64, torch.bool, torch.bool, torch.bool, torch.bool, torch.int64)
        return cls(*(torch.zeros(size, dtype=kind, device=device) for kind in kinds))

    def paste(self, index: int, sheet: Canvas) -> None:
        """Put the one row of `sheet` down as row `index`, whatever was there; the canvas grows where it has to. What
        lies behind the row is dead."""
        length = sheet.tokens_BC.shape[1]
        for field in fields(self):
            old_BC, new_1C = getattr(self, field.name), getattr(sheet, field.name)
            height, width = old_BC.shape
            if index >= height or length > width:
                grown_BC = old_BC.new_zeros(max(index + 1, height), max(length, width))
                grown_BC[:height, :width] = old_BC
                setattr(self, field.name, grown_BC)
                old_BC = grown_BC
            old_BC[index] = 0
            old_BC[index, :length] = new_1C[0]

    def window(self, rows: Sequence[Row]) -> Window:
        """Each row's current block."""
        device, length = self.tokens_BC.device, rows[0].geometry.block_length
        rows_R1 = torch.tensor([[row.index] for row in rows], device=device)
        index_RL = torch.tensor([[row.start] for row in rows], device=device) + torch.arange(length, device=device)
        at = (rows_R1, index_RL)
        return Window(*at, self.tokens_BC[at], self.masked_BC[at], self.frozen_BC[at], self.answer_BC[at])

    def write(self, window: Window, tokens_RL: Tensor, write_RL: Tensor) -> None:
        """Put `tokens_RL` down where `write_RL`; those positions are decided from now on."""
        at = (window.rows_R1, window.index_RL)
        self.tokens_BC[at] = torch.where(write_RL, tokens_RL, window.tokens_RL)
        self.masked_BC[at] = window.masked_RL & ~write_RL

    def answer(self, row: Row) -> list[int]:
        """What the row's current block adds to the answer, end-of-text tokens included."""
        start, end = row.geometry.answer_span(row.block)
        ids: list[int] = self.tokens_BC[row.index, start:end].tolist()
        return ids
