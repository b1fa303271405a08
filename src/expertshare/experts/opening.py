"""Open the store that a user asked for, in the memory that they give to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from expertshare.errors import ConfigError, InputError
from expertshare.experts.budgeted import BudgetedStore
from expertshare.experts.layout import ExpertLayout
from expertshare.experts.slab import format_size, parse_size
from expertshare.experts.slot_memory import CudaTransfer, DeviceSlots
from expertshare.experts.store import MappedStore, ResidentSlabs, SlabStore

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMemory:
    """Where experts are kept. kind "all": in memory, all of them; "mmap": mapped, the kernel decides; "budget": slots
    of num_bytes altogether, filled by explicit reads."""

    kind: Literal["all", "mmap", "budget"]
    num_bytes: int = 0

    @staticmethod
    def parse(text: str) -> ExpertMemory:
        """From `all`, `mmap` or a size; InputError for anything else."""
        if text in ("all", "mmap"):
            return ExpertMemory(kind="all" if text == "all" else "mmap")
        try:
            return ExpertMemory(kind="budget", num_bytes=parse_size(text))
        except InputError as error:
            raise InputError(f"expert memory: {error}, or all, or mmap") from error

    @staticmethod
    def parse_host(text: str) -> ExpertMemory:
        """Memory of the host beside a GPU, from `all` or a size; InputError for anything else."""
        try:
            return ALL if text == "all" else ExpertMemory(kind="budget", num_bytes=parse_size(text))
        except InputError as error:
            raise InputError(f"host memory: {error}, or all") from error

    def slabs(self, slab_bytes: int, num_experts: int) -> int:
        """How many of so many experts it holds."""
        return {"all": num_experts, "mmap": 0, "budget": min(self.num_bytes // slab_bytes, num_experts)}[self.kind]

    def __str__(self) -> str:
        return str(self.num_bytes) if self.kind == "budget" else self.kind


ALL = ExpertMemory(kind="all")


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
    kind, host = options.memory.kind, options.host_memory
    if kind == "mmap" and device.type != "cpu":
        raise ConfigError(
            f"a mapping is memory of the host, but the model is on {device}: give --expert-memory a size, or all"
        )
    if kind == "mmap" and options.direct:
        raise ConfigError("expected direct reads or a mapping, got both: leave out --direct-io or give a size")
    if host is not None and device.type == "cpu":
        raise ConfigError(
            "--host-memory keeps experts beside a GPU, but the model is on the CPU: give all of it to --expert-memory"
        )
    if host is not None and kind == "all":
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
