"""Where the time of a forward goes."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType

PARTS = ("router", "experts", "attention", "head", "other")


class _Charge:
    """A `with` block whose time goes to one part. No generator: a forward has dozens, and caches are cold at each."""

    __slots__ = ("_name", "_seconds", "_start")

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds[self._name] += time.perf_counter() - self._start


@dataclass(slots=True)
class PartClock:
    """Adds up wall-clock seconds by part of the model. Parts do not nest; "other" is what no part claimed.

    Host time: on a GPU, where kernels run behind the host, it is the time to launch them.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS[:-1], 0.0))

    def part(self, name: str) -> AbstractContextManager[None]:
        """Charge the body of the `with` block to part `name`."""
        return _Charge(self.seconds, name)

    def shares(self, total_s: float) -> dict[str, float]:
        """Seconds by part, with the rest of `total_s` as "other"."""
        return {**self.seconds, "other": max(0.0, total_s - sum(self.seconds.values()))}
