"""What every store over a converted model has in common and counts, and those that have all of its experts at hand."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from expertshare.errors import ConfigError, ExpertMemoryError
from expertshare.experts.layout import ExpertLayout, LayerFile, open_layers
from expertshare.experts.slab import allocate_slabs, as_memory, format_size
from expertshare.types import Bank, ExpertBank, Loan


@dataclass(kw_only=True, slots=True)
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

    def count(self, requests: int, hits: int, prefetch_hits: int = 0) -> None:
        """One more visit of the layer."""
        self.requests += requests
        self.hits = (self.hits or 0) + hits
        self.prefetch_hits += prefetch_hits


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
        names = [field.name for field in fields(LayerStatistics)]
        sums: dict[str, Any] = {name: sum(getattr(layer, name) or 0 for layer in self.layers) for name in names}
        if any(layer.hits is None for layer in self.layers):
            sums["hits"] = None
        return LayerStatistics(**sums)

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


class SlabStore(ABC):
    """An ExpertStore that reads slabs, counts, and has to be closed. It serves one forward at a time: two threads may
    not borrow at once, and a forked process opens a store of its own."""

    kind = ""
    resident = False
    """See ExpertStore."""

    def __init__(self, layout: ExpertLayout, num_slots: int) -> None:
        self._layout, self._num_slots = layout, num_slots
        self.reset()

    @abstractmethod
    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> AbstractContextManager[Loan]:
        """See ExpertStore. Raises ConfigError where the store was closed."""

    @abstractmethod
    def close(self) -> None:
        """Let files, threads and memory go; twice is fine. Banks that are still lent keep their memory."""

    def statistics(self) -> StoreStatistics:
        """Since it was opened or last reset."""
        return StoreStatistics(
            kind=self.kind,
            slots=self._num_slots,
            slot_bytes=self._layout.format.slab_bytes,
            layers=tuple(map(replace, self._counts)),
        )

    def reset(self) -> None:
        """Count from zero; what is in memory stays."""
        self._counts = [LayerStatistics() for _ in range(self._layout.num_layers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ResidentExperts(nn.Module):
    """Experts of one layer as parameters: gate_up [E, 2F, D] (gate rows first) and down [E, D, F]."""

    def __init__(self, num_experts: int, hidden_size: int, expert_hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * expert_hidden, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, expert_hidden))
        self._bank: ExpertBank | None = None

    def bank(self) -> ExpertBank:
        """The weights, as they are; the same object for as long as the parameters are."""
        gate_up, down = self.gate_up, self.down
        if self._bank is None or self._bank.gate_up_EHD is not gate_up or self._bank.down_EDF is not down:
            self._bank = ExpertBank(gate_up, down)
        return self._bank

    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> AbstractContextManager[Loan]:
        """As ExpertStore.borrow, of the one layer that these are."""
        return nullcontext(Loan(self.bank()))


_CPU = torch.device("cpu")


class _WholeStore(SlabStore):
    """A SlabStore in which expert e is row e of its layer's bank. Requests are counted beside the bank: a device has
    not to be waited for, and may run a captured graph."""

    def __init__(self, layout: ExpertLayout, banks: list[Bank], device: torch.device = _CPU) -> None:
        self._banks = banks
        with torch.inference_mode(False):  # a borrower may be in that mode, or not
            self._asked_N = torch.zeros(layout.num_layers, dtype=torch.int64, device=device)
        super().__init__(layout, layout.num_layers * layout.num_experts)

    @contextmanager
    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> Iterator[Loan]:
        """The layer's whole bank."""
        if not self._banks:
            raise ConfigError("expected an open expert store, got one that was closed: open it again")
        self._asked_N[layer] += active_E.sum()
        self._announce(layer, active_E)
        yield Loan(self._banks[layer])

    def statistics(self) -> StoreStatistics:
        """See SlabStore. Waits for the device."""
        for count, asked in zip(self._counts, self._asked_N.tolist(), strict=True):
            count.requests, count.hits = asked, None if self.kind == "mmap" else asked
        return super().statistics()

    def reset(self) -> None:
        """See SlabStore."""
        super().reset()
        self._asked_N.zero_()

    def close(self) -> None:
        """See SlabStore."""
        self._banks.clear()

    def _announce(self, layer: int, active_E: Tensor) -> None:
        """These experts will be read."""


class ResidentSlabs(_WholeStore):
    """Every expert in memory, of the host or of a device, read once when the store is opened. direct: past the page
    cache. Raises ExpertMemoryError where they do not fit."""

    kind = "all"
    resident = True

    def __init__(
        self, directory: Path, layout: ExpertLayout, *, direct: bool = False, device: torch.device = _CPU
    ) -> None:
        with ExitStack() as stack:
            files = [stack.enter_context(file) for file in open_layers(directory, layout, direct=direct)]
            super().__init__(layout, [layout.format.bank(_moved(_read_all(file), device)) for file in files], device)
        for count in self._counts:
            count.reads = layout.num_experts
            count.copies = 0 if device.type == "cpu" else layout.num_experts


class MappedStore(_WholeStore):
    """Experts as pages of their files, which the kernel brings and drops as it sees fit.

    The mapping is private: nothing can be written to the files. It costs no anonymous memory, but a file that is
    truncated while it is mapped ends the process (SIGBUS), as with every mapping.
    """

    kind = "mmap"

    def __init__(self, directory: Path, layout: ExpertLayout) -> None:
        with ExitStack() as stack:
            files = [stack.enter_context(file) for file in open_layers(directory, layout)]
            self._maps = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) for file in files]
            self._starts = [file.data_start for file in files]
            banks = [layout.format.bank(_mapped(file, pages)) for file, pages in zip(files, self._maps, strict=True)]
        self._last_NE = torch.zeros(layout.num_layers, layout.num_experts, dtype=torch.bool)
        super().__init__(layout, banks)

    def close(self) -> None:
        """See SlabStore. The mappings end with the last bank that is still lent, not under it."""
        super().close()
        self._maps.clear()

    def _announce(self, layer: int, active_E: Tensor) -> None:
        """Have the kernel read whole experts at once, where it would read ahead a few pages of each. Those of the last
        visit are likely to be there still, and asking for them costs a walk over their pages."""
        size, start = self._layout.format.slab_bytes, self._starts[layer]
        fresh_E = active_E & ~self._last_NE[layer]
        self._last_NE[layer] = active_E
        for expert in fresh_E.nonzero().flatten().tolist():
            self._maps[layer].madvise(mmap.MADV_WILLNEED, start + expert * size, size)


def _read_all(file: LayerFile) -> Tensor:
    size = file.header.format.slab_bytes
    slabs_EB = allocate_slabs(file.header.num_experts, size)
    memory = as_memory(slabs_EB)
    for expert in range(file.header.num_experts):
        file.read_into(expert, memory[expert * size : (expert + 1) * size])
    return slabs_EB


def _moved(slabs_EB: Tensor, device: torch.device) -> Tensor:
    try:
        return slabs_EB.to(device)
    except torch.OutOfMemoryError as error:
        raise ExpertMemoryError(
            f"expected memory for all experts on {device}, got none for {format_size(slabs_EB.numel())} more: give the "
            "memory that there is to --expert-memory, as a size"
        ) from error


def _mapped(file: LayerFile, pages: mmap.mmap) -> Tensor:
    bytes_X = torch.frombuffer(pages, dtype=torch.uint8, count=file.header.slabs_bytes, offset=file.data_start)
    return bytes_X.view(file.header.num_experts, -1)
