"""The process: uvicorn, which lets an engine finish what it has begun before it ends."""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from types import FrameType
from typing import Literal

import uvicorn
from fastapi import FastAPI

from expertshare.errors import InputError
from expertshare.serving.scheduling import EngineClosedError
from expertshare.serving.telemetry import log, log_config

State = Literal["new", "ready", "draining", "closed", "broken"]
_LAST_BYTES_S = 5
"""For responses whose rows are finished to reach their clients."""


class Drainable(ABC):
    """What a server lets finish before it ends: an engine, or the admission to several. `_changed` guards the state,
    and is notified whenever there is less to do."""

    def __init__(self, state: State) -> None:
        self._changed = threading.Condition()
        self._state: State = state

    @property
    def state(self) -> State:
        """Whether work is taken; "broken": the thread that does it has ended by itself, and no more will be done."""
        return self._state

    @property
    def num_waiting(self) -> int:
        """Answers that have not begun; 0 where nothing waits."""
        return 0

    @property
    @abstractmethod
    def num_running(self) -> int:
        """Number of answers that have begun and are not finished."""

    @abstractmethod
    def _has_work(self) -> bool: ...

    @abstractmethod
    def close(self) -> None:
        """End whatever is left of the running answers."""

    def drain(self) -> None:
        """Finish what was begun and take nothing new."""
        with self._changed:
            if self._state == "ready":
                self._state = "draining"

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether nothing is waiting or running, after `timeout_s` seconds at most."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._has_work(), timeout_s)

    def _check_ready(self) -> None:
        if self._state != "ready":
            raise EngineClosedError(f"expected a server that is ready, but it is {self._state}: ask another one")


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT: new requests get 503, what runs is finished (for `drain_timeout_s` at most), then
    the server ends. On the second it ends at once. signal_number: the first one."""

    def __init__(self, config: uvicorn.Config, engine: Drainable, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._engine, self._drain_timeout_s = engine, drain_timeout_s
        self.signal_number: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                log("listening", host=host, port=port, state=self._engine.state)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What happens when a signal has come."""
        del frame  # where it interrupted does not matter
        if self.signal_number is not None:
            self.force_exit = self.should_exit = True
            return
        self.signal_number = sig
        self._engine.drain()
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        log("draining", waiting=self._engine.num_waiting, running=self._engine.num_running)
        finished = self._engine.wait_until_idle(self._drain_timeout_s)
        log("drained", finished=finished)
        self._engine.close()
        self.should_exit = True


def serve(
    app: FastAPI,
    engine: Drainable,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    drain_timeout_s: float = 30.0,
    log_level: str = "INFO",
) -> int | None:
    """Serve until a signal comes, and return it. port 0: any free one, which the log names. Raises InputError where the
    port cannot be had."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=log_config(log_level),
        server_header=False,
        timeout_graceful_shutdown=_LAST_BYTES_S,
        lifespan="on",
    )
    server = DrainingServer(config, engine, drain_timeout_s)
    with _listener(host, port) as listener:
        server.run(sockets=[listener])
    return server.signal_number


def _listener(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # By the protocol's number asyncio knows what to send at once: otherwise every second small write waits 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: of a host that is no name at all
        raise InputError(f"cannot listen on {host} port {port} ({error}): choose another --host or --port") from error
    return listener
