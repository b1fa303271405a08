"""Open the store that a user asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from expertshare.errors import ConfigError
from expertshare.experts.budgeted import BudgetedStore
from expertshare.experts.device_slots import CudaTransfer, DeviceSlots
from expertshare.experts.layout import ExpertLayout
from expertshare.experts.store import ExpertMemory, SlabStore, format_size
from expertshare.experts.whole import MappedStore, ResidentSlabs

ALL = ExpertMemory(kind="all")
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOptions:
    """Which store, and how it reads. memory: of the model's device. direct: past the page cache. prefetch: whether a
    budgeted store reads ahead. host_memory: beside a budget on a GPU, pinned memory of the host for experts that are
    then not read again."""

    memory: ExpertMemory = ALL
    direct: bool = False
    prefetch: bool = True
    host_memory: ExpertMemory | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values by name; memory as it can be given again."""
        host = {} if self.host_memory is None else {"host_memory": str(self.host_memory)}
        return {"memory": str(self.memory), "direct": self.direct, "prefetch": self.prefetch, **host}


def open_store(directory: Path, layout: ExpertLayout, options: StoreOptions, device: torch.device = CPU) -> SlabStore:
    """A store over a converted model, for a model on `device`; the caller closes it. Raises ConfigError,
    ExpertMemoryError, CheckpointError."""
    memory = options.memory
    check_options(options, device)
    if memory.kind == "mmap":
        return MappedStore(directory, layout)
    if memory.kind == "all":
        return ResidentSlabs(directory, layout, direct=options.direct, device=device)
    open_budget = partial(
        BudgetedStore, directory, layout, memory.num_bytes, prefetch=options.prefetch, direct=options.direct
    )
    if device.type == "cpu":
        return open_budget()
    slots = partial(DeviceSlots, transfer=CudaTransfer(device), num_kept=num_kept(layout, options))
    return open_budget(memory=slots)


def check_options(options: StoreOptions, device: torch.device) -> None:
    """Raise ConfigError for options that contradict each other, or that the device does not have."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"expected a model on the CPU or on a CUDA device for its expert store, got {device}")
    if options.memory.kind == "mmap":
        if device.type != "cpu":
            raise ConfigError(
                f"a mapping is memory of the host, but the model is on {device}: give --expert-memory a size, or all"
            )
        if options.direct:
            raise ConfigError("expected direct reads or a mapping, got both: leave out --direct-io or give a size")
    if options.host_memory is None:
        return
    if device.type == "cpu":
        raise ConfigError(
            "--host-memory keeps experts beside a GPU, but the model is on the CPU: give all of it to --expert-memory"
        )
    if options.memory.kind == "all":
        raise ConfigError(
            "expected --host-memory beside an --expert-memory of some size, got all experts on the GPU: leave one out"
        )


def num_kept(layout: ExpertLayout, options: StoreOptions) -> int:
    """Experts that stay in the host's memory beside a budget on a GPU. Raises ConfigError where that holds none."""
    host, slab_bytes = options.host_memory, layout.format.slab_bytes
    if host is None:
        return 0
    count = host.slabs(slab_bytes, layout.num_layers * layout.num_experts)
    if count < 1:
        raise ConfigError(
            f"expected a host memory of at least {format_size(slab_bytes)}, which is one expert, got "
            f"{format_size(host.num_bytes)}: raise --host-memory, or leave it out"
        )
    return count
