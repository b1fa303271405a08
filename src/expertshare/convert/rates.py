"""What this machine can do, measured: reads of memory and of a checkpoint's own file, and products."""

from __future__ import annotations

import errno
import mmap
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from expertshare import native

ASSUMED_CACHE_BYTES = 32 * 2**20
"""Where the system does not say how large its last-level cache is."""
CACHE_FACTOR = 8
"""Weights in rotation and the bandwidth buffer are at least this many times the last-level cache."""
GEMM_SHAPES = ((1024, 2048, 2048), (2048, 4096, 2048))
READ_BYTES = 4 * 2**20
NUM_READERS = 4
TIME_LIMIT_S, MAX_BYTES = 1.5, 512 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What the machine can do, measured. storage_bytes_per_s: None where there is no file to read; storage_direct:
    whether it was read past the page cache."""

    memory_bytes_per_s: float
    macs_per_s: float
    storage_bytes_per_s: float | None = None
    storage_direct: bool = False


def measure_rates(file: Path | None) -> Rates:
    """Memory bandwidth, rate of bfloat16 products, and reads of a large file of the checkpoint; a few seconds."""
    bytes_per_s, direct = storage_speed(file) if file is not None else (None, False)
    return Rates(
        memory_bytes_per_s=read_bandwidth(2 * CACHE_FACTOR * last_level_cache_bytes(), repeats=3),
        macs_per_s=gemm_rate(torch.bfloat16, GEMM_SHAPES),
        storage_bytes_per_s=bytes_per_s,
        storage_direct=direct,
    )


def read_bandwidth(num_bytes: int, repeats: int = 7) -> float:
    """Bytes per second, the best of several passes over a buffer, by three ways of reading all of it."""
    buffer = ones(num_bytes // 4)
    rows = buffer[: len(buffer) // 4096 * 4096].view(-1, 4096) if len(buffer) >= 4096 else buffer.view(1, -1)
    one = torch.ones(rows.shape[1])
    readers: tuple[Callable[[], object], ...] = (buffer.sum, buffer.amax, lambda: torch.mv(rows, one))
    best = min(_seconds(reader) for _ in range(repeats) for reader in readers)
    return buffer.numel() * 4 / best


def ones(count: int) -> Tensor:
    """float32, in huge pages where there are any, as weights are: a pass over small ones is 6 to 8 % slower."""
    buffer = torch.empty(count)
    native.ask_for_huge_pages(buffer)
    return buffer.fill_(1.0)


def gemm_rate(dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], repeats: int = 4) -> float:
    """Multiply-accumulates per second of the best of several [m, k] x [k, n] products, after one to warm up."""
    best = 0.0
    for m, k, n in shapes:
        left, right = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).T
        out = torch.empty(m, n, dtype=dtype)
        product = partial(torch.mm, left, right, out=out)
        seconds = [_seconds(product) for _ in range(repeats + 1)]
        best = max(best, m * k * n / min(seconds[1:]))
    return best


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """All last-level caches of the machine together, as Linux lists them; ASSUMED_CACHE_BYTES where it does not."""
    caches: dict[tuple[int, str], int] = {}
    for index in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text().strip()
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if size.endswith("K"):
            caches[level, shared] = int(size[:-1]) * 1024
    if not caches:
        return ASSUMED_CACHE_BYTES
    last = max(level for level, _ in caches)
    return sum(size for (level, _), size in caches.items() if level == last)


def storage_speed(path: Path) -> tuple[float | None, bool]:
    """Bytes per second of reads of READ_BYTES at random places by NUM_READERS threads, None for a file too small to
    time; and whether they went past the page cache. Where the file system cannot, it may have served them."""
    places = os.stat(path).st_size // READ_BYTES
    if places < NUM_READERS:
        return None, False
    direct = True
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        direct, descriptor = False, os.open(path, os.O_RDONLY)
    try:
        order = random.Random(0).sample(range(places), min(places, MAX_BYTES // READ_BYTES))
        start = time.perf_counter()
        with ThreadPoolExecutor(NUM_READERS) as readers:
            shares = [order[reader::NUM_READERS] for reader in range(NUM_READERS)]
            done = sum(readers.map(lambda share: _read(descriptor, share, start + TIME_LIMIT_S), shares))
        return done / (time.perf_counter() - start), direct
    finally:
        os.close(descriptor)


def _read(descriptor: int, places: list[int], deadline: float) -> int:
    """Bytes read before the deadline, into memory that begins at a page as direct reads want it."""
    done = 0
    with mmap.mmap(-1, READ_BYTES) as memory:
        for place in places:
            if time.perf_counter() >= deadline:
                break
            done += os.preadv(descriptor, [memory], place * READ_BYTES)
    return done


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
