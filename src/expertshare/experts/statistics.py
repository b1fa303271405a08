"""What a store was asked for, and what that cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatistics:
    """One MoE layer. requests: experts that were borrowed; hits: those that were there (None where the kernel, which
    keeps a mapping, does not say); prefetch_hits: those that were there, or on their way, only because they had been
    fetched ahead; reads: slabs read from files for the layer, ahead or not; copies: slabs copied to a device; stall_s:
    time that was waited for reads, and for copies to be issued."""

    requests: int = 0
    hits: int | None = 0
    prefetch_hits: int = 0
    reads: int = 0
    copies: int = 0
    stall_s: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of requests that did not wait for a read of their own; None without requests."""
        if self.hits is None or not self.requests:
            return None
        return (self.hits + self.prefetch_hits) / self.requests


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStatistics:
    """A store since it was opened or last reset. kind: "all", "mmap" or "budget". slots: experts that it can hold;
    slot_bytes: memory of one."""

    kind: str
    slots: int
    slot_bytes: int
    layers: tuple[LayerStatistics, ...]

    @property
    def total(self) -> LayerStatistics:
        """All layers together."""
        hits = [layer.hits for layer in self.layers]
        return LayerStatistics(
            requests=sum(layer.requests for layer in self.layers),
            hits=None if None in hits else sum(count or 0 for count in hits),
            prefetch_hits=sum(layer.prefetch_hits for layer in self.layers),
            reads=sum(layer.reads for layer in self.layers),
            copies=sum(layer.copies for layer in self.layers),
            stall_s=sum(layer.stall_s for layer in self.layers),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values: totals, and the rates of every layer."""
        total = self.total
        return {
            "kind": self.kind,
            "slots": self.slots,
            "slot_bytes": self.slot_bytes,
            **asdict(total),
            "bytes_read": total.reads * self.slot_bytes,
            "bytes_copied": total.copies * self.slot_bytes,
            "hit_rate": total.hit_rate,
            "hit_rate_by_layer": [layer.hit_rate for layer in self.layers],
            "stall_s_by_layer": [layer.stall_s for layer in self.layers],
        }


@dataclass(slots=True)
class LayerCount:
    """LayerStatistics being counted."""

    requests: int = 0
    hits: int = 0
    prefetch_hits: int = 0
    reads: int = 0
    copies: int = 0
    stall_s: float = 0.0

    def freeze(self, *, hits_known: bool = True) -> LayerStatistics:
        """As of now."""
        return LayerStatistics(**{**asdict(self), **({} if hits_known else {"hits": None})})


def fresh_counts(num_layers: int) -> list[LayerCount]:
    """Nothing counted yet."""
    make: Callable[[], LayerCount] = LayerCount
    return [make() for _ in range(num_layers)]
