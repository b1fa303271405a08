"""Requests that nobody should send. All are told so, in OpenAI's shape, and nothing of the server's inside is shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from .server import Serve, Served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "a"}
SURROGATE = chr(0xD800)


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "reference", "messages": [USER], "max_tokens": 4, **more}


def text(**more: Any) -> dict[str, Any]:
    return {"model": "reference", "prompt": "a", "max_tokens": 4, **more}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"model"',
        b"\xff\xfe\x00",
        b'{"model": "reference", "messages": [{"role": "user", "content": "\xc3"}]}',
        b"[" * 5000,
        b'{"model":' * 3000,
        b'{"seed": ' + b"9" * 6000 + b"}",
        b"NaN",
        b"\x00" * 100,
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_bodies_that_are_no_requests(served: Served, path: str, body: bytes) -> None:
    reply = served.http().post(path, content=body, headers={"content-type": "application/json"})
    check_refused(reply, 400)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [USER]}, "model"),
        (CHAT, {"model": "reference"}, "messages"),
        (CHAT, chat(messages=[]), "messages"),
        (CHAT, chat(messages="hello"), "messages"),
        (CHAT, chat(messages=[{"role": "user"}]), "messages"),
        (CHAT, chat(messages=[{"role": "robot", "content": "a"}]), "messages"),
        (CHAT, chat(messages=[{"role": "tool", "content": "a", "tool_call_id": "1"}]), "messages"),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages"),
        (CHAT, chat(messages=[{"role": "user", "content": SURROGATE}]), "messages"),
        (CHAT, chat(messages=[{"role": "user", "content": None}]), "messages"),
        (CHAT, chat(messages=[{**USER, "name": "Tom"}]), "messages"),
        (CHAT, chat(max_tokens=0), "max_tokens"),
        (CHAT, chat(max_tokens="4"), "max_tokens"),
        (CHAT, chat(max_tokens=4.5), "max_tokens"),
        (CHAT, chat(max_tokens=10**30), "messages"),
        (CHAT, chat(max_tokens=True), "max_tokens"),
        (CHAT, chat(max_completion_tokens=5), "max_tokens"),
        (CHAT, chat(temperature=-1), "temperature"),
        (CHAT, chat(temperature="hot"), "temperature"),
        (CHAT, chat(temperature=float("inf")), "temperature"),
        (CHAT, chat(temperature=float("nan")), "temperature"),
        (CHAT, chat(top_p=0), "top_p"),
        (CHAT, chat(top_p=1.01), "top_p"),
        (CHAT, chat(top_k=-1), "top_k"),
        (CHAT, chat(threshold=1.0), "threshold"),
        (CHAT, chat(seed=-1), "seed"),
        (CHAT, chat(seed=2**63), "seed"),
        (CHAT, chat(n=0), "n"),
        (CHAT, chat(n=9), "n"),
        (CHAT, chat(stop=""), "stop"),
        (CHAT, chat(stop=["a", ""]), "stop"),
        (CHAT, chat(stop=["a"] * 17), "stop"),
        (CHAT, chat(stop=5), "stop"),
        (CHAT, chat(stream="yes"), "stream"),
        (CHAT, chat(stream_options={"include_usage": True}), "stream_options"),
        (CHAT, chat(stream=True, stream_options={"other": 1}), "stream_options"),
        (CHAT, chat(expert_policy="des-vote:budget=1"), "expert_policy"),
        (CHAT, chat(expert_policy="des-vote:budget"), "expert_policy"),
        (CHAT, chat(expert_policy=SURROGATE), "expert_policy"),
        (CHAT, chat(expert_policy="x" * 5000), "expert_policy"),
        (CHAT, chat(gen_length=5), "gen_length"),
        (CHAT, {**chat(), SURROGATE: 5}, SURROGATE),
        (TEXT, text(prompt=""), "prompt"),
        (TEXT, text(prompt=" "), "prompt"),
        (TEXT, text(prompt=[]), "prompt"),
        (TEXT, text(prompt=[[]]), "prompt"),
        (TEXT, text(prompt=[""]), "prompt"),
        (TEXT, text(prompt=[1, "a"]), "prompt"),
        (TEXT, text(prompt=[10**30]), "prompt"),
        (TEXT, text(prompt=[-1]), "prompt"),
        (TEXT, text(prompt=[5] * 1024), "prompt"),
        (TEXT, text(prompt=["a"] * 9), "prompt"),
        (TEXT, text(prompt={"a": 1}), "prompt"),
        (TEXT, text(echo=True), "echo"),
        (TEXT, text(best_of=2), "best_of"),
        (TEXT, text(suffix="b"), "suffix"),
        (TEXT, text(logprobs=3), "logprobs"),
        (TEXT, text(logprobs=0), "logprobs"),
        (TEXT, text(best_of=True), "best_of"),
        (CHAT, chat(model="x" * 10_000), "model"),
        (CHAT, {**chat(), "x" * 10_000: 5}, "x" * 200),
    ],
)
def test_requests_that_cannot_be_answered(served: Served, path: str, body: Any, param: str) -> None:
    reply = served.http().post(
        path, content=json.dumps(body).encode("ascii"), headers={"content-type": "application/json"}
    )
    assert check_refused(reply, 404 if param == "model" and "model" in body else 400)["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, chat(max_tokens=1022)), (CHAT, chat(max_tokens=10**30)), (TEXT, text(prompt=[5] * 1024))],
)
def test_what_is_too_long_for_the_context_has_the_code_that_clients_look_for(
    served: Served, path: str, body: Any
) -> None:
    error = check_refused(served.http().post(path, json=body), 400)
    assert error["code"] == "context_length_exceeded"
    assert "prompt 1" not in error["message"]
    assert "gen_length" not in error["message"]


def test_paths_methods_and_types_that_are_not_there(served: Served) -> None:
    http = served.http()
    check_refused(http.get("/v2/models"), 404)
    check_refused(http.get("/v1/models/" + "x" * 5000), 404)
    check_refused(http.get("/v1/models/%ff%fe"), 404)
    assert "POST" in check_allowed(http.get(CHAT))
    check_refused(http.delete("/v1/models"), 405)
    check_refused(http.post(CHAT, content=b"a=b", headers={"content-type": "application/x-www-form-urlencoded"}), 400)


def test_a_mistake_of_the_server_is_no_window_into_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the secret of line 5")

    served = serve()
    monkeypatch.setattr("expertshare.serving.completions.Completions._check", fail)
    reply = served.http().post(CHAT, json=chat())
    assert check_refused(reply, 500)["type"] == "server_error"
    assert "secret" not in reply.text
    counted = 'expertshare_requests_total{path="/v1/chat/completions",status="500"} 1.0'
    assert counted in served.http().get("/metrics").text


def check_allowed(reply: Any) -> str:
    check_refused(reply, 405)
    return str(reply.headers["allow"])


def check_refused(reply: Any, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(reply.content) < 7000
    for inside in ("Traceback", "site-packages", ".py", "0x"):
        assert inside not in reply.text
    return dict(error)


def test_schemathesis_finds_no_server_error(served: Served) -> None:
    """A short run over every operation of the OpenAPI description, with unusable and usable requests."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    schema = schema.include(path_regex="^/(v1|health|ready|metrics)")
    operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def run(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=[not_a_server_error])

        run()
        operations += 1
    assert operations == 7
