"""`expertshare serve` as a process: signals, logs, flags."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from expertshare.cli import main
from expertshare.errors import ConfigError
from expertshare.models import LoadedModel
from expertshare.serving import require_extra
from expertshare.serving.uvicorn_server import _listener

from .server import PROMPTS, REFERENCE, alone

ASK = {"model": "reference", "messages": [{"role": "user", "content": PROMPTS[0]}]}
SLOW = Path(__file__).with_name("slow_server.py")


class Process:
    """A server in another process; every forward takes `forward_s` more. lines: what it has logged so far."""

    def __init__(self, *flags: str, forward_s: float) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FORWARD_S": str(forward_s)}
        command = [sys.executable, str(SLOW), "serve", str(REFERENCE), "--port", "0", "--dtype", "float32", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[dict[str, Any]] = []
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._listening = threading.Event()
        self._reader.start()
        assert self._listening.wait(120)
        assert self.url, self.process.poll()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            if not text.startswith("{"):
                continue
            line = json.loads(text)
            self.lines.append(line)
            if line["event"] == "listening":
                self.url = f"http://127.0.0.1:{line['port']}"
                self._listening.set()
        self._listening.set()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == name]

    def end(self) -> int:
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@contextmanager
def started(*flags: str, forward_s: float = 0.02) -> Iterator[Process]:
    process = Process(*flags, forward_s=forward_s)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()


def begin(url: str, **more: Any) -> Any:
    """A stream of which the first text has come, and that text."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(**ASK, stream=True, **more)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            return stream, chunk.choices[0].delta.content
    raise AssertionError("no text came")


def rest(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_refuses_what_comes(reference: LoadedModel) -> None:
    expected = alone(reference, PROMPTS[0], gen_length=64, threshold=0.99).answers[0].text
    with started("--gen-length", "64", "--threshold", "0.99", forward_s=0.2) as server:
        stream, text = begin(server.url)
        server.process.send_signal(signal.SIGTERM)
        http = httpx.Client(base_url=server.url)
        while http.get("/ready").status_code == 200:
            pass
        refused = http.post("/v1/chat/completions", json=ASK)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "not_ready"
        assert refused.headers["retry-after"]
        assert http.get("/health").status_code == 200
        http.close()
        assert text + rest(stream) == expected
        assert server.end() == 0
        assert server.events("drained")[0]["finished"] is True
        requests = [line for line in server.events("request") if line["path"] == "/v1/chat/completions"]
        assert sorted(line["status"] for line in requests) == [200, 503]
        answered = next(line for line in requests if line["status"] == 200)
        assert answered["completion_tokens"] > 0
        assert answered["finish_reasons"] == ["stop"]
        assert answered["policy"] == "vanilla"
        logged = json.dumps(server.lines)
        assert "apples" not in logged
        assert expected.splitlines()[0] not in logged


@pytest.mark.slow
def test_a_drain_has_an_end_and_ctrl_c_its_status() -> None:
    """What is not finished then is told so; prompts are logged where that was asked for."""
    flags = ("--threshold", "none", "--gen-length", "512", "--drain-timeout", "0.3", "--log-prompts")
    with started(*flags) as server:
        stream, _ = begin(server.url, max_tokens=512, temperature=5.0)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            rest(stream)
        assert server.end() == 130
        assert server.events("drained")[0]["finished"] is False
        (request,) = server.events("request")
        assert request["prompt"] == [PROMPTS[0]]
        assert request["error"] == "shutting_down"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policies", "des-vot"], "des-vote"),
        (["--policy", "des-vote:budget=2"], "budget must lie in"),
        (["--max-batch", "0"], "max_batch must be"),
        (["--timeout", "0"], "timeout_s must be"),
        (["--api-key", " "], "empty one"),
        (["--port", "70000"], "cannot listen"),
        (["--log-level", "loud"], "log level"),
        (["--expert-memory", "1GiB"], "expert layout"),
        (["--gen-length", "0"], "gen_length must be"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", str(REFERENCE), "--port", "0", *flags])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_without_the_extra_a_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertshare.serving.find_spec", lambda name: None if name == "fastapi" else name)
    with pytest.raises(ConfigError, match=r"fastapi cannot be imported: install .*expertshare\[serve\]"):
        require_extra()


def test_small_writes_leave_at_once() -> None:
    """asyncio turns Nagle's algorithm off for sockets of this protocol number only; with it answers wait 40 ms."""
    with _listener("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
