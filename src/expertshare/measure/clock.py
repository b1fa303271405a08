"""Where the time of a forward goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PARTS = ("router", "experts", "attention", "head", "other")


@dataclass(slots=True)
class PartClock:
    """Adds up wall-clock seconds by part of the model. Parts do not nest; "other" is what no part claimed.

    Host time: on a GPU, where kernels run behind the host, it is the time to launch them.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS[:-1], 0.0))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the body of the `with` block to part `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def shares(self, total_s: float) -> dict[str, float]:
        """Seconds by part, with the rest of `total_s` as "other"."""
        return {**self.seconds, "other": max(0.0, total_s - sum(self.seconds.values()))}
