"""Slots of a budgeted store, in the memory of the host or of a GPU: how the bytes of an expert get into one.

A few reader threads read files. Experts for a GPU pass through memory of the host that it can copy from, or stay there,
and are copied while the GPU computes.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import torch
from torch import Tensor

from expertshare.errors import ConfigError, ExpertMemoryError
from expertshare.experts.slab import PAGE_BYTES, SlabFormat, allocate_slabs, as_memory, format_size, whole_slabs
from expertshare.experts.slots import Ints
from expertshare.types import Bank

NUM_STAGED = 8
"""Slabs of the host that experts pass through: two for each reader, so that it reads one while another is copied."""
_CHUNK_BYTES = 2**30
"""torch rounds pinned memory up to a power of two: in pieces of nearly that much, little of it is wasted."""

ReadInto = Callable[[memoryview], None]
"""Reads an expert's slab from its file; raises CheckpointError."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What it took to bring an expert. read: from its file; copied: over the bus of a device."""

    read: bool
    copied: bool


class SlotMemory(ABC):
    """Slots in some memory. Which expert goes into which slot is decided elsewhere. bank: all slots, to compute with.

    Everything is called by the thread that borrows, but what `bringing` returns: reader threads run that, unless the
    expert is at hand.
    """

    usable_at_once = False
    """Whether an expert can be computed with as soon as it has been brought, and needs no `lend`."""
    bank: Bank

    @abstractmethod
    def bringing(self, slot: int, layer: int, expert: int, read: ReadInto) -> Callable[[], Moved]:
        """What brings an expert into a slot that nobody has borrowed now. Computation that was issued before this call
        may still be reading the slot; none that is issued later does before `lend`."""

    def at_hand(self, layer: int, expert: int) -> bool:
        """Whether bringing it takes no reading, and so no time of the thread that does it."""
        return False

    @abstractmethod
    def lend(self, slots: Ints) -> None:
        """Computation that is issued from now on reads these slots, whose experts have all been brought."""

    def beside(self, slot_of_E: Tensor) -> Tensor:
        """The index (int64, of the host) in the memory in which the bank is."""
        return slot_of_E

    @abstractmethod
    def close(self) -> None:
        """Let the memory go. No reader runs any more; a bank that is still lent keeps its memory."""


class HostSlots(SlotMemory):
    """Files are read straight into the slots, and what is there can be computed with. Raises ExpertMemoryError where
    the system refuses the memory."""

    usable_at_once = True

    def __init__(self, form: SlabFormat, num_slots: int) -> None:
        slabs_SB = allocate_slabs(num_slots, form.slab_bytes)
        self._memory, self._slab_bytes = as_memory(slabs_SB), form.slab_bytes
        self.bank = form.bank(slabs_SB)

    def bringing(self, slot: int, layer: int, expert: int, read: ReadInto) -> Callable[[], Moved]:
        """The read of an expert straight into its slot."""
        size = self._slab_bytes
        memory = self._memory[slot * size : (slot + 1) * size]

        def bring() -> Moved:
            read(memory)
            return Moved(read=True, copied=False)

        return bring

    def lend(self, slots: Ints) -> None:
        """Nothing has to be waited for."""

    def close(self) -> None:
        """Let the memory of all slots go."""
        del self.bank, self._memory


class CudaTransfer:
    """Copies from the host to a GPU in the order in which they are issued, in a stream of their own, beside the GPU's
    computation in the current stream. A caller that computes in several streams must have each wait for the one before,
    as torch asks of any tensor.

    An event is a point in the order of copies, or in that of computation, which may lie in the future. `copy` and
    `host_waits` may be called by any thread, the others by the one that issues the computation. The host waits in
    `host_waits` alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def slots(self, count: int, slab_bytes: int) -> Tensor:
        """Memory of the GPU, uint8 [count, slab_bytes], which the copying stream uses too. Raises ExpertMemoryError
        where there is not so much."""
        try:
            slabs_SB = torch.empty((count, slab_bytes), dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            free = torch.cuda.mem_get_info(self._device)[0]
            raise ExpertMemoryError(
                f"expected memory for {count} experts on {self._device}, got no {format_size(count * slab_bytes)}: "
                f"{format_size(free)} are free, lower --expert-memory"
            ) from error
        slabs_SB.record_stream(self._side)  # or torch would hand it on while a last copy writes into it
        return slabs_SB

    def staging(self, count: int, slab_bytes: int) -> list[Tensor]:
        """Memory of the host that copies can be made from: uint8 [slab_bytes] each, which begins at a page. It goes
        back to torch, which keeps it pinned for its next use. Raises ConfigError where the system does not give it."""
        return in_chunks(count, slab_bytes, pinned)

    def copy(self, slot_B: Tensor, staged_B: Tensor, *, after: torch.cuda.Event) -> torch.cuda.Event:
        """Copy once `after` has been reached, and after all copies before. Returns the point where it is done."""
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._side):
            self._side.wait_event(after)
            slot_B.copy_(staged_B, non_blocking=True)
            done.record(self._side)
        return done

    def computed(self) -> torch.cuda.Event:
        """The point where all computation is done that has been issued so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def computation_waits(self, copied: torch.cuda.Event) -> None:
        """Computation that is issued from now on happens after this copy."""
        torch.cuda.current_stream(self._device).wait_event(copied)

    def host_waits(self, copied: torch.cuda.Event) -> None:
        """Return when this copy is done; the thread sleeps until then."""
        copied.synchronize()

    def beside(self, index_E: Tensor) -> Tensor:
        """A small tensor of the host in the GPU's memory, for computation that is issued from now on. From memory that
        is not pinned, which the driver has read before this returns."""
        return index_E.to(self._device, non_blocking=True)


def in_chunks(count: int, slab_bytes: int, allocate: Callable[[int], Tensor]) -> list[Tensor]:
    """Slabs that begin at a page each, cut from pieces (uint8 [bytes]) of memory."""
    most = max(1, (_CHUNK_BYTES - PAGE_BYTES) // slab_bytes)
    slabs: list[Tensor] = []
    while len(slabs) < count:
        size = min(most, count - len(slabs)) * slab_bytes
        slabs += whole_slabs(allocate(size + PAGE_BYTES), slab_bytes).unbind()
    return slabs


def pinned(num_bytes: int) -> Tensor:
    """Uninitialised memory of the host that a GPU copies from by itself. Raises ConfigError where there is none."""
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:  # what torch raises for a refusal of the driver
        raise ConfigError(
            f"expected {format_size(num_bytes)} more of pinned host memory for experts on their way to the GPU, got "
            f"none ({str(error).splitlines()[0]}): raise the limit of locked memory (`ulimit -l unlimited`; for a "
            "container `--ulimit memlock=-1` and a higher memory limit), or lower --host-memory"
        ) from error


class DeviceSlots(SlotMemory):
    """Slots of a device. An expert is read into memory of the host that the device can copy from, then copied.

    num_kept: experts that stay in the host's memory, the first that are read; they are never read again. All others
    pass through NUM_STAGED slabs.

    What waits for what: a copy into a slot for all computation that was issued before the slot was given to another
    expert; computation for the copies into its slots; a reader for the copy from the slab that it wants to read into.
    The thread that borrows waits until copies are issued, never until they are done.
    """

    def __init__(self, form: SlabFormat, num_slots: int, *, transfer: CudaTransfer, num_kept: int = 0) -> None:
        with torch.inference_mode(False):  # readers write into these, and they are not in that mode
            self._slabs_SB = transfer.slots(num_slots, form.slab_bytes)
            self.bank = form.bank(self._slabs_SB)
            self._spare = transfer.staging(num_kept, form.slab_bytes)
            staged = transfer.staging(NUM_STAGED, form.slab_bytes)
        self._transfer = transfer
        self._staged: SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = SimpleQueue()
        for slab_B in staged:
            self._staged.put((slab_B, None))
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._arrivals: dict[int, torch.cuda.Event] = {}

    def bringing(self, slot: int, layer: int, expert: int, read: ReadInto) -> Callable[[], Moved]:
        """The copy of an expert into a slot, read first unless it is kept."""
        return partial(self._bring, slot, (layer, expert), read, self._transfer.computed())

    def at_hand(self, layer: int, expert: int) -> bool:
        """Whether the host keeps it."""
        return (layer, expert) in self._kept

    def lend(self, slots: Ints) -> None:
        """Computation waits for those that have been copied since they were last lent."""
        for slot in slots.tolist():
            arrival = self._arrivals.get(slot)
            if arrival is not None:
                self._transfer.computation_waits(arrival)
                del self._arrivals[slot]  # not earlier: after an interrupt in between somebody has to wait

    def beside(self, slot_of_E: Tensor) -> Tensor:
        """The index in the memory of the device."""
        return self._transfer.beside(slot_of_E)

    def close(self) -> None:
        """See SlotMemory. What is still being copied keeps its own memory until it is done."""
        del self.bank, self._slabs_SB, self._staged
        self._spare.clear()
        self._kept.clear()
        self._arrivals.clear()

    def _bring(self, slot: int, owner: tuple[int, int], read: ReadInto, vacant: torch.cuda.Event) -> Moved:
        kept_B = self._kept.get(owner)
        if kept_B is not None:
            self._copy(slot, kept_B, vacant)
            return Moved(read=False, copied=True)
        try:
            spare_B = self._spare.pop()  # readers race for the last one; one of them gets it
        except IndexError:
            self._bring_staged(slot, read, vacant)
        else:
            self._bring_to_stay(slot, owner, read, spare_B, vacant)
        return Moved(read=True, copied=True)

    def _bring_to_stay(
        self, slot: int, owner: tuple[int, int], read: ReadInto, spare_B: Tensor, vacant: torch.cuda.Event
    ) -> None:
        try:
            read(as_memory(spare_B))
        except BaseException:  # somebody else may have it
            self._spare.append(spare_B)
            raise
        self._kept[owner] = spare_B
        self._copy(slot, spare_B, vacant)

    def _bring_staged(self, slot: int, read: ReadInto, vacant: torch.cuda.Event) -> None:
        staged_B, used = self._staged.get()
        try:
            if used is not None:
                self._transfer.host_waits(used)
                used = None
            read(as_memory(staged_B))
            used = self._copy(slot, staged_B, vacant)
        finally:
            self._staged.put((staged_B, used))

    def _copy(self, slot: int, slab_B: Tensor, vacant: torch.cuda.Event) -> torch.cuda.Event:
        copied = self._transfer.copy(self._slabs_SB[slot], slab_B, after=vacant)
        self._arrivals[slot] = copied
        return copied


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
        self._bring, self._tell = bring, tell
        self._claim = threading.Lock()
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether the expert is in its slot, or will not be: `moved` is then None."""
        return self._done.is_set()

    def run(self) -> None:
        """Bring it, unless somebody else does."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            if not self.unwanted:
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
