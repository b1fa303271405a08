"""Open the store that a user asked for."""

from __future__ import annotations

from pathlib import Path

from expertshare.errors import ConfigError
from expertshare.experts.budgeted import BudgetedStore
from expertshare.experts.layout import ExpertLayout
from expertshare.experts.sizes import ExpertMemory
from expertshare.experts.store import SlabStore
from expertshare.experts.whole import MappedStore, ResidentSlabs


def open_store(
    directory: Path, layout: ExpertLayout, memory: ExpertMemory, *, direct: bool = False, prefetch: bool = True
) -> SlabStore:
    """A store over a converted model; the caller closes it. Raises ConfigError, ExpertMemoryError, CheckpointError."""
    if memory.kind == "mmap":
        if direct:
            raise ConfigError("expected direct reads or a mapping, got both: leave out --direct-io or give a size")
        return MappedStore(directory, layout)
    if memory.kind == "all":
        return ResidentSlabs(directory, layout, direct=direct)
    return BudgetedStore(directory, layout, memory.num_bytes, prefetch=prefetch, direct=direct)
