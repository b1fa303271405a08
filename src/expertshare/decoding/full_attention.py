"""Masked diffusion with full attention: every step runs the whole canvas, prompt and undecided answer
included."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from expertshare.decoding.canvas import Canvas
from expertshare.decoding.forwards import AccountedModel
from expertshare.decoding.row import Row
from expertshare.models.runtime import ForwardInput


class WholeCanvas:
    """Forwards without a cache: every position attends to every live one, so nothing of a step can be kept
    exactly."""

    def __init__(self, run: AccountedModel, canvas: Canvas) -> None:
        self._run, self._canvas = run, canvas

    def prefill(self, rows: Sequence[Row]) -> None:
        """Nothing: what the prompt's positions compute depends on the answer."""

    def denoise(self, rows: Sequence[Row]) -> Tensor:
        """Run the canvases of the rows that are still decoding, as far as the longest of them."""
        canvas, index = self._canvas, [row.index for row in rows]
        length = max(row.geometry.canvas_length for row in rows)
        all_live = all(row.geometry.padding == 0 and row.geometry.canvas_length == length for row in rows)
        live_RS = canvas.live_BC[index, :length]
        inputs = ForwardInput(
            tokens_BS=canvas.tokens_BC[index, :length],
            positions_BS=canvas.positions_BC[index, :length],
            live_BS=live_RS,
            mask_BSP=None if all_live else live_RS.unsqueeze(1).expand(-1, length, -1),
            block_length=rows[0].geometry.block_length,
            masked_BS=canvas.masked_BC[index, :length],
        )
        hidden_RSD = self._run("denoise", rows, inputs).hidden_BSD
        index_RL = canvas.window(rows).index_RL
        return hidden_RSD.gather(1, index_RL.unsqueeze(2).expand(-1, -1, hidden_RSD.shape[2]))

    def commit(self, rows: Sequence[Row]) -> None:
        """Nothing: there is no cache."""
