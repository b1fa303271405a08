"""Coresets that serve several steps of a block: the session keeps them, row by row; policies keep nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from expertshare.decoding.row import Row
from expertshare.measure.cost import ForwardKind
from expertshare.routing import policy_at
from expertshare.types import Coreset, RoutingPolicy


class CoresetMemory:
    """The coresets of every row's last denoising step, where some layer's policy reuses them.

    A row selects in steps 0, reuse, 2 * reuse, ... of each block, and in prefill and commit forwards; rows do not
    depend on each other. A row that takes over the place of a finished one begins with step 0, and so with a selection.
    """

    def __init__(self, policy: RoutingPolicy, num_layers: int) -> None:
        self._reuse_N = tuple(policy_at(policy, layer, num_layers).reuse or 1 for layer in range(num_layers))
        self._rows: dict[int, tuple[Tensor, ...]] = {}  # per MoE layer, bool [groups of the row, E]

    def recall(self, kind: ForwardKind, rows: Sequence[Row], groups_per_row: int) -> tuple[Coreset | None, ...] | None:
        """What the rows' groups keep in a forward, per MoE layer: empty for a group that has to select."""
        if not self._concerns(kind):
            return None
        return tuple(self._recall_layer(layer, rows, groups_per_row) for layer in range(len(self._reuse_N)))

    def _recall_layer(self, layer: int, rows: Sequence[Row], groups_per_row: int) -> Coreset | None:
        kept = {
            row.index: _fitted(self._rows[row.index][layer], groups_per_row)
            for row in rows
            if row.steps % self._reuse_N[layer] != 0
        }
        if not kept:
            return None
        empty_GE = torch.zeros_like(next(iter(kept.values())))
        return Coreset(torch.cat([kept.get(row.index, empty_GE) for row in rows]))

    def remember(self, kind: ForwardKind, rows: Sequence[Row], coresets: Sequence[Coreset | None]) -> None:
        """Take in what a forward used, per MoE layer; None where nothing is reused."""
        if not self._concerns(kind):
            return
        nothing = (torch.empty(0),) * len(rows)
        by_layer = [nothing if coreset is None else coreset.member_GE.chunk(len(rows)) for coreset in coresets]
        for row, members in zip(rows, zip(*by_layer, strict=True), strict=True):
            self._rows[row.index] = members

    def _concerns(self, kind: ForwardKind) -> bool:
        return kind == "denoise" and max(self._reuse_N) > 1


def _fitted(member_GE: Tensor, num_groups: int) -> Tensor:
    """A row's coresets in a forward as long as its longest row: that one may have left, or have come, since."""
    missing = num_groups - len(member_GE)
    return member_GE[:num_groups] if missing <= 0 else F.pad(member_GE, (0, 0, 0, missing))
