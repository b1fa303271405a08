"""A batch that rows join and leave while it is decoded: continuous batching at block boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch

from expertshare.decoding.batch import RowBatch, make_row
from expertshare.decoding.canvas import Canvas
from expertshare.decoding.forwards import Ledger
from expertshare.decoding.geometry import lay_out
from expertshare.decoding.options import DecodingOptions
from expertshare.decoding.results import BlockResult
from expertshare.decoding.row import Row
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Joining:
    """A prompt that wants to be decoded. options: resolved, their seed the row's. Checked by `check_prompts`."""

    prompt: tuple[int, ...]
    options: DecodingOptions


class BlockSession(RowBatch):
    """Rows under one policy and one block length, with no end of its own: `join`, `advance`, `leave`.

    A row's number is never given again. Its place on the canvas and in the cache is, and their memory grows to the most
    that was needed at once.
    """

    def __init__(self, model: MoETransformer, runtime: Runtime, ledger: Ledger) -> None:
        """runtime: its policy bound to the model's router."""
        super().__init__(model, runtime, ledger, Canvas.empty(model.device))
        self._numbers = count()

    def join(self, joining: Sequence[Joining]) -> list[int]:
        """Prefill these prompts, together, and decode them from the next step on; returns the numbers of their rows."""
        taken = {row.index for row in self._active}
        free = (index for index in count() if index not in taken)
        rows = [self._lay(entry, index) for entry, index in zip(joining, free, strict=False)]
        self.start(rows)
        return [row.number for row in rows]

    def advance(self) -> list[BlockResult]:
        """One denoising step of all rows; the blocks that it completed. Finished rows have left. Raises
        NumericsError."""
        with torch.no_grad():
            return self.step()

    def leave(self, number: int) -> None:
        """Stop decoding a row, wherever it is in its block: the next step does no work for it."""
        self._active = [row for row in self._active if row.number != number]

    def _lay(self, entry: Joining, index: int) -> Row:
        config, device = self._model.config, self._model.device
        geometry = lay_out(len(entry.prompt), entry.options, config)
        sheet = Canvas.lay([entry.prompt], [geometry], mask_id=config.mask_id, device=device)
        self.canvas.paste(index, sheet)
        return make_row(next(self._numbers), index, geometry, entry.options, seed=entry.options.seed, device=device)
