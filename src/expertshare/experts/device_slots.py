"""Slots in the memory of a GPU, filled from the files, or from experts that are kept in the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Generic

import torch
from torch import Tensor

from expertshare.experts.forecast import Ints
from expertshare.experts.page_memory import as_memory
from expertshare.experts.slab import SlabFormat
from expertshare.experts.slot_memory import Moved, ReadInto
from expertshare.experts.transfer import DeviceTransfer, T

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
            self._room = transfer.staging(num_kept, form.slab_bytes)
            staged = transfer.staging(NUM_STAGED, form.slab_bytes)
        self._transfer = transfer
        self._staged: SimpleQueue[tuple[Tensor, T | None]] = SimpleQueue()
        for slab_B in staged:
            self._staged.put((slab_B, None))
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._arrivals: dict[int, T] = {}

    def bringing(self, slot: int, layer: int, expert: int, read: ReadInto) -> Callable[[], Moved]:
        """See SlotMemory."""
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
        """On the device."""
        return self._transfer.beside(slot_of_E)

    def close(self) -> None:
        """Let the memory go; what is still being copied keeps its own until it is done."""
        del self.bank, self._slabs_SB, self._staged
        self._room.clear()
        self._kept.clear()
        self._arrivals.clear()

    def _bring(self, slot: int, whose: tuple[int, int], read: ReadInto, vacant: T) -> Moved:
        kept_B = self._kept.get(whose)
        if kept_B is not None:
            self._copy(slot, kept_B, vacant)
            return Moved(read=False, copied=True)
        room_B = self._take_room()
        if room_B is None:
            self._bring_staged(slot, read, vacant)
        else:
            self._bring_to_stay(slot, whose, read, room_B, vacant)
        return Moved(read=True, copied=True)

    def _take_room(self) -> Tensor | None:
        """A slab for an expert that will stay. Readers race for the last one; one of them gets it."""
        try:
            return self._room.pop()
        except IndexError:
            return None

    def _bring_to_stay(self, slot: int, whose: tuple[int, int], read: ReadInto, room_B: Tensor, vacant: T) -> None:
        try:
            read(as_memory(room_B))
        except BaseException:  # somebody else may have it
            self._room.append(room_B)
            raise
        self._kept[whose] = room_B
        self._copy(slot, room_B, vacant)

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
