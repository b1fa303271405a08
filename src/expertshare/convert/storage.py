"""How fast this machine reads a checkpoint's own file, past the page cache."""

from __future__ import annotations

import errno
import mmap
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

READ_BYTES = 4 * 2**20
NUM_READERS = 4
TIME_LIMIT_S, MAX_BYTES = 1.5, 512 * 2**20


@dataclass(frozen=True, slots=True)
class StorageSpeed:
    """direct: whether reads went past the page cache; where the file system cannot, they may have been served by it."""

    bytes_per_s: float
    direct: bool


def storage_speed(path: Path) -> StorageSpeed | None:
    """Timed reads of READ_BYTES at random places by NUM_READERS threads. None for a file too small to time."""
    places = os.stat(path).st_size // READ_BYTES
    if places < NUM_READERS:
        return None
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
        return StorageSpeed(done / (time.perf_counter() - start), direct)
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
