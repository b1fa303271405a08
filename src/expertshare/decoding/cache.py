"""Keys and values of finished blocks and of the current one, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.kernels import CacheSlice, LayerKeyValues


class CacheView(CacheSlice):
    """One layer's cache for the R rows of a forward: new positions of each row go right behind its finished ones.

    What lies beyond is stale; queries must not see it (`visible`).
    """

    def cache_slice(self) -> CacheSlice:
        """This view itself: kernels write into it."""
        return self

    def extended_by(self, new: LayerKeyValues) -> LayerKeyValues:
        """The cache as far as the longest row reaches with its new positions, which are written in place: a view, with
        keys at their canvas positions."""
        length = new.keys_BHSD.shape[2]
        if len(set(self.starts)) == 1:
            start = self.starts[0]
            self.keys_BHCD[:, :, start : start + length] = new.keys_BHSD
            self.values_BHCD[:, :, start : start + length] = new.values_BHSD
        else:
            for row, start in enumerate(self.starts):
                self.keys_BHCD[row, :, start : start + length] = new.keys_BHSD[row]
                self.values_BHCD[row, :, start : start + length] = new.values_BHSD[row]
        return LayerKeyValues(*self.reach(length))


class KeyValueCache:
    """Keys and values [layers, 2, B, key/value heads, capacity, head dim], filled from the left row by row.

    Rows that are held lie side by side, in the order in which they came; layers: views of them.
    """

    def __init__(
        self, config: ModelConfig, *, num_rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, 2, num_rows, config.num_kv_heads, capacity, config.head_dim)
        self._memory_N2BHCD = torch.zeros(shape, dtype=dtype, device=device)
        self._hold(range(num_rows))

    def add(self, rows: Sequence[int], capacity: int) -> None:
        """Hold more rows, behind the others, with `capacity` positions at least.

        What is held is copied where memory has to grow: then by so much that it seldom has to.
        """
        first, needed = len(self._held), len(self._held) + len(rows)
        layers, two, num_rows, heads, positions, head_dim = self._memory_N2BHCD.shape
        if needed > num_rows or capacity > positions:
            size = (needed, max(capacity, positions))
            # the first rows may be the only ones: they get what they need and no more
            num_grown, grown = size if not first else (_power_of_two(needed), _power_of_two(size[1]))
            old, shape = self._memory_N2BHCD, (layers, two, num_grown, heads, grown, head_dim)
            self._memory_N2BHCD = old.new_zeros(shape)
            self._memory_N2BHCD[:, :, :num_rows, :, :positions] = old
        self._hold([*self._held, *rows])
        self._memory_N2BHCD[:, :, first:needed, :, :capacity] = 0  # what an earlier row left need not be finite

    def clear(self) -> None:
        """Hold no row, and nothing of those that were held; memory stays."""
        self._memory_N2BHCD.zero_()
        self._hold([])

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all other rows; `rows` in the order in which they are held. Those behind a gap move up."""
        if list(rows) == self._held:
            return
        for new, old in enumerate(map(self._held.index, rows)):
            if old != new:
                self._memory_N2BHCD[:, :, new] = self._memory_N2BHCD[:, :, old]
        self._hold(rows)

    def _hold(self, rows: Sequence[int]) -> None:
        self._held = list(rows)
        self.layers = tuple(LayerKeyValues(*pair_2BHCD[:, : len(rows)]) for pair_2BHCD in self._memory_N2BHCD)

    def views(self, rows: Sequence[int], starts: Sequence[int]) -> tuple[CacheView, ...]:
        """For each layer where the given rows' new keys and values belong, from `starts` on.

        A view of the cache where those rows lie side by side in it; else a copy, for `put_back` to return.
        """
        pick = self._places(rows)
        return tuple(CacheView(layer.keys_BHSD[pick], layer.values_BHSD[pick], tuple(starts)) for layer in self.layers)

    def put_back(self, rows: Sequence[int], views: Sequence[CacheView]) -> None:
        """Keep what a forward wrote into `views`; nothing is to be done for views."""
        pick = self._places(rows)
        if isinstance(pick, slice):
            return
        for layer, view in zip(self.layers, views, strict=True):
            layer.keys_BHSD[pick], layer.values_BHSD[pick] = view.keys_BHCD, view.values_BHCD

    def _places(self, rows: Sequence[int]) -> slice | list[int]:
        places = [self._held.index(row) for row in rows]
        first = places[0]
        side_by_side = places == list(range(first, first + len(places)))
        return slice(first, first + len(places)) if side_by_side else places


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def visible(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Which positions each row has filled: bool [R, P], P the largest of `lengths`."""
    filled_R1 = torch.tensor(lengths, device=device).unsqueeze(1)
    return torch.arange(max(lengths), device=device) < filled_R1
