"""Replicas, each an engine and its application in a process of its own, as a Ray Serve application."""

from __future__ import annotations

import logging.config
import os
import re
import socket
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from starlette.types import Message

from expertshare.errors import ConfigError
from expertshare.ray_connection import connected
from expertshare.serving.app import create_app
from expertshare.serving.engine import Engine
from expertshare.serving.forwarding import REPLICA_HEADER, Call, ReplicaLostError, answer_call
from expertshare.serving.live.routes import page_routes
from expertshare.serving.scheduling import EngineBusyError, EngineClosedError
from expertshare.serving.settings import EngineLimits, ReplicaScale, ServerSettings
from expertshare.serving.telemetry import log, log_config

DEPLOYMENT = "Replica"
_RETRY_S = 1
_UPSCALE_S, _DOWNSCALE_S = 10.0, 300.0


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
        async with aclosing(answer_call(self._app, call)) as messages:
            async for message in messages:
                if message["type"] == "http.response.start":
                    headers = [*message.get("headers", []), (REPLICA_HEADER, self._name.encode())]
                    message = {**message, "headers": headers}
                yield message

    def check_health(self) -> None:
        """Ray Serve replaces a replica where this raises: its engine has failed."""
        if self._engine.state == "broken":
            raise EngineClosedError("expected an engine that runs, but it has failed; this replica's log says why")

    def __del__(self) -> None:
        self._closing.close()


class RayReplicas:
    """The replicas of one application. handle: of its deployment."""

    def __init__(self, handle: Any, application: str) -> None:
        self._handle = handle.options(stream=True)
        self._application = application

    async def answer(self, call: Call) -> AsyncGenerator[Message]:
        """The messages of some replica's response: Ray Serve chooses the less loaded of two, and others than one that
        has just died. Raises ReplicaLostError if that replica ends meanwhile, and EngineBusyError where too many
        requests wait."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError

        response = self._handle.answer.remote(call)
        finished = False
        try:
            async for message in response:
                yield message
            finished = True
        except RayActorError as error:
            raise ReplicaLostError("the process that was answering has ended") from error
        except BackPressureError as error:
            raise EngineBusyError("all replicas are busy: ask again later", retry_after_s=_RETRY_S) from error
        finally:
            if not finished:
                response.cancel()

    def states(self) -> Mapping[str, int]:
        """How many are in each state, in small letters, as Ray Serve's controller counts them; blocks for a moment."""
        from ray import serve

        application = serve.status().applications.get(self._application)
        found = application.deployments.get(DEPLOYMENT) if application is not None else None
        states = found.replica_states if found is not None else {}
        return {str(getattr(state, "value", state)).lower(): count for state, count in states.items()}


@contextmanager
def replicas_on_ray(
    plan: ReplicaPlan, scale: ReplicaScale, limits: EngineLimits, *, name: str, drain_timeout_s: float = 30.0
) -> Iterator[RayReplicas]:
    """Replicas that are ready; they end after the body, each with what it is doing.

    name: of the application; one of that name that runs on the cluster already is replaced. Raises ConfigError, also
    for whatever keeps a replica from starting.
    """
    with connected(scale.ray_address, cpus=scale.most * plan.threads):
        import ray
        from ray import serve

        wanted, there = scale.replicas * plan.threads, int(ray.cluster_resources().get("CPU", 0))
        if there < wanted:
            log("replicas wait for processors", wanted=wanted, there=there)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # imported by now: it says what it does, on stderr
        quiet = {"log_level": "WARNING"}
        serve.start(proxy_location="Disabled", logging_config=quiet)  # the proxy is our own
        bound = serve.deployment(Replica, name=DEPLOYMENT, **_options(plan, scale, limits, drain_timeout_s)).bind(plan)
        try:
            handle = serve.run(bound, name=name, route_prefix=None, logging_config=quiet)
        except RuntimeError as error:
            found = serve.status().applications[name].deployments.get(DEPLOYMENT)
            serve.delete(name)
            reason = reason_of(found.message if found is not None else str(error))
            raise ConfigError(f"the replicas could not be started: {reason}") from error
        try:
            yield RayReplicas(handle, name)
        finally:
            serve.delete(name)


def _options(plan: ReplicaPlan, scale: ReplicaScale, limits: EngineLimits, drain_timeout_s: float) -> dict[str, Any]:
    """Of the deployment. A replica takes as many requests as its engine has places and its queue is long."""
    autoscaling = {
        "min_replicas": scale.replicas,
        "max_replicas": scale.most,
        "target_ongoing_requests": limits.max_batch,
        "upscale_delay_s": _UPSCALE_S,
        "downscale_delay_s": _DOWNSCALE_S,
    }
    return {
        "ray_actor_options": {"num_cpus": plan.threads},
        "max_ongoing_requests": limits.max_batch + limits.max_queue,
        "max_queued_requests": max(1, limits.max_queue),
        "graceful_shutdown_timeout_s": drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 5.0,
        **({"autoscaling_config": autoscaling} if scale.grows else {"num_replicas": scale.replicas}),
    }


def reason_of(report: str) -> str:
    """What one of our own errors said, where Ray's report of a failed deployment quotes one; else its last line."""
    ours = re.findall(r"expertshare\.\S*Error: (.*)", report)
    lines = [line for line in report.splitlines() if line.strip()]
    return str(ours[-1] if ours else lines[-1] if lines else "Ray does not say why").strip()
