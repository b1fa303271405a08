"""`expertshare serve --replicas 2` on a local Ray: one machine, the reference model, a killed process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from expertshare.models import LoadedModel

from .server import PROMPTS, REFERENCE, alone

pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS: dict[str, Any] = {"gen_length": 512, "threshold": None, "seed": 1}
LONG = {"temperature": 5.0, "max_tokens": 128}
"""So hot that answers hardly end by themselves: they last for seconds, long enough to be killed in the middle."""


class Cluster:
    """A server with two replicas. lines: what its proxy has logged so far."""

    def __init__(self) -> None:
        flags = ["--replicas", "2", "--port", "0", "--dtype", "float32", "--gen-length", "512", "--threshold", "none"]
        command = [sys.executable, "-m", "expertshare", "serve", str(REFERENCE), *flags]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.url = ""
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._listening.wait(300)
        assert self.url, self.said
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            self.said.append(text)
            if text.startswith("{"):
                line = json.loads(text)
                self.lines.append(line)
                if line["event"] == "listening":
                    self.url = f"http://127.0.0.1:{line['port']}"
                    self._listening.set()
        self._listening.set()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def answers(self) -> list[dict[str, Any]]:
        """Log lines of answered chats."""
        lines = [line for line in list(self.lines) if line["event"] == "request"]
        return [line for line in lines if line["path"] == "/v1/chat/completions"]

    def running(self) -> int:
        return int(self.http.get("/health").json()["replicas"].get("running", 0))

    def wait_until_running(self, count: int, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while self.running() != count:
            assert time.monotonic() < until, f"{self.running()} replicas run"
            time.sleep(0.2)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one request: its text so far, and the error that ended it."""

    text: str
    error: str | None
    request_id: str


def whole(cluster: Cluster, prompt: str, **more: Any) -> Outcome:
    raw = cluster.client().chat.completions.with_raw_response.create(**body(prompt), **more)
    return Outcome(raw.parse().choices[0].message.content or "", None, raw.headers["x-request-id"])


def streamed(cluster: Cluster, prompt: str, begun: threading.Semaphore | None = None, **more: Any) -> Outcome:
    stream = cluster.client().chat.completions.create(**body(prompt), stream=True, **more)
    text, number = "", stream.response.headers["x-request-id"]
    try:
        for chunk in stream:
            piece = chunk.choices[0].delta.content or ""
            if piece and not text and begun is not None:
                begun.release()
            text += piece
    except openai.APIError as error:
        return Outcome(text, str(error.code), number)
    return Outcome(text, None, number)


def body(prompt: str) -> dict[str, Any]:
    return {"model": "reference", "messages": [{"role": "user", "content": prompt}], "seed": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    one = Cluster()
    yield one
    if one.process.poll() is None:
        one.process.terminate()
        one.process.wait(120)


@pytest.fixture(scope="module")
def expected(reference: LoadedModel) -> dict[str, str]:
    return {prompt: alone(reference, prompt, **OPTIONS).answers[0].text for prompt in PROMPTS}


@pytest.fixture(scope="module")
def long(reference: LoadedModel) -> dict[str, str]:
    """The three longest of the hot answers."""
    options = {**OPTIONS, "gen_length": LONG["max_tokens"], "temperature": LONG["temperature"]}
    texts = {prompt: alone(reference, prompt, **options).answers[0].text for prompt in PROMPTS}
    return dict(sorted(texts.items(), key=lambda item: -len(item[1]))[:3])


def test_two_replicas_answer_as_one_does(cluster: Cluster, expected: dict[str, str]) -> None:
    prompts = PROMPTS * 3
    with ThreadPoolExecutor(len(prompts)) as threads:
        outcomes = list(threads.map(lambda prompt: whole(cluster, prompt), prompts))
    assert [outcome.text for outcome in outcomes] == [expected[prompt] for prompt in prompts]
    assert len({line["replica"] for line in cluster.answers()}) == 2
    assert cluster.running() == 2


def test_streams_come_block_by_block(cluster: Cluster, expected: dict[str, str]) -> None:
    with cluster.http.stream("POST", "/v1/chat/completions", json={**body(PROMPTS[0]), "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        came = [(time.monotonic(), line) for line in response.iter_lines() if line.startswith("data: {")]
    chunks = [(at, json.loads(line.removeprefix("data: "))["choices"][0]) for at, line in came]
    texts = [(at, choice["delta"]["content"]) for at, choice in chunks if choice["delta"].get("content")]
    assert "".join(text for _, text in texts) == expected[PROMPTS[0]]
    assert chunks[-1][1]["finish_reason"]


def test_a_client_that_leaves_ends_its_work(cluster: Cluster) -> None:
    sampled = {**body(PROMPTS[0]), "temperature": 5.0, "max_tokens": 512, "stream": True}
    with cluster.http.stream("POST", "/v1/chat/completions", json=sampled) as response:
        next(line for line in response.iter_lines() if '"content": "' in line)
    until = time.monotonic() + 10
    while "expertshare_running 0.0" not in cluster.http.get("/metrics").text:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_killed_replica_costs_nothing_but_what_it_had_begun_to_stream(
    cluster: Cluster, expected: dict[str, str], long: dict[str, str]
) -> None:
    """When a process dies is not decided here: killed again until some request was asked again and some was cut off."""
    retried = lost = 0
    for _ in range(5):
        again, cut = kill_one_under_load(cluster, long)
        retried, lost = retried + again, lost + cut
        cluster.wait_until_running(2)
        assert whole(cluster, PROMPTS[0]).text == expected[PROMPTS[0]]
        if retried and lost:
            return
    raise AssertionError(f"{retried} requests were asked again, {lost} were cut off in a stream")


def kill_one_under_load(cluster: Cluster, long: dict[str, str]) -> tuple[int, int]:
    """Check what 30 requests got, and count those that were asked again and those that were cut off."""
    before = len(cluster.answers())
    victim = cluster.answers()[-1]["replica"]
    begun, prompts = threading.Semaphore(0), [*long] * 5
    with ThreadPoolExecutor(2 * len(prompts)) as threads:
        wholes = [threads.submit(whole, cluster, prompt, **LONG) for prompt in prompts]
        streams = [threads.submit(streamed, cluster, prompt, begun, **LONG) for prompt in prompts]
        for _ in prompts[: len(prompts) // 2]:  # some of them of either replica
            assert begun.acquire(timeout=120)
        os.kill(int(victim.rpartition(":")[2]), signal.SIGKILL)
        told = [future.result() for future in streams]
        answered = [future.result() for future in wholes]
    assert [outcome.text for outcome in answered] == [long[prompt] for prompt in prompts]
    for prompt, outcome in zip(prompts, told, strict=True):
        if outcome.error is None:
            assert outcome.text == long[prompt]
        else:
            assert outcome.error == "replica_lost"
            assert outcome.text
            assert long[prompt].startswith(outcome.text)
    lines = cluster.answers()[before:]
    lost = [line for line in lines if line.get("error") == "replica_lost"]
    assert {line["replica"] for line in lost} <= {victim}
    assert sorted(line["id"] for line in lost) == sorted(outcome.request_id for outcome in told if outcome.error)
    retried = [line for line in lines if line.get("retried")]
    print(f"{len(lines)} requests: {len(retried)} asked again, {len(lost)} cut off in a stream")
    return len(retried), len(lost)


def test_sigterm_lets_streams_finish_and_leaves_no_process(cluster: Cluster, long: dict[str, str]) -> None:
    prompt, text = next(iter(long.items()))
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as threads:
        stream = threads.submit(streamed, cluster, prompt, begun, **LONG)
        assert begun.acquire(timeout=60)
        cluster.process.send_signal(signal.SIGTERM)
        outcome = stream.result()
    assert (outcome.text, outcome.error) == (text, None)
    assert cluster.process.wait(120) == 0, cluster.said[-5:]
    assert any(line["event"] == "drained" and line["finished"] for line in cluster.lines)
    for replica in {line["replica"] for line in cluster.answers() if line.get("replica")}:
        with pytest.raises(ProcessLookupError):
            os.kill(int(replica.rpartition(":")[2]), 0)
