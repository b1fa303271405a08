"""Open the store that a user asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertshare.errors import ConfigError
from expertshare.experts.budgeted import BudgetedStore
from expertshare.experts.layout import ExpertLayout
from expertshare.experts.sizes import ExpertMemory
from expertshare.experts.store import SlabStore
from expertshare.experts.whole import MappedStore, ResidentSlabs

ALL = ExpertMemory(kind="all")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOptions:
    """Which store, and how it reads. direct: past the page cache. prefetch: whether a budgeted store reads ahead."""

    memory: ExpertMemory = ALL
    direct: bool = False
    prefetch: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values by name; the memory as it can be given again."""
        return {"memory": str(self.memory), "direct": self.direct, "prefetch": self.prefetch}


def open_store(directory: Path, layout: ExpertLayout, options: StoreOptions) -> SlabStore:
    """A store over a converted model; the caller closes it. Raises ConfigError, ExpertMemoryError, CheckpointError."""
    memory = options.memory
    if memory.kind == "mmap":
        if options.direct:
            raise ConfigError("expected direct reads or a mapping, got both: leave out --direct-io or give a size")
        return MappedStore(directory, layout)
    if memory.kind == "all":
        return ResidentSlabs(directory, layout, direct=options.direct)
    return BudgetedStore(directory, layout, memory.num_bytes, prefetch=options.prefetch, direct=options.direct)
