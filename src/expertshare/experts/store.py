"""What every store over a converted model has in common."""

from __future__ import annotations

from typing import Protocol, Self

from expertshare.experts.statistics import StoreStatistics
from expertshare.types import ExpertStore


class SlabStore(ExpertStore, Protocol):
    """An ExpertStore that reads slabs, counts, and has to be closed. It serves one forward at a time: two threads may
    not borrow at once, and a forked process opens a store of its own."""

    def statistics(self) -> StoreStatistics:
        """Since it was opened or last reset."""
        ...

    def reset(self) -> None:
        """Count from zero; what is in memory stays."""
        ...

    def close(self) -> None:
        """Let files, threads and memory go; twice is fine. Banks that are still lent keep their memory."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
