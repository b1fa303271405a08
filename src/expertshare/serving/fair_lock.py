"""A lock that is given out in the order in which it was asked for."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Literal


class FairLock:
    """Like threading.Lock, but fair: a thread that asks again at once after a release waits behind earlier ones.

    The engine holds it for one forward pass at a time, so that the live page can run the model in between.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Wait for a turn, at most `timeout` seconds (negative: as long as it takes); whether it came."""
        me = object()
        until = None if timeout < 0 else time.monotonic() + timeout
        with self._changed:
            self._line.append(me)
            while self._line[0] is not me:
                left = None if until is None else until - time.monotonic()
                if not blocking or (left is not None and left <= 0):
                    self._line.remove(me)
                    return False
                self._changed.wait(left)
            return True

    def release(self) -> None:
        """Let the next one have its turn. RuntimeError where nobody has one."""
        with self._changed:
            if not self._line:
                raise RuntimeError("release of a lock that nobody holds")
            self._line.popleft()
            self._changed.notify_all()

    def locked(self) -> bool:
        """Whether somebody has a turn."""
        return bool(self._line)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> Literal[False]:
        self.release()
        return False
