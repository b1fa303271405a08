"""Where the slots of a budgeted store lie, and how the bytes of an expert get into one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from expertshare.experts.forecast import Ints
from expertshare.experts.page_memory import allocate_slabs, as_memory
from expertshare.experts.slab import SlabFormat
from expertshare.types import Bank

ReadInto = Callable[[memoryview], None]
"""Reads an expert's slab from its file; raises CheckpointError."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What it took to bring an expert. read: from its file; copied: over the bus of a device."""

    read: bool
    copied: bool


class SlotMemory(Protocol):
    """Slots in some memory, as a bank to compute with. Which expert goes into which slot is decided elsewhere.

    Everything is called by the thread that borrows, but what `bringing` returns: reader threads run that, unless the
    expert is at hand.
    """

    @property
    def bank(self) -> Bank:
        """All slots."""
        ...

    @property
    def usable_at_once(self) -> bool:
        """Whether an expert can be computed with as soon as it has been brought, and needs no `lend`."""
        ...

    def bringing(self, slot: int, layer: int, expert: int, read: ReadInto) -> Callable[[], Moved]:
        """What brings an expert into a slot that nobody has borrowed now. Computation that was issued before this call
        may still be reading the slot; none that is issued later does before `lend`."""
        ...

    def at_hand(self, layer: int, expert: int) -> bool:
        """Whether bringing it takes no reading, and so no time of the thread that does it."""
        ...

    def lend(self, slots: Ints) -> None:
        """Computation that is issued from now on reads these slots, whose experts have all been brought."""
        ...

    def beside(self, slot_of_E: Tensor) -> Tensor:
        """The index (int64, of the host) in the memory in which the bank is."""
        ...

    def close(self) -> None:
        """Let the memory go. No reader runs any more; a bank that is still lent keeps its memory."""
        ...


class HostSlots:
    """SlotMemory of the host: files are read straight into the slots, and what is there can be computed with.

    Raises ExpertMemoryError where the system refuses the memory.
    """

    usable_at_once = True

    def __init__(self, form: SlabFormat, num_slots: int) -> None:
        slabs_SB = allocate_slabs(num_slots, form.slab_bytes)
        self._memory, self._slab_bytes = as_memory(slabs_SB), form.slab_bytes
        self.bank = form.bank(slabs_SB)

    def bringing(self, slot: int, layer: int, expert: int, read: ReadInto) -> Callable[[], Moved]:
        """See SlotMemory."""
        del layer, expert
        size = self._slab_bytes
        return partial(_read, read, self._memory[slot * size : (slot + 1) * size])

    def at_hand(self, layer: int, expert: int) -> bool:
        """What is not in a slot is in a file."""
        del layer, expert
        return False

    def lend(self, slots: Ints) -> None:
        """Nothing has to be waited for."""

    def beside(self, slot_of_E: Tensor) -> Tensor:
        """As it is."""
        return slot_of_E

    def close(self) -> None:
        """Let the memory go."""
        del self.bank, self._memory


def _read(read: ReadInto, memory: memoryview) -> Moved:
    read(memory)
    return Moved(read=True, copied=False)
