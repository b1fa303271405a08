"""What every store over a converted model has in common: its memory, as people write it, and what it counts."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self

from expertshare.errors import InputError
from expertshare.types import ExpertStore

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Bytes of a size such as 3GiB, 800MB, 1.5 GiB or 4096 (bytes). Raises InputError for anything else, and for 0."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise InputError(f"expected a size such as 3GiB, 800MB or a number of bytes, got {text!r}: write it like that")
    size = int(float(match[1]) * unit)
    if size < 1:
        raise InputError(f"expected a size of at least one byte, got {text!r}: give a larger one")
    return size


def format_size(num_bytes: int) -> str:
    """A size in binary units, rounded up to a tenth, so that it can be given back as a budget."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if num_bytes >= u), (1, "B"))
    return f"{-(-num_bytes * 10 // unit) / 10:g}{name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMemory:
    """Where experts are kept. kind "all": in memory, all of them; "mmap": mapped, the kernel decides; "budget": slots
    of num_bytes altogether, filled by explicit reads."""

    kind: Literal["all", "mmap", "budget"]
    num_bytes: int = 0

    @staticmethod
    def parse(text: str) -> ExpertMemory:
        """From `all`, `mmap` or a size; InputError for anything else."""
        if text in ("all", "mmap"):
            return ExpertMemory(kind="all" if text == "all" else "mmap")
        try:
            return ExpertMemory(kind="budget", num_bytes=parse_size(text))
        except InputError as error:
            raise InputError(f"expert memory: {error}, or all, or mmap") from error

    @staticmethod
    def parse_host(text: str) -> ExpertMemory:
        """Memory of the host beside a GPU, from `all` or a size; InputError for anything else."""
        if text == "all":
            return ExpertMemory(kind="all")
        try:
            return ExpertMemory(kind="budget", num_bytes=parse_size(text))
        except InputError as error:
            raise InputError(f"host memory: {error}, or all") from error

    def slabs(self, slab_bytes: int, num_experts: int) -> int:
        """How many of so many experts it holds."""
        return {"all": num_experts, "mmap": 0, "budget": min(self.num_bytes // slab_bytes, num_experts)}[self.kind]

    def __str__(self) -> str:
        return str(self.num_bytes) if self.kind == "budget" else self.kind


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
        """The sum over all layers."""
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
    """The counts of LayerStatistics while they still grow."""

    requests: int = 0
    hits: int = 0
    prefetch_hits: int = 0
    reads: int = 0
    copies: int = 0
    stall_s: float = 0.0

    def freeze(self, *, hits_known: bool = True) -> LayerStatistics:
        """The statistics as they are now."""
        return LayerStatistics(**{**asdict(self), **({} if hits_known else {"hits": None})})


def fresh_counts(num_layers: int) -> list[LayerCount]:
    """Nothing counted yet, by layer."""
    return [LayerCount() for _ in range(num_layers)]


class SlabStore(ExpertStore, Protocol):
    """An ExpertStore that reads slabs, counts, and has to be closed. It serves one forward at a time: two threads may
    not borrow at once, and a forked process opens a store of its own."""

    def statistics(self) -> StoreStatistics:
        """Since it was opened or last reset."""
        ...

    def reset(self) -> None:
        """Count from zero; what is in memory stays."""
        ...

    def close(self) -> None:
        """Let files, threads and memory go; twice is fine. Banks that are still lent keep their memory."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
