"""Slots in the memory of a GPU, filled from files or from experts kept in the host's memory, while the GPU computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from expertshare.errors import ConfigError, ExpertMemoryError
from expertshare.experts.slab import PAGE_BYTES, SlabFormat
from expertshare.experts.slot_memory import Moved, ReadInto, as_memory
from expertshare.experts.slots import Ints
from expertshare.experts.store import format_size

T = TypeVar("T")
"""A point in the order of copies, or in that of computation, which may lie in the future."""

_CHUNK_BYTES = 2**30
"""torch rounds pinned memory up to a power of two: in pieces of nearly that much, little of it is wasted."""


class DeviceTransfer(Protocol[T]):
    """Copies from the host to a device in the order in which they are issued, beside the device's computation, which is
    in an order of its own.

    `copy` and `host_waits` may be called by any thread, the others by the one that issues the computation. The host
    waits in `host_waits` alone.
    """

    def slots(self, count: int, slab_bytes: int) -> Tensor:
        """Memory of the device, uint8 [count, slab_bytes]. Raises ExpertMemoryError where there is not so much."""
        ...

    def staging(self, count: int, slab_bytes: int) -> list[Tensor]:
        """Memory of the host that copies can be made from: uint8 [slab_bytes] each, which begins at a page. Raises
        ConfigError where the system does not give it."""
        ...

    def copy(self, slot_B: Tensor, staged_B: Tensor, *, after: T) -> T:
        """Copy once `after` has been reached, and after all copies before. Returns the point where it is done."""
        ...

    def computed(self) -> T:
        """The point where all computation is done that has been issued so far."""
        ...

    def computation_waits(self, copied: T) -> None:
        """Computation that is issued from now on happens after this copy."""
        ...

    def host_waits(self, copied: T) -> None:
        """Return when this copy is done."""
        ...

    def beside(self, index_E: Tensor) -> Tensor:
        """A small tensor of the host in the device's memory, for computation that is issued from now on."""
        ...


class CudaTransfer:
    """DeviceTransfer of a GPU: copies run in a stream of their own, computation in the current stream.

    A caller that computes in several streams must have each wait for the one before, as torch asks of any tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def slots(self, count: int, slab_bytes: int) -> Tensor:
        """Memory of the GPU, which the copying stream uses too."""
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
        """See DeviceTransfer. The memory goes back to torch, which keeps it pinned for its next use."""
        return in_chunks(count, slab_bytes, pinned)

    def copy(self, slot_B: Tensor, staged_B: Tensor, *, after: torch.cuda.Event) -> torch.cuda.Event:
        """Issue a copy in the side stream behind `after`."""
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._side):
            self._side.wait_event(after)
            slot_B.copy_(staged_B, non_blocking=True)
            done.record(self._side)
        return done

    def computed(self) -> torch.cuda.Event:
        """An event in the current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def computation_waits(self, copied: torch.cuda.Event) -> None:
        """Have the current stream wait for the copy's event."""
        torch.cuda.current_stream(self._device).wait_event(copied)

    def host_waits(self, copied: torch.cuda.Event) -> None:
        """Block this thread until the copy's event."""
        copied.synchronize()

    def beside(self, index_E: Tensor) -> Tensor:
        """See DeviceTransfer. From memory that is not pinned, which the driver has read before this returns."""
        return index_E.to(self._device, non_blocking=True)


def in_chunks(count: int, slab_bytes: int, allocate: Callable[[int], Tensor]) -> list[Tensor]:
    """Slabs that begin at a page each, cut from pieces (uint8 [bytes]) of memory."""
    most = max(1, (_CHUNK_BYTES - PAGE_BYTES) // slab_bytes)
    slabs: list[Tensor] = []
    while len(slabs) < count:
        size = min(most, count - len(slabs)) * slab_bytes
        raw = allocate(size + PAGE_BYTES)
        start = -raw.data_ptr() % PAGE_BYTES
        slabs += raw[start : start + size].view(-1, slab_bytes).unbind()
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


NUM_STAGED = 8
"""Slabs of the host that experts pass through: two for each reader, so that it reads one while another is copied."""


class DeviceSlots(Generic[T]):
    """SlotMemory of a device. An expert is read into memory of the host that the device can copy from, then copied.

    num_kept: experts that stay in the host's memory, the first that are read; they are never read again. All others
    pass through NUM_STAGED slabs.

    What waits for what: a copy into a slot for all computation that was issued before the slot was given to another
    expert; computation for the copies into its slots; a reader for the copy from the slab that it wants to read into.
    The thread that borrows waits until copies are issued, never until they are done.
    """

    usable_at_once = False

    def __init__(self, form: SlabFormat, num_slots: int, *, transfer: DeviceTransfer[T], num_kept: int = 0) -> None:
        with torch.inference_mode(False):  # readers write into these, and they are not in that mode
            self._slabs_SB = transfer.slots(num_slots, form.slab_bytes)
            self.bank = form.bank(self._slabs_SB)
            self._spare = transfer.staging(num_kept, form.slab_bytes)
            staged = transfer.staging(NUM_STAGED, form.slab_bytes)
        self._transfer = transfer
        self._staged: SimpleQueue[tuple[Tensor, T | None]] = SimpleQueue()
        for slab_B in staged:
            self._staged.put((slab_B, None))
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._arrivals: dict[int, T] = {}

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
        """Let the memory go; what is still being copied keeps its own until it is done."""
        del self.bank, self._slabs_SB, self._staged
        self._spare.clear()
        self._kept.clear()
        self._arrivals.clear()

    def _bring(self, slot: int, whose: tuple[int, int], read: ReadInto, vacant: T) -> Moved:
        kept_B = self._kept.get(whose)
        if kept_B is not None:
            self._copy(slot, kept_B, vacant)
            return Moved(read=False, copied=True)
        spare_B = self._take_spare()
        if spare_B is None:
            self._bring_staged(slot, read, vacant)
        else:
            self._bring_to_stay(slot, whose, read, spare_B, vacant)
        return Moved(read=True, copied=True)

    def _take_spare(self) -> Tensor | None:
        """A slab for an expert that will stay. Readers race for the last one; one of them gets it."""
        try:
            return self._spare.pop()
        except IndexError:
            return None

    def _bring_to_stay(self, slot: int, whose: tuple[int, int], read: ReadInto, spare_B: Tensor, vacant: T) -> None:
        try:
            read(as_memory(spare_B))
        except BaseException:  # somebody else may have it
            self._spare.append(spare_B)
            raise
        self._kept[whose] = spare_B
        self._copy(slot, spare_B, vacant)

    def _bring_staged(self, slot: int, read: ReadInto, vacant: T) -> None:
        staged_B, used = self._staged.get()
        try:
            if used is not None:
                self._transfer.host_waits(used)
                used = None
            read(as_memory(staged_B))
            used = self._copy(slot, staged_B, vacant)
        finally:
            self._staged.put((staged_B, used))

    def _copy(self, slot: int, slab_B: Tensor, vacant: T) -> T:
        copied = self._transfer.copy(self._slabs_SB[slot], slab_B, after=vacant)
        self._arrivals[slot] = copied
        return copied
