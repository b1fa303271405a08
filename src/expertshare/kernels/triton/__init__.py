"""Kernels for GPUs, written in Triton, and whether they can run here. Nothing imports Triton before a kernel is called.

device/ holds what runs on the GPU, the modules beside it what the host does. Without a GPU the same code runs in
Triton's interpreter, for tests: set TRITON_INTERPRET=1 before Python starts.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor

from expertshare.errors import ConfigError

OLDEST, OLDEST_INTERPRETER = (3, 6), (3, 7)
"""Triton versions that were tried: compiling for sm_90, and interpreting (3.6's interpreter fails at our loops)."""
INTERPRET = "TRITON_INTERPRET"


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them; decided when Triton is imported."""
    return os.environ.get(INTERPRET, "0").lower() in ("1", "true", "yes", "on", "y")


def unavailable_reason() -> str | None:
    """None where kernels can run, else a sentence for people."""
    reason = _not_installed(OLDEST_INTERPRETER if interpreted() else OLDEST)
    if reason is None and not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU"
    return reason


@cache
def _not_installed(oldest: tuple[int, int]) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'expertshare[triton]')"
    version = metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < oldest:
        return f"Triton is {version}, expected {'.'.join(map(str, oldest))} or newer"
    return None


def check_available() -> None:
    """Raises ConfigError where kernels cannot run."""
    reason = unavailable_reason()
    if reason is not None:
        raise ConfigError(f"the backend 'triton' cannot run here: {reason}. Use the backend 'auto'.")


def check_devices(*tensors: Tensor) -> None:
    """Raises ConfigError unless Triton can run, and all tensors are on one GPU, or on the CPU where it interprets."""
    check_available()
    found = sorted({str(tensor.device) for tensor in tensors})
    right = "cpu" if interpreted() else "cuda"
    if len(found) != 1 or not found[0].startswith(right):
        where = "the CPU (TRITON_INTERPRET is set)" if interpreted() else "one GPU"
        raise ConfigError(f"the backend 'triton' expects tensors on {where}, got them on {', '.join(found)}.")


def power_of_two(number: int) -> int:
    """The smallest one that is not below."""
    return 1 << max(0, number - 1).bit_length()
