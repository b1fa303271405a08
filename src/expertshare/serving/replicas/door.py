"""What is on its way through the entrance: counted, drained, ended."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from expertshare.serving.orders import EngineClosedError

DoorState = Literal["ready", "draining", "closed"]


class Door:
    """Open until `drain`. Threads may wait here for what the event loop does."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._state: DoorState = "ready"

    @property
    def state(self) -> DoorState:
        """Whether requests are taken."""
        return self._state

    @property
    def num_waiting(self) -> int:
        """None: requests wait in their replica."""
        return 0

    @property
    def num_running(self) -> int:
        """Requests inside."""
        return self._inside

    @asynccontextmanager
    async def passage(self) -> AsyncIterator[None]:
        """One request, from its first byte to its last. Raises EngineClosedError once the door is shut."""
        with self._changed:
            if self._state != "ready":
                raise EngineClosedError(f"expected a server that is ready, but it is {self._state}: ask another one")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def drain(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            if self._state == "ready":
                self._state = "draining"

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether everybody has left, after `timeout_s` seconds at most."""
        with self._changed:
            return self._changed.wait_for(lambda: self._inside == 0, timeout_s)

    def close(self) -> None:
        """For good; whoever is still inside is cut off with the server."""
        with self._changed:
            self._state = "closed"
