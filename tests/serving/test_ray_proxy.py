"""The proxy over replicas of this process, and everything about Ray that needs none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest
from starlette.types import Message

from expertshare import ray_connection
from expertshare.api.serving import opened_engine
from expertshare.cli import main
from expertshare.errors import ConfigError
from expertshare.models import LoadedModel
from expertshare.ray_connection import chosen_address
from expertshare.serving import EngineLimits, ServerSettings
from expertshare.serving.forwarding import Call, ReplicaLostError
from expertshare.serving.proxy import Admission, create_proxy
from expertshare.serving.ray_application import Replica, ReplicaPlan, _options, reason_of
from expertshare.serving.scheduling import EngineBusyError
from expertshare.serving.settings import ReplicaScale

from .server import PROMPTS, REFERENCE, alone

ASK = {"model": "reference", "messages": [{"role": "user", "content": PROMPTS[1]}], "temperature": 0}


class Here:
    """One replica in this process. fails: raised by so many of the next requests."""

    def __init__(self, plan: ReplicaPlan) -> None:
        self.replica = Replica(plan)
        self.fails: list[Exception] = []
        self.asked: list[Call] = []

    async def answer(self, call: Call) -> AsyncGenerator[Message]:
        self.asked.append(call)
        if self.fails:
            raise self.fails.pop()
        async for message in self.replica.answer(call):
            yield message

    def states(self) -> dict[str, int]:
        return {"running": 1, "starting": 1}


@pytest.fixture(scope="module")
def here(reference: LoadedModel) -> Iterator[Here]:
    plan = ReplicaPlan(open_engine=lambda: opened_engine(reference), settings=ServerSettings(), page=True, threads=1)
    one = Here(plan)
    yield one
    one.replica.__del__()


def asked(
    here: Here, *requests: tuple[str, str, Any], admission: Admission | None = None, **settings: Any
) -> list[Any]:
    """Responses to several requests, one after the other."""
    app = create_proxy(here, admission or Admission(), ServerSettings(**settings))

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy", timeout=60) as http:
            return [await http.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(ask())


CHAT = ("POST", "/v1/chat/completions", {"json": ASK})


def test_answers_are_the_replicas_and_numbers_are_the_entrances(here: Here, reference: LoadedModel) -> None:
    answer, models, page, missing, described = asked(
        here, CHAT, *(("GET", path, {}) for path in ("/v1/models/reference", "/", "/no", "/openapi.json"))
    )
    assert answer.json()["choices"][0]["message"]["content"] == alone(reference, PROMPTS[1]).answers[0].text
    assert answer.headers.get_list("x-request-id")[0]
    assert len(answer.headers.get_list("x-request-id")) == 1
    assert "x-expertshare-replica" not in answer.headers
    assert models.json()["id"] == "reference"
    assert "text/html" in page.headers["content-type"]
    assert missing.status_code == 404
    assert missing.json()["error"]
    assert "/v1/chat/completions" in described.json()["paths"]


def test_the_entrance_keeps_the_bounds(here: Here) -> None:
    here.asked.clear()
    no_key, health, ready = asked(here, CHAT, ("GET", "/health", {}), ("GET", "/ready", {}), api_key="k")
    assert no_key.status_code == 401
    assert health.json() == {"status": "ready", "replicas": {"running": 1, "starting": 1}}
    assert ready.status_code == 200
    opened = create_proxy(here, Admission(), ServerSettings(api_key="k"), open_paths=("/",))
    assert opened.user_middleware[0].kwargs["open_paths"] == ("/health", "/ready", "/metrics", "/")
    assert asked(here, CHAT, max_body_bytes=10)[0].status_code == 413
    assert not here.asked
    here.fails = [EngineBusyError("busy", retry_after_s=1)]
    (busy,) = asked(here, CHAT)
    assert (busy.status_code, busy.headers["retry-after"], busy.json()["error"]["code"]) == (429, "1", "queue_full")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_no_method_brings_more_than_the_longest_body(here: Here, method: str) -> None:
    async def endless() -> AsyncGenerator[bytes]:
        while True:
            yield b"x" * 1000

    here.asked.clear()
    (refused,) = asked(here, (method, "/v1/models", {"content": endless()}), max_body_bytes=5000)
    assert refused.status_code == 413
    assert not here.asked


def test_a_replica_is_asked_for_the_path_that_was_asked_for(here: Here) -> None:
    here.asked.clear()
    more = {"headers": {"host": "one/v1/completions?"}}  # must not become a part of the path, which the gate has seen
    replies = asked(here, *(("GET", path, more) for path in ("/v1/models/a%3Fb%23c", "/v1/models")))
    assert [call.path for call in here.asked] == ["/v1/models/a?b#c", "/v1/models"]
    assert "unknown model 'a?b#c'" in replies[0].json()["error"]["message"]


def test_losses_are_retried_once_and_counted(here: Here) -> None:
    here.fails = [ReplicaLostError("gone")]
    retried, metrics = asked(here, CHAT, ("GET", "/metrics", {}))
    assert retried.status_code == 200
    assert "expertshare_retried_requests_total 1.0" in metrics.text
    assert 'expertshare_replicas{state="running"} 1.0' in metrics.text
    assert 'expertshare_requests_total{path="/v1/chat/completions",status="200"} 1.0' in metrics.text
    here.fails = [ReplicaLostError("gone"), ReplicaLostError("gone")]
    lost, metrics = asked(here, CHAT, ("GET", "/metrics", {}))
    assert (lost.status_code, lost.json()["error"]["code"]) == (503, "replica_lost")
    assert "expertshare_lost_requests_total 1.0" in metrics.text


def test_an_admission_that_is_closed_lets_requests_finish(here: Here) -> None:
    admission = Admission()

    async def visit() -> None:
        with admission.request():
            assert admission.num_running == 1
            admission.drain()
            assert not admission.wait_until_idle(0)

    asyncio.run(visit())
    waited: list[bool] = []
    thread = threading.Thread(target=lambda: waited.append(admission.wait_until_idle(5)))
    thread.start()
    thread.join()
    assert waited == [True]
    refused, health, ready = asked(here, CHAT, ("GET", "/health", {}), ("GET", "/ready", {}), admission=admission)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    assert (health.status_code, ready.status_code) == (200, 503)
    admission.close()
    assert admission.state == "closed"


def test_how_many_replicas_and_threads() -> None:
    assert not ReplicaScale().on_ray
    assert ReplicaScale(ray=True).on_ray
    assert ReplicaScale(ray_address="auto").on_ray
    scale = ReplicaScale(replicas=2, max_replicas=4)
    assert (scale.on_ray, scale.most, scale.grows) == (True, 4, True)
    assert not ReplicaScale(replicas=2, max_replicas=2).grows
    assert [scale.threads(None, cores) for cores in (1, 8, 9)] == [1, 2, 2]
    assert scale.threads(3, 1) == 3


def test_what_ray_is_told() -> None:
    limits = EngineLimits(max_batch=3, max_queue=5)
    plan: Any = type("Plan", (), {"threads": 2})
    fixed = _options(plan, ReplicaScale(replicas=2), limits, 7.0)
    assert fixed["num_replicas"] == 2
    assert fixed["ray_actor_options"] == {"num_cpus": 2}
    assert fixed["max_ongoing_requests"] == 8
    assert fixed["graceful_shutdown_timeout_s"] == 7.0
    growing = _options(plan, ReplicaScale(replicas=1, max_replicas=4), limits, 7.0)["autoscaling_config"]
    assert (growing["min_replicas"], growing["max_replicas"], growing["target_ongoing_requests"]) == (1, 4, 3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "0"], "replicas must be at least 1"),
        (["--replicas", "3", "--max-replicas", "2"], "max_replicas must be at least"),
        (["--replicas", "2", "--threads", "0"], "threads must be at least 1"),
        (["--replicas", "2", "--policy", "des-vote:budget=2"], "budget must lie in"),
        (["--replicas", "2", "--policies", "des-vot"], "des-vote"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", str(REFERENCE), *flags])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["serve", str(REFERENCE), "--replicas", "2"],
        ["serve", str(REFERENCE), "--ray"],
        ["eval", str(REFERENCE), "--ray", "--out", "unused"],
        ["eval", str(REFERENCE), "--ray-address", "auto", "--out", "unused"],
    ],
)
def test_without_ray_it_is_said_what_to_install(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_connection, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 2
    assert "pip install 'expertshare[ray]'" in capsys.readouterr().err


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert chosen_address(None) == "local"
    monkeypatch.setenv("RAY_ADDRESS", "one:6379")
    assert chosen_address(None) == "one:6379"
    assert chosen_address("two:6379") == "two:6379"
    with pytest.raises(ConfigError, match="HOST:PORT"):
        chosen_address("ray://three:10001")


def test_why_replicas_did_not_start() -> None:
    ours = "Deploying x failed:\nTraceback\nexpertshare.errors.PolicyError: budget must lie in 4..64\n\nmore"
    assert reason_of(ours) == "budget must lie in 4..64"
    assert reason_of("first\nlast\n\n") == "last"
    assert reason_of("") == "Ray does not say why"
