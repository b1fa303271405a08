"""Refuse before loading what cannot fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from expertshare.errors import ExpertMemoryError
from expertshare.experts.layout import DENSE, has_expert_layout, read_manifest
from expertshare.experts.opening import ExpertMemory, StoreOptions, num_kept
from expertshare.experts.slab import format_size
from expertshare.measure.memory import usable_memory_bytes
from expertshare.models.checkpoint import WEIGHTS, StoredTensor, loaded_bytes, read_headers

_CPU = torch.device("cpu")


def check_fits(
    path: Path,
    memory: ExpertMemory | None = None,
    *,
    dtype: torch.dtype | None = None,
    dense_is_loaded: bool = False,
    available_bytes: int | None = None,
    device: torch.device = _CPU,
    stored: Mapping[str, StoredTensor] | None = None,
) -> None:
    """Raise ExpertMemoryError unless the weights of a model directory fit into memory, with what would fit instead.

    memory: where experts of a converted model are to live; None leaves them out. Other models have theirs in memory.
    dtype: to load in. dense_is_loaded: only the experts of a converted model are still to come. available_bytes: by
    default what the system and the control group, or a GPU, have left; nothing is refused where nobody says. Reads
    headers only, unless they are given (stored); raises CheckpointError for a directory that is no model.
    """
    available = _left_on(device) if available_bytes is None else available_bytes
    converted = has_expert_layout(path)
    own = 0
    if not dense_is_loaded:
        stored = read_headers(path, DENSE if converted else WEIGHTS) if stored is None else stored
        own = loaded_bytes(stored.values(), dtype)
    experts = _expert_bytes(path, memory) if converted and memory is not None else 0
    if available is None or own + experts <= available:
        return
    advice = _advice(path, converted=converted, left=available - own, experts=experts)
    raise ExpertMemoryError(
        f"the weights of {path} need {format_size(own + experts)} of {_memory_of(device)}, but "
        f"{_rounded_down(available)} can be had. {advice}"
    )


def check_pinned_fits(path: Path, options: StoreOptions, available_bytes: int | None = None) -> None:
    """Raise ExpertMemoryError unless the host has memory for the experts that a store beside a GPU keeps there. Pinned
    memory is taken when the store is opened, and cannot be swapped out."""
    layout = read_manifest(path)
    needed = num_kept(layout, options) * layout.format.slab_bytes
    available = usable_memory_bytes() if available_bytes is None else available_bytes
    if available is not None and needed > available:
        raise ExpertMemoryError(
            f"--host-memory would pin {format_size(needed)} of the host's memory, but {_rounded_down(available)} can "
            "be had: lower it"
        )


def free_device_bytes(device: torch.device) -> int:
    """Memory of a GPU that torch can still have: what is free, and what it holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def _left_on(device: torch.device) -> int | None:
    return usable_memory_bytes() if device.type == "cpu" else free_device_bytes(device)


def _memory_of(device: torch.device) -> str:
    return "memory" if device.type == "cpu" else f"memory of {device}"


def _expert_bytes(path: Path, memory: ExpertMemory) -> int:
    """Memory of experts in a store. Pages of a mapping are the kernel's to drop."""
    layout = read_manifest(path)
    whole = layout.num_layers * layout.num_experts * layout.format.slab_bytes
    return {"all": whole, "mmap": 0, "budget": min(memory.num_bytes, whole)}[memory.kind]


def _advice(path: Path, *, converted: bool, left: int, experts: int) -> str:
    if not converted:
        return (
            f"Convert it (`expertshare convert {path} OUT --quantise int4`) and use --expert-memory, after "
            f"`expertshare plan {path}` has said how much"
        )
    if left <= 0 or not experts:
        return "Its dense part alone does not fit: close other programs, or use a smaller model"
    return (
        f"At most {_rounded_down(left)} are left for experts; `expertshare plan {path}` says what of that to give to "
        "--expert-memory"
    )


def _rounded_down(num_bytes: int) -> str:
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if num_bytes >= u), (1, "B"))
    return f"{num_bytes * 10 // unit / 10:g}{name}"
