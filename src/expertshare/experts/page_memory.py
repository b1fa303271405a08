"""Memory for slabs: anonymous, aligned to pages, so that O_DIRECT may read into it."""

from __future__ import annotations

import torch
from torch import Tensor

from expertshare.errors import ExpertMemoryError
from expertshare.experts.sizes import format_size
from expertshare.experts.slab import PAGE_BYTES
from expertshare.native import ask_for_huge_pages


def allocate_slabs(count: int, slab_bytes: int) -> Tensor:
    """Uninitialised uint8 [count, slab_bytes]; a page is taken from the system when it is first written.

    Raises ExpertMemoryError where the system refuses that much address space.
    """
    try:
        raw = torch.empty(count * slab_bytes + PAGE_BYTES, dtype=torch.uint8)
    except RuntimeError as error:  # what torch's allocator raises
        raise ExpertMemoryError(
            f"expected room for {count} experts, got no {format_size(count * slab_bytes)} from the system: lower "
            "--expert-memory, or take mmap"
        ) from error
    start = -raw.data_ptr() % PAGE_BYTES
    slabs_SB = raw[start : start + count * slab_bytes].view(count, slab_bytes)
    ask_for_huge_pages(slabs_SB)
    return slabs_SB


def as_memory(slabs_SB: Tensor) -> memoryview:
    """The bytes of all slabs in one row, writable."""
    return slabs_SB.flatten().numpy().data
