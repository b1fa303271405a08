"""How slabs get from host memory into a GPU's while it computes: the order of copies and computation, and no more.

Nothing here decides which expert goes where; DeviceSlots does, and says what has to happen before what. Its rules are
tested on a machine without a GPU by a DeviceTransfer whose copies and computation happen as late as they may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from expertshare.errors import ConfigError, ExpertMemoryError
from expertshare.experts.sizes import format_size
from expertshare.experts.slab import PAGE_BYTES

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

    Who computes in several streams by turns must have each wait for the one before, as torch asks of any tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def slots(self, count: int, slab_bytes: int) -> Tensor:
        """See DeviceTransfer."""
        try:
            slabs_SB = torch.empty((count, slab_bytes), dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            free = torch.cuda.mem_get_info(self._device)[0]
            raise ExpertMemoryError(
                f"expected room for {count} experts on {self._device}, got no {format_size(count * slab_bytes)}: "
                f"{format_size(free)} are free, lower --expert-memory"
            ) from error
        slabs_SB.record_stream(self._side)  # or torch would hand it on while a last copy writes into it
        return slabs_SB

    def staging(self, count: int, slab_bytes: int) -> list[Tensor]:
        """See DeviceTransfer. The memory goes back to torch, which keeps it pinned for its next use."""
        return in_chunks(count, slab_bytes, pinned)

    def copy(self, slot_B: Tensor, staged_B: Tensor, *, after: torch.cuda.Event) -> torch.cuda.Event:
        """See DeviceTransfer."""
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._side):
            self._side.wait_event(after)
            slot_B.copy_(staged_B, non_blocking=True)
            done.record(self._side)
        return done

    def computed(self) -> torch.cuda.Event:
        """See DeviceTransfer."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def computation_waits(self, copied: torch.cuda.Event) -> None:
        """See DeviceTransfer."""
        torch.cuda.current_stream(self._device).wait_event(copied)

    def host_waits(self, copied: torch.cuda.Event) -> None:
        """See DeviceTransfer."""
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
