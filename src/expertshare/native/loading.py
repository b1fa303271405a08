"""Finding and loading `libexpertshare_cpu.so`, and what of this machine its calls may use: cores, threads, huge pages.

It is built when the package is installed (setup.py) and looked for beside this file, nowhere else. EXPERTSHARE_ISA
names the instruction set to use (avx512_bf16, avx512_vnni, avx512, avx_vnni, avx2, portable) instead of the best that
the processor has; it is read at every call. calls.py says what its functions take.

It computes in the threads of torch's OpenMP where there are any, else in a pool of its own. After every parallel
operation torch's threads spin for some milliseconds. Threads of our own would contest the cores with them: measured on
2 cores, an expert layer of 32 experts between torch operations took 7.9 ms in our own threads and 5.1 ms inside torch's
(docs/performance.md).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from ctypes import c_char_p, c_int
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from expertshare.errors import ConfigError, nearest

LIBRARY = Path(__file__).with_name("libexpertshare_cpu.so")
ABI_VERSION = 9  # of the structures that cross: raise it when one changes. setup.py builds it into the library
_MAX_THREADS = 1024
_num_threads: int | None = None
_use_torch_threads: bool | None = None
_threads_chosen = False
_MADV_HUGEPAGE = 14
_LEAST_BYTES = 4 << 20  # of a tensor that huge pages make a difference to


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return (
            f"{LIBRARY.name} is not beside {Path(__file__).name}: there was no C++ compiler when expertshare was "
            f"installed, or it failed. Install g++ or clang++, then expertshare again (pip install -v says why)"
        )
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        version = int(loaded.es_abi_version())
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} cannot be loaded: {error}. Install expertshare again"
    if version != ABI_VERSION:
        return f"{LIBRARY.name} is of version {version}, expected {ABI_VERSION}. Install expertshare again"
    loaded.es_isa_name.restype = c_char_p
    loaded.es_isa_name.argtypes = loaded.es_isa_usable.argtypes = [c_int]
    return loaded


def library() -> ctypes.CDLL:
    """The loaded library. Raises ConfigError where there is none."""
    loaded = _load()
    if isinstance(loaded, str):
        raise ConfigError(f"the expert backend 'cpu' is not available: {loaded}, or use the backend 'torch'.")
    return loaded


def available() -> bool:
    """Whether the library is there and fits."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why `available()` is False, with what to do; None where it is True."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@cache
def _isas() -> dict[str, int]:
    """Every instruction set that the library knows -> its number, the fastest first."""
    loaded = library()
    return {loaded.es_isa_name(isa).decode(): isa for isa in range(loaded.es_num_isas())}


def usable_instruction_sets() -> list[str]:
    """Those that this build contains and this processor runs, the fastest first."""
    loaded = library()
    return [name for name, isa in _isas().items() if loaded.es_isa_usable(isa)]


@cache
def _usable_isa(asked: str | None) -> str:
    usable = usable_instruction_sets()
    if asked is None:
        return usable[0]
    if asked not in _isas():
        raise ConfigError(f"EXPERTSHARE_ISA={asked!r} is no instruction set. {nearest(asked, _isas())}")
    if asked not in usable:
        raise ConfigError(
            f"EXPERTSHARE_ISA={asked} cannot run here: the processor or the compiler of this build lacks it. "
            f"Expected one of {', '.join(usable)}; unset it to use the best."
        )
    return asked


def instruction_set() -> str:
    """The instruction set that the next call uses. Raises ConfigError if EXPERTSHARE_ISA names none that runs here."""
    return _usable_isa(os.environ.get("EXPERTSHARE_ISA") or None)


def isa_number() -> int:
    """`instruction_set()` as the library numbers it."""
    return _isas()[instruction_set()]


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
    if use and not _gomp_parallel():
        raise ConfigError("torch's threads cannot be used: this torch has no libgomp. Keep the kernel's own threads.")
    global _use_torch_threads
    _use_torch_threads = use


def thread_pool() -> tuple[int, int]:
    """`num_threads()`, and the address of what runs work in torch's threads; 0: use threads of our own."""
    of_torch = torch.get_num_threads()
    wanted = min(_num_threads or of_torch, _MAX_THREADS)
    return wanted, 0 if _use_torch_threads is False or wanted != of_torch else _gomp_parallel()


@cache
def _gomp_parallel() -> int:
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().splitlines() if maps.exists() else []
    found = {line.split(maxsplit=5)[-1] for line in mapped if "libgomp" in line}
    paths = sorted(found, key=lambda path: "torch" not in path)  # another library may have brought its own
    return ctypes.cast(ctypes.CDLL(paths[0]).GOMP_parallel, ctypes.c_void_p).value or 0 if paths else 0


def usable_cores(root: Path = Path("/sys"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Physical cores among the processors of this process, no more than its control groups' quotas; at least 1.

    Two hardware threads of a core share its vector units and its way to memory, which is all that kernels wait for.
    Where the system does not say what belongs to one core, every processor counts. Of a fraction of a processor nothing
    is used: a thread that is stopped for the rest of a period keeps all others waiting. root: where sysfs is mounted;
    membership: the groups of this process.
    """
    cores = {_core_of(root, processor) for processor in _processors()}
    quotas = [quota for group in control_groups("cpu", root, membership) if (quota := _quota(group)) is not None]
    return max(1, min(len(cores), *(math.floor(quota) for quota in quotas)) if quotas else len(cores))


def choose_threads(count: int) -> None:
    """Set torch's number of threads to what somebody asked for: `keep_to_quota` then leaves it."""
    global _threads_chosen
    torch.set_num_threads(count)
    _threads_chosen = True


def keep_to_quota() -> None:
    """Lower torch's number of threads to `usable_cores`, unless OMP_NUM_THREADS or `choose_threads` has said it."""
    if not (_threads_chosen or os.environ.get("OMP_NUM_THREADS")) and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())


def control_groups(controller: str, root: Path, membership: Path) -> list[Path]:
    """Directories of this process's group of a controller ("cpu", "memory") and of those above it, by version 1 or 2:
    the tightest limit holds. Version 1 may mount several controllers as one, such as cpu,cpuacct."""
    lines = membership.read_text().splitlines() if membership.is_file() else []
    found: dict[bool, list[Path]] = {}
    for line in lines:
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        mounts = [root / "fs/cgroup" / name for name in (names, controller)] if names else [root / "fs/cgroup"]
        for mount in mounts:
            below = mount / path.strip("/")
            if mount.is_dir():
                found[bool(names)] = [below, *(group for group in below.parents if group.is_relative_to(mount))]
                break
    return found.get(True) or found.get(False) or [root / "fs/cgroup", root / "fs/cgroup" / controller]


def _processors() -> list[int]:
    """Those that the scheduler may give us."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _core_of(root: Path, processor: int) -> str:
    """What the hardware threads of one core have in common."""
    topology = root / f"devices/system/cpu/cpu{processor}/topology"
    files = (topology / name for name in ("core_cpus_list", "thread_siblings_list"))
    return next((file.read_text().strip() for file in files if file.is_file()), f"processor {processor}")


def _quota(group: Path) -> float | None:
    """Processors' worth of time, by version 2 or 1 of control groups; None for no limit."""
    if (group / "cpu.max").is_file():
        quota, period = (group / "cpu.max").read_text().split()
    elif (group / "cpu.cfs_quota_us").is_file():
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    else:
        return None
    return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)


def ask_for_huge_pages(tensor: Tensor) -> None:
    """Ask the kernel to back a tensor's memory with huge pages; call it before the memory is first written.

    A reading pass over gigabytes otherwise waits for an address translation every 4 KiB.

    A hint, without effect on values: small tensors, other systems than Linux and kernels that refuse are left as they
    are. Only whole pages inside the tensor are touched.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < _LEAST_BYTES:
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
