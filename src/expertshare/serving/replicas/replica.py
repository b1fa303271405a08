"""One replica: an engine and its application in a process of their own."""

from __future__ import annotations

import logging.config
import os
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from starlette.types import Message

from expertshare.serving.app import create_app
from expertshare.serving.engine import Engine
from expertshare.serving.live.routes import page_routes
from expertshare.serving.logs import log_config
from expertshare.serving.replicas.forwarding import Call, answer_call
from expertshare.serving.scheduling import EngineClosedError
from expertshare.serving.settings import ServerSettings

REPLICA_HEADER = b"x-expertshare-replica"
"""Who has answered, for the proxy, which keeps it to itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaPlan:
    """All that a process needs to become a replica. open_engine: picklable; it loads the model there. page: whether the
    live page is shown. threads: of one operation."""

    open_engine: Callable[[], AbstractContextManager[Engine]]
    settings: ServerSettings
    page: bool
    threads: int
    log_level: str = "INFO"


class Replica:
    """What Ray Serve makes, asks and watches."""

    def __init__(self, plan: ReplicaPlan) -> None:
        """Load the model and be ready. Raises what opening the engine raises."""
        self._closing = ExitStack()
        logging.config.dictConfig(log_config(plan.log_level))
        torch.set_num_threads(plan.threads)
        self._engine = self._closing.enter_context(plan.open_engine())
        routers = [page_routes(self._engine, plan.settings.model_name)] if plan.page else []
        self._app = create_app(self._engine, plan.settings, extra_routers=routers)
        self._engine.start()
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    async def answer(self, call: Call) -> AsyncGenerator[Message]:
        """The response to one request, message by message."""
        messages = answer_call(self._app, call)
        try:
            async for message in messages:
                if message["type"] == "http.response.start":
                    headers = [*message.get("headers", []), (REPLICA_HEADER, self._name.encode())]
                    message = {**message, "headers": headers}
                yield message
        finally:
            await messages.aclose()

    def check_health(self) -> None:
        """Ray Serve replaces a replica where this raises: its engine has failed."""
        if self._engine.state == "broken":
            raise EngineClosedError("expected an engine that runs, but it has failed; this replica's log says why")

    def __del__(self) -> None:
        self._closing.close()
