"""A device that is not there: two streams of work whose pace a test chooses, on tensors of the host.

Copies and computation are put down when they are issued and happen later, each stream in its own order. A stream that
is `late` moves only where somebody waits for it; one that is not runs ahead as far as its waits allow; at random, both
move some steps now and then. So a wait that is missing shows as wrong bytes, without a race that a test has to win.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from expertshare.experts.slot_memory import in_chunks

COPIES, COMPUTATION = "copies", "computation"
PACES = ["eager", "late copies", "late computation", "all late", "random"]
POISON = 0xA5

Point = tuple[str, int]
"""A stream, and how much of it has to be done."""


class _Stream:
    def __init__(self) -> None:
        self.issued, self.done = 0, 0
        self.work: deque[Point | Callable[[], object]] = deque()


class SimulatedTransfer:
    """CudaTransfer. forget: waits that it leaves out, as a faulty store would: "vacant" (copies for the computation
    before), "arrival" (computation for copies), "staging" (the host for copies)."""

    def __init__(self, pace: str = "late copies", *, seed: int = 0, forget: Collection[str] = ()) -> None:
        self._eager = {
            "eager": (COPIES, COMPUTATION),
            "late copies": (COMPUTATION,),
            "late computation": (COPIES,),
        }.get(pace, ())
        self._random = random.Random(seed) if pace == "random" else None
        self._forget = forget
        self._streams = {COPIES: _Stream(), COMPUTATION: _Stream()}
        self._lock = threading.RLock()
        self.num_copies = 0

    def slots(self, count: int, slab_bytes: int) -> Tensor:
        return torch.full((count, slab_bytes), POISON, dtype=torch.uint8)

    def staging(self, count: int, slab_bytes: int) -> list[Tensor]:
        return in_chunks(count, slab_bytes, lambda size: torch.full((size,), POISON, dtype=torch.uint8))

    def copy(self, slot_B: Tensor, staged_B: Tensor, *, after: Point) -> Point:
        with self._lock:
            self.num_copies += 1
            if "vacant" not in self._forget:
                self._issue(COPIES, after)
            return self._issue(COPIES, lambda: slot_B.copy_(staged_B))

    def computed(self) -> Point:
        with self._lock:
            return COMPUTATION, self._streams[COMPUTATION].issued

    def computation_waits(self, copied: Point) -> None:
        with self._lock:
            if "arrival" not in self._forget:
                self._issue(COMPUTATION, copied)
                if COMPUTATION in self._eager:  # whoever computes next, outside of this simulation, does it at once
                    self._reach(copied)
                    self._run_ahead()

    def host_waits(self, copied: Point) -> None:
        with self._lock:
            if "staging" not in self._forget:
                self._reach(copied)

    def beside(self, index_E: Tensor) -> Tensor:
        return index_E.clone()

    def compute(self, work: Callable[[], object]) -> None:
        """Issue some computation."""
        with self._lock:
            self._issue(COMPUTATION, work)

    def finish(self) -> None:
        """Until nothing is left to do."""
        with self._lock:
            for name, stream in self._streams.items():
                self._reach((name, stream.issued))

    def _issue(self, name: str, work: Point | Callable[[], object]) -> Point:
        stream = self._streams[name]
        stream.work.append(work)
        stream.issued += 1
        point = name, stream.issued
        self._run_ahead()
        return point

    def _run_ahead(self) -> None:
        moved = True
        while moved:
            moved = any([self._step_if_free(name) for name in self._eager])
        if self._random is not None:
            for _ in range(self._random.randrange(4)):
                self._step_if_free(self._random.choice((COPIES, COMPUTATION)))

    def _step_if_free(self, name: str) -> bool:
        stream = self._streams[name]
        if not stream.work or (isinstance(stream.work[0], tuple) and not self._is_reached(stream.work[0])):
            return False
        self._step(stream)
        return True

    def _is_reached(self, point: Point) -> bool:
        return self._streams[point[0]].done >= point[1]

    def _reach(self, point: Point) -> None:
        while not self._is_reached(point):
            self._step(self._streams[point[0]])

    def _step(self, stream: _Stream) -> None:
        work = stream.work[0]
        if isinstance(work, tuple):
            self._reach(work)
        else:
            work()
        stream.work.popleft()
        stream.done += 1
