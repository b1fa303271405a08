"""Keys and values of finished blocks, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.models.runtime import LayerKeyValues


class KeyValueCache:
    """One [B, key/value heads, capacity, head dim] pair per layer, filled from the left row by row.

    What lies beyond a row's finished blocks is zero; queries must not see it (`visible`).
    """

    def __init__(
        self, config: ModelConfig, *, num_rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_rows, config.num_kv_heads, capacity, config.head_dim)
        self._num_rows = num_rows
        self.layers = tuple(
            LayerKeyValues(
                torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
            )
            for _ in range(config.num_layers)
        )

    def past(self, rows: Sequence[int], length: int) -> tuple[LayerKeyValues, ...] | None:
        """The first `length` positions of the given rows, or None if that is nothing. Copies unless all rows
        are asked for."""
        if length == 0:
            return None
        pick: slice | list[int] = slice(None) if list(rows) == list(range(self._num_rows)) else list(rows)
        return tuple(
            LayerKeyValues(layer.keys_BHSD[pick, :, :length], layer.values_BHSD[pick, :, :length])
            for layer in self.layers
        )

    def write(self, rows: Sequence[int], spans: Sequence[tuple[int, int]], new: Sequence[LayerKeyValues]) -> None:
        """Store new keys and values (one entry per layer, batch = `rows`): row i fills its span [start, end)
        with the first end - start positions of entry i."""
        for layer, fresh in zip(self.layers, new, strict=True):
            for entry, (row, (start, end)) in enumerate(zip(rows, spans, strict=True)):
                layer.keys_BHSD[row, :, start:end] = fresh.keys_BHSD[entry, :, : end - start]
                layer.values_BHSD[row, :, start:end] = fresh.values_BHSD[entry, :, : end - start]


def visible(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Which cached positions each row has filled: bool [R, P], P the largest of `lengths`."""
    filled_R1 = torch.tensor(lengths, device=device).unsqueeze(1)
    return torch.arange(max(lengths), device=device) < filled_R1
