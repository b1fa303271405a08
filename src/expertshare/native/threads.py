"""In which threads the library computes: those of torch's OpenMP where there are any, else threads of its own.

After every parallel operation torch's threads spin for some milliseconds. Threads of our own would contest the cores
with them: measured on 2 cores, an expert layer of 32 experts between torch operations took 7.9 ms in our own threads
and 5.1 ms inside torch's (docs/performance.md).
"""

from __future__ import annotations

import ctypes
from ctypes import c_void_p
from functools import cache
from pathlib import Path

import torch

from expertshare.errors import ConfigError

_MAX_THREADS = 1024
_num_threads: int | None = None
_use_torch_threads: bool | None = None


def set_num_threads(num_threads: int | None) -> None:
    """Threads of the next calls, the caller's among them; None (the default) means torch's number of threads.

    Another number than torch's means threads of our own. Changing it ends the old ones and starts new, so set it once.
    """
    if num_threads is not None and not 1 <= num_threads <= _MAX_THREADS:
        raise ConfigError(f"expected 1 to {_MAX_THREADS} threads, got {num_threads}.")
    global _num_threads
    _num_threads = num_threads


def num_threads() -> int:
    """Threads that the next call may use; a small one uses fewer."""
    return min(_num_threads or torch.get_num_threads(), _MAX_THREADS)


def use_torch_threads(use: bool | None) -> None:
    """Compute in the threads of torch's OpenMP (libgomp), or in our own; None, the default: torch's if it has any.

    They are used as long as their number is `num_threads()`. Raises ConfigError if True and torch has no libgomp.
    """
    if use and _gomp_parallel() is None:
        raise ConfigError("torch's threads cannot be used: this torch has no libgomp. Keep the kernel's own threads.")
    global _use_torch_threads
    _use_torch_threads = use


def crew() -> tuple[int, int | None]:
    """`num_threads()`, and the address of what runs work in torch's threads; None: use threads of our own."""
    of_torch = torch.get_num_threads()
    wanted = min(_num_threads or of_torch, _MAX_THREADS)
    return wanted, None if _use_torch_threads is False or wanted != of_torch else _gomp_parallel()


@cache
def _gomp_parallel() -> int | None:
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().splitlines() if maps.exists() else []
    found = {line.split(maxsplit=5)[-1] for line in mapped if "libgomp" in line}
    paths = sorted(found, key=lambda path: "torch" not in path)  # another library may have brought its own
    return ctypes.cast(ctypes.CDLL(paths[0]).GOMP_parallel, c_void_p).value if paths else None
