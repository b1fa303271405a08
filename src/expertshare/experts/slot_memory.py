"""Slots of a budgeted store in the host's memory: how the bytes of an expert get into one, by a few reader threads."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from expertshare.errors import ExpertMemoryError
from expertshare.experts.slab import PAGE_BYTES, SlabFormat
from expertshare.experts.slots import Ints
from expertshare.experts.store import format_size
from expertshare.native import ask_for_huge_pages
from expertshare.types import Bank


def allocate_slabs(count: int, slab_bytes: int) -> Tensor:
    """Uninitialised uint8 [count, slab_bytes]; a page is taken from the system when it is first written.

    Raises ExpertMemoryError where the system refuses that much address space.
    """
    try:
        raw = torch.empty(count * slab_bytes + PAGE_BYTES, dtype=torch.uint8)
    except RuntimeError as error:  # what torch's allocator raises
        raise ExpertMemoryError(
            f"expected memory for {count} experts, got no {format_size(count * slab_bytes)} from the system: lower "
            "--expert-memory, or take mmap"
        ) from error
    start = -raw.data_ptr() % PAGE_BYTES
    slabs_SB = raw[start : start + count * slab_bytes].view(count, slab_bytes)
    ask_for_huge_pages(slabs_SB)
    return slabs_SB


def as_memory(slabs_SB: Tensor) -> memoryview:
    """The bytes of all slabs in one row, writable."""
    return slabs_SB.flatten().numpy().data


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
        """All slots, to compute with."""
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
        """The read of an expert straight into its slot."""
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
        """The index itself: the bank is in the host's memory."""
        return slot_of_E

    def close(self) -> None:
        """Let the memory of all slots go."""
        del self.bank, self._memory


def _read(read: ReadInto, memory: memoryview) -> Moved:
    read(memory)
    return Moved(read=True, copied=False)


_Queue = SimpleQueue["SlabRead | None"]


class SlabRead:
    """One expert being brought into its slot: run at most once, however often it is queued. Once queued it will be
    done, whatever is interrupted: brought (`moved` says how), skipped because nobody wants it any more, or with an
    error."""

    def __init__(self, bring: Callable[[], Moved], tell: Callable[[bool], None]) -> None:
        """tell: hears whether the expert is in its slot, before any thread that waits does."""
        self.error: BaseException | None = None
        self.moved: Moved | None = None
        self.queued = False
        self.unwanted = False
        self.skipped = False
        self._bring, self._tell = bring, tell
        self._claim = threading.Lock()
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether the expert is in its slot, or `skipped` or `error` says why not."""
        return self._done.is_set()

    def run(self) -> None:
        """Bring it, unless somebody else does."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            if self.unwanted:
                self.skipped = True
            else:
                self.moved = self._bring()
        except BaseException as error:  # carried to the thread that waits, whatever it is
            self.error = error
        finally:
            self._tell(self.moved is not None)
            self._done.set()

    def wait(self) -> None:
        """Until it is done. Ctrl-C gets through; the read then goes on behind."""
        self._done.wait()


class ReadTeam:
    """Threads that run reads in the order in which they are submitted."""

    def __init__(self, num_threads: int) -> None:
        self._queue: _Queue = SimpleQueue()
        # Daemons: a store that nobody closed must not keep the interpreter from leaving.
        self._threads = [
            threading.Thread(target=_work, args=(self._queue,), name=f"expert-reader-{i}", daemon=True)
            for i in range(num_threads)
        ]
        self._stop = weakref.finalize(self, _dismiss, self._queue, num_threads)
        for thread in self._threads:
            thread.start()

    def submit(self, read: SlabRead) -> None:
        """Have it run by some thread."""
        self._queue.put(read)
        read.queued = True

    def close(self) -> None:
        """Let the threads finish what they were given, and wait for them; twice is fine."""
        self._stop()
        for thread in self._threads:
            thread.join()


def _work(queue: _Queue) -> None:
    while (read := queue.get()) is not None:
        read.run()
        del read  # or the memory of the last slab would outlive its store


def _dismiss(queue: _Queue, num_threads: int) -> None:
    for _ in range(num_threads):
        queue.put(None)
