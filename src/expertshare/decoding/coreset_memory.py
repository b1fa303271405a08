"""Coresets that serve several steps of a block: the session keeps them, row by row; policies keep nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertshare.decoding.row import Row
from expertshare.measure.cost import ForwardKind
from expertshare.routing import policy_at
from expertshare.types import Coreset, RoutingPolicy


class CoresetMemory:
    """The latest denoising step's coresets of every row, for the MoE layers whose policy reuses them."""

    def __init__(self, policy: RoutingPolicy, num_layers: int) -> None:
        self._reuse = tuple(policy_at(policy, layer, num_layers).reuse or 1 for layer in range(num_layers))
        self._rows: dict[int, list[Tensor]] = {}  # by row: per MoE layer, bool [groups of the row, E]

    def recall(self, kind: ForwardKind, rows: Sequence[Row], groups_per_row: int) -> tuple[Coreset | None, ...] | None:
        """What the rows' groups keep in this forward; an empty coreset where a group has to select anew.

        A row's coreset is selected in steps 0, reuse, 2 * reuse, ... of each block, and in prefill and commit forwards.
        """
        if kind != "denoise" or max(self._reuse) == 1:
            return None
        return tuple(
            None if steps == 1 else self._layer(layer, steps, rows, groups_per_row)
            for layer, steps in enumerate(self._reuse)
        )

    def _layer(self, layer: int, steps: int, rows: Sequence[Row], groups_per_row: int) -> Coreset | None:
        keeps = [row.steps % steps != 0 for row in rows]
        if not any(keeps):
            return None
        kept = {row.index: self._rows[row.index][layer][:groups_per_row] for row, k in zip(rows, keeps, strict=True) if k}
        empty = torch.zeros_like(next(iter(kept.values())))
        return Coreset(torch.cat([kept.get(row.index, empty) for row in rows]))

    def remember(self, kind: ForwardKind, rows: Sequence[Row], coresets: Sequence[Coreset]) -> None:
        """Take in a forward's coresets."""
        if kind != "denoise" or max(self._reuse) == 1:
            return
        for row, *layers in zip(rows, *(c.member_GE.view(len(rows), -1, c.member_GE.shape[1]) for c in coresets), strict=True):
            self._rows[row.index] = layers
