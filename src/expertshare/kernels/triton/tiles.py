"""Shapes of tiles: how many tokens, weight rows and features a program multiplies at a time.

Chosen by arithmetic, for a card that is bound by memory: with up to 64 tokens every weight is read once, 16 to 32 kB of
weights are on their way per program, and two programs share a multiprocessor. Nothing here was tuned on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

MOST_ROWS = 64
FEWEST_ROWS = 16
"""A tensor core takes no less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """rows: (token, expert) pairs. columns: outputs. depth: features at a time, of which `stages` are on their way."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """As a kernel takes them."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def tiles_for(
    projection: Literal["gate_up", "down", "head"], num_tokens: int, depth: int, columns: int, dtype: torch.dtype
) -> Tiles:
    """num_tokens: of the call. One expert may serve all of them, so that up to MOST_ROWS fit into one tile: its weights
    are then read once. A gate_up tile multiplies two rows of weights for each column."""
    rows = min(MOST_ROWS, max(FEWEST_ROWS, power_of_two(num_tokens)))
    widest = 32 if projection == "gate_up" else 64
    deepest = 64 if dtype == torch.float32 else 128
    return Tiles(
        rows=rows,
        columns=min(widest, max(16, power_of_two(columns))),
        depth=min(deepest, max(32, power_of_two(depth))),
        warps=4,
        stages=3 if rows == MOST_ROWS else 4,
    )


def power_of_two(number: int) -> int:
    """The smallest one that is not below."""
    return 1 << max(0, number - 1).bit_length()
