"""Refuse before loading what cannot fit."""

from __future__ import annotations

from pathlib import Path

import torch

from expertshare.conversion.machine_memory import usable_memory_bytes
from expertshare.conversion.sizes import loaded_bytes
from expertshare.errors import ExpertMemoryError
from expertshare.experts.layout import DENSE, has_expert_layout, read_manifest
from expertshare.experts.sizes import ExpertMemory, format_size
from expertshare.models.checkpoint import read_headers


def check_fits(
    path: Path,
    memory: ExpertMemory | None = None,
    *,
    dtype: torch.dtype | None = None,
    available_bytes: int | None = None,
) -> None:
    """Raise ExpertMemoryError unless the weights of a model directory fit into memory, with what would fit instead.

    memory: where its experts are to live; None means all in memory. dtype: to load in. available_bytes: by default what
    the system and the control group have left; nothing is refused where neither says. Reads headers only; raises
    CheckpointError for a directory that is no model.
    """
    available = usable_memory_bytes() if available_bytes is None else available_bytes
    converted = has_expert_layout(path)
    memory = memory or ExpertMemory(kind="all")
    dense = loaded_bytes(read_headers(path, DENSE).values(), dtype) if converted else 0
    if not converted:
        needed, experts = loaded_bytes(read_headers(path).values(), dtype), 0
    else:
        layout = read_manifest(path)
        whole = layout.num_layers * layout.num_experts * layout.format.slab_bytes
        experts = {"all": whole, "mmap": 0, "budget": min(memory.num_bytes, whole)}[memory.kind]
        needed = dense + experts
    if available is None or needed <= available:
        return
    raise ExpertMemoryError(
        f"the weights of {path} need {format_size(needed)} of memory, but {_rounded_down(available)} can be had. "
        + _advice(path, converted=converted, room=available - dense, experts=experts)
    )


def _advice(path: Path, *, converted: bool, room: int, experts: int) -> str:
    if not converted:
        return (
            f"Convert it (`expertshare convert {path} OUT --quantise int4`) and use --expert-memory, after "
            f"`expertshare plan {path}` has said how much"
        )
    if room <= 0 or not experts:
        return "Its dense part alone does not fit: close other programs, or use a smaller model"
    return (
        f"At most {_rounded_down(room)} are left for experts; `expertshare plan {path}` says what of that to give to "
        "--expert-memory"
    )


def _rounded_down(num_bytes: int) -> str:
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if num_bytes >= u), (1, "B"))
    return f"{num_bytes * 10 // unit / 10:g}{name}"
