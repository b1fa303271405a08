"""A model behind a real uvicorn on a free port of this machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from expertshare import api
from expertshare.api.serving import opened_engine
from expertshare.models import LoadedModel
from expertshare.serving import Engine, EngineLimits, ServerSettings, create_app, page_routes

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
PROMPTS = (
    "Tom has 12 apples. He finds 7 more. He sells 4. How many apples does Tom have now?",
    "What is 7 plus 8?",
    "Solve 3x + 5 = 17.",
    "Write f(x) that returns x times 3 plus 4.",
    "Anna has 3 pens. She buys 9 more. How many pens does Anna have now?",
)


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs. url: without a path."""

    url: str
    engine: Engine

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def wait_until(self, what: Callable[[], bool], seconds: float = 20.0) -> None:
        """Look again and again; a failure after `seconds`."""
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, "it did not come about in time"
            time.sleep(0.005)

    def forwards(self) -> int:
        return sum(self.engine.counts.forwards.values())


@contextmanager
def running(
    loaded: LoadedModel, *, settings: ServerSettings | None = None, limits: EngineLimits | None = None, **engine: Any
) -> Iterator[Served]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with opened_engine(loaded, limits=limits, **engine) as opened:
        app = create_app(opened, settings, extra_routers=[page_routes(opened)])
        config = uvicorn.Config(app, access_log=False, log_config=None, lifespan="on", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield Served(url, opened)
        finally:
            server.should_exit = True
            thread.join(20)
            listener.close()


Serve = Callable[..., Served]


def alone(loaded: LoadedModel, prompt: str, **options: Any) -> Any:
    """What `expertshare generate` answers to this prompt alone."""
    return api.generate(loaded, prompt, **options)
