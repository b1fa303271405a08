"""All experts at hand: parameters of a model, or those of a converted one, read once or mapped from their files."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from expertshare.errors import ConfigError, ExpertMemoryError
from expertshare.experts.layout import ExpertLayout, LayerFile, open_layers
from expertshare.experts.slot_memory import allocate_slabs, as_memory
from expertshare.experts.store import StoreStatistics, format_size, fresh_counts
from expertshare.types import Bank, ExpertBank, Loan


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


class ResidentStore:
    """An ExpertStore over modules that are wholly resident: borrowing costs nothing."""

    resident = True

    def __init__(self, layers: list[ResidentExperts]) -> None:
        self._layers = layers

    @contextmanager
    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> Iterator[Loan]:
        """The layer's whole bank, whatever is active."""
        yield Loan(self._layers[layer].bank())


_CPU = torch.device("cpu")


class _WholeStore:
    """A SlabStore in which expert e is row e of its layer's bank. Requests are counted beside the bank: a device has
    not to be waited for, and may run a captured graph."""

    kind = ""
    resident = False

    def __init__(self, layout: ExpertLayout, banks: list[Bank], device: torch.device = _CPU) -> None:
        self._layout, self._banks = layout, banks
        self._counts = fresh_counts(layout.num_layers)
        with torch.inference_mode(False):  # a borrower may be in that mode, or not
            self._asked_N = torch.zeros(layout.num_layers, dtype=torch.int64, device=device)

    @contextmanager
    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> Iterator[Loan]:
        """The layer's whole bank."""
        if not self._banks:
            raise ConfigError("expected an open expert store, got one that was closed: open it again")
        self._asked_N[layer] += active_E.sum()
        self._announce(layer, active_E)
        yield Loan(self._banks[layer])

    def statistics(self) -> StoreStatistics:
        """Since it was opened or last reset."""
        layout = self._layout
        for count, asked in zip(self._counts, self._asked_N.tolist(), strict=True):
            count.requests = count.hits = asked
        return StoreStatistics(
            kind=self.kind,
            slots=layout.num_layers * layout.num_experts,
            slot_bytes=layout.format.slab_bytes,
            layers=tuple(count.freeze(hits_known=self.kind != "mmap") for count in self._counts),
        )

    def reset(self) -> None:
        """Count from zero."""
        self._counts = fresh_counts(self._layout.num_layers)
        self._asked_N.zero_()

    def close(self) -> None:
        """Let the memory go; twice is fine. Banks that are still lent keep theirs."""
        self._banks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        files = open_layers(directory, layout, direct=direct)
        try:
            super().__init__(layout, [layout.format.bank(_moved(_read_all(file), device)) for file in files], device)
        finally:
            for file in files:
                file.close()
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
        files = open_layers(directory, layout)
        try:
            self._maps = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) for file in files]
            self._starts = [file.data_start for file in files]
            banks = [layout.format.bank(_mapped(file, pages)) for file, pages in zip(files, self._maps, strict=True)]
        finally:
            for file in files:
                file.close()
        self._last_NE = torch.zeros(layout.num_layers, layout.num_experts, dtype=torch.bool)
        super().__init__(layout, banks)

    def close(self) -> None:
        """Let the mappings go. They end with the last bank that is still lent, not under it."""
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
