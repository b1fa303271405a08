"""Experts in a fixed number of slots, filled by explicit reads: the budget is what the process really uses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from expertshare.errors import ConfigError, ExpertMemoryError
from expertshare.experts.layout import ExpertLayout, open_layers
from expertshare.experts.slab import SlabFormat, format_size
from expertshare.experts.slot_memory import HostSlots, Moved, ReadTeam, SlabRead, SlotMemory
from expertshare.experts.slots import Ints, ReuseForecast, SlotTable, needed_last
from expertshare.experts.store import LayerStatistics, SlabStore
from expertshare.types import Loan

NUM_READERS = 4
"""Enough to keep an SSD busy; they wait for the disk, not for a core."""

_NONE: Ints = np.empty(0, dtype=np.int64)


class _Lease:
    """Slots that somebody uses. It ends with its borrower's frame even where an interrupt hits the giving back."""

    __slots__ = ("__weakref__", "slots")

    def __init__(self) -> None:
        self.slots = _NONE


class _Arrivals:
    """The slots of a loan, some of which are being filled."""

    def __init__(self, wait: Callable[[], None], count: LayerStatistics, states_S: Tensor) -> None:
        self.wait, self._count, self.states_S = wait, count, states_S

    def waited(self, seconds: float) -> None:
        """A kernel that looked at the states waited so long for them."""
        self._count.stall_s += seconds


class BudgetedStore(SlabStore):
    """A SlabStore whose slots, shared by all layers, take at most `budget_bytes`.

    Borrowed experts stay where they are. On a miss the expert goes that ReuseForecast expects to be needed last.
    prefetch: behind a layer's own reads, and while it computes, read those of the next layer's last experts that are
    missing, each in the place of one that is needed later. direct: read past the page cache (O_DIRECT). memory: makes
    so many slots, by default in the host's memory; with DeviceSlots the budget is memory of a GPU.

    An interrupt or a failed read leaves it consistent: a slot counts as filled only when all its bytes are there.
    Raises ExpertMemoryError where the budget does not hold one expert, and `borrow` where it does not hold a layer's.
    """

    kind = "budget"

    def __init__(
        self,
        directory: Path,
        layout: ExpertLayout,
        budget_bytes: int,
        *,
        prefetch: bool = True,
        direct: bool = False,
        memory: Callable[[SlabFormat, int], SlotMemory] = HostSlots,
    ) -> None:
        slab_bytes = layout.format.slab_bytes
        num_slots = min(budget_bytes // slab_bytes, layout.num_layers * layout.num_experts)
        if num_slots < 1:
            raise ExpertMemoryError(
                f"expected an expert memory of at least {format_size(slab_bytes)}, which is one expert, got "
                f"{format_size(budget_bytes)}: raise --expert-memory"
            )
        super().__init__(layout, num_slots)
        self._prefetch, self._pid = prefetch, os.getpid()
        self._slots = memory(layout.format, num_slots)
        self._files = open_layers(directory, layout, direct=direct)
        self._table = SlotTable(num_slots, layout.num_layers, layout.num_experts)
        with torch.inference_mode(False):
            self._states_S = torch.from_numpy(self._table.states_S)
        self._forecast = ReuseForecast(layout.num_layers, layout.num_experts)
        self._pending: dict[int, SlabRead] = {}
        self._leases: WeakSet[_Lease] = WeakSet()
        self._team = ReadTeam(NUM_READERS)
        self._closed = False

    @contextmanager
    def borrow(self, layer: int, active_E: Tensor, *, early: bool = False) -> Iterator[Loan]:
        """The active experts of a layer, in slots. Waits for active_E where that is on a device. early: those that
        have to be read may come while the loan is used. Raises ExpertMemoryError or CheckpointError."""
        if self._closed:
            raise ConfigError("expected an open expert store, got one that was closed: open it again")
        if os.getpid() != self._pid:
            raise ConfigError("this expert store was opened before the process forked: open one in the new process")
        active_E = active_E.cpu()
        member_E = active_E.numpy()
        lease = _Lease()
        try:
            self._leases.add(lease)
            self._forecast.observe(layer, member_E)
            active = np.flatnonzero(member_E)
            self._request(layer, active, lease)
            if self._prefetch:  # behind this layer's own: the storage has work while these are waited for
                self._fetch_ahead(layer)
            wait = partial(self._wait_for, layer, active, lease)
            early = early and self._slots.usable_at_once and not self._table.ready_S[lease.slots].all()
            if not early:
                wait()
            slot_of_E = torch.full((len(member_E),), -1, dtype=torch.int64)
            slot_of_E[active_E] = torch.from_numpy(lease.slots)
            arrivals = _Arrivals(wait, self._counts[layer], self._states_S) if early else None
            yield Loan(self._slots.bank, self._slots.beside(slot_of_E), arrivals)
            if early:
                wait()
        finally:
            lease.slots = _NONE

    def close(self) -> None:
        """See SlabStore. Waits for the reads that are under way."""
        if self._closed:
            return
        self._closed = True
        for read in self._pending.values():
            read.unwanted = True
        if os.getpid() == self._pid:
            self._team.close()
        for file in self._files:
            file.close()
        self._pending.clear()
        self._slots.close()

    def _request(self, layer: int, active: Ints, lease: _Lease) -> None:
        """Lend the slots of these experts, and start reading those that are in none."""
        for slot in list(self._pending):
            self._settle(slot)
        slot_of_E = self._table.slot_of_NE[layer]
        present = slot_of_E[active]
        lease.slots = present[present >= 0]
        missing = active[present < 0]
        for slot, expert in zip(self._vacate(len(missing), layer, len(active)).tolist(), missing.tolist(), strict=True):
            self._fetch(slot, layer, expert, ahead=False)
        slots: Ints = slot_of_E[active]
        lease.slots = slots
        ahead = int(self._table.ahead_S[slots].sum())
        self._table.ahead_S[slots] = False
        self._counts[layer].count(len(active), len(active) - len(missing) - ahead, ahead)

    def _wait_for(self, layer: int, active: Ints, lease: _Lease) -> None:
        """Until the experts of lent slots are there."""
        slots, start = lease.slots, time.perf_counter()
        waits = not self._table.ready_S[slots].all()
        for slot, expert in zip(slots.tolist(), active.tolist(), strict=True):
            while not self._table.ready_S[slot]:
                self._await(slot, layer, expert)
        self._slots.lend(slots)
        self._counts[layer].stall_s += time.perf_counter() - start if waits else 0.0

    def _vacate(self, count: int, layer: int, needed: int) -> Ints:
        """Slots for `count` experts of a layer: free ones first, then those of experts that are needed last."""
        if count == 0:
            return _NONE
        for slot in self._unwanted():  # a layer that waits goes before what was fetched ahead
            self._pending[slot].unwanted = True
        slots = self._candidates(layer)
        if len(slots) < count:  # in the end also what is being read for somebody else
            for slot in self._unwanted():
                self._finish(slot)
            slots = self._candidates(layer)
        if len(slots) < count:
            slab_bytes, have = self._layout.format.slab_bytes, self._num_slots
            raise ExpertMemoryError(
                f"MoE layer {layer} needs {needed} experts at once: expected an expert memory of at least "
                f"{format_size(needed * slab_bytes)}, got {format_size(have * slab_bytes)}, which holds {have}. Raise "
                "--expert-memory (expertshare plan says what is enough for every step under a policy), or let blocks "
                f"share fewer experts (e.g. --policy des-vote --budget {have}), or decode fewer prompts together"
            )
        return slots[:count]

    def _candidates(self, layer: int, *, spare: Ints = _NONE) -> Ints:
        """Slots that may be filled, best first. spare: slots that may not, beside those lent or being filled."""
        filling = np.array(list(self._pending), dtype=np.int64)
        kept = np.concatenate((spare, filling, *(lease.slots for lease in self._leases)))
        return needed_last(self._table, self._forecast, layer, kept)

    def _fetch_ahead(self, layer: int) -> None:
        """Start reading what the next layer used last, each expert in the place of one that is needed much later: what
        is needed within half a round would soon have to be read again, and the storage is what there is too little of.
        """
        following, table, forecast = (layer + 1) % self._layout.num_layers, self._table, self._forecast
        last = np.flatnonzero(forecast.last_NE[following])
        present = table.slot_of_NE[following, last]
        missing = last[present < 0]
        if following == layer or not len(missing):
            return
        until = forecast.layers_until_use(layer, following, missing)
        soonest = np.argsort(until, kind="stable")
        slots = self._candidates(layer, spare=present[present >= 0])
        for slot, index in zip(slots.tolist(), soonest.tolist(), strict=False):
            owner, expert = table.layer_S[slot], table.expert_S[slot : slot + 1]
            least = until[index] + self._layout.num_layers / 2
            if owner >= 0 and forecast.layers_until_use(layer, owner, expert)[0] < least:
                return
            self._fetch(slot, following, int(missing[index]), ahead=True)

    def _fetch(self, slot: int, layer: int, expert: int, *, ahead: bool) -> None:
        """Start bringing an expert into a slot that nobody uses; one that is at hand is there when this returns."""
        self._table.place(slot, layer, expert, ahead=ahead)
        bring = self._slots.bringing(slot, layer, expert, partial(self._files[layer].read_into, expert))
        if self._slots.at_hand(layer, expert):
            self._note(slot, bring())
            self._table.tell(slot, True)
            return
        read = SlabRead(bring, partial(self._table.tell, slot))
        self._pending[slot] = read  # before it is queued: an interrupt must not leave a read that nobody knows
        self._team.submit(read)

    def _await(self, slot: int, layer: int, expert: int) -> None:
        """Wait for the bytes of a lent slot. Raises the error of its read."""
        if slot not in self._pending:  # its read was skipped, or an interrupt came between placing and reading
            self._fetch(slot, layer, expert, ahead=False)
            if self._table.ready_S[slot]:
                return
        read = self._finish(slot)
        if read.error is not None:
            raise read.error

    def _finish(self, slot: int) -> SlabRead:
        read = self._pending[slot]
        if not read.queued:  # an interrupt came between noting and queueing it
            self._team.submit(read)
        read.wait()
        self._settle(slot)
        return read

    def _settle(self, slot: int) -> None:
        """Take note of a read that is done: the slot is filled, or free."""
        read = self._pending[slot]
        if not read.done:
            return
        if read.moved is not None:
            self._note(slot, read.moved)
        else:  # the next layer that needs the expert reads it again, and raises the error if it lasts
            self._table.clear(slot)
        del self._pending[slot]

    def _note(self, slot: int, moved: Moved) -> None:
        """A slot has its expert."""
        self._table.ready_S[slot] = True
        count = self._counts[self._table.layer_S[slot]]
        count.reads += moved.read
        count.copies += moved.copied

    def _unwanted(self) -> set[int]:
        """Slots that are being filled while no borrower waits for them."""
        return set(self._pending).difference(*(lease.slots.tolist() for lease in self._leases))
