"""The routes: what is sent, what is refused, and that nothing goes on for a client that has gone."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from fastapi import FastAPI

from expertshare.errors import ConfigError, NumericsError, PolicyError
from expertshare.serving.live import Event, LiveLimits, live_routes, page_paths

from .live import FACTS, StubSource, ask, begin, parse, served, serving, wait_for

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "src" / "expertshare" / "serving" / "live" / "static"
ASKED = {"prompt": "Solve 3x + 5 = 17.", "policies": ["vanilla", "des-vote"], "max_tokens": 32, "seed": 7}
SCRIPT: list[Event] = [{"type": "start"}, {"type": "step", "text": "a\nb ↵ \u2028"}, {"type": "end"}]


@pytest.fixture
def source() -> StubSource:
    source = StubSource(script=lambda: iter(SCRIPT))
    source.allow()
    return source


@pytest.fixture
def port(source: StubSource) -> Iterator[int]:
    with served(source, LiveLimits(max_prompt_chars=200, max_tokens=64)) as port:
        yield port


def test_a_trace_is_sent_event_by_event(port: int, source: StubSource) -> None:
    reply = ask(port, "/live/trace", {**ASKED, "tokens_per_step": 2})
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"
    assert reply.events == SCRIPT
    assert source.asked == [{**ASKED, "policies": ("vanilla", "des-vote"), "tokens_per_step": 2}]


def test_what_is_not_asked_for_has_its_default(port: int, source: StubSource) -> None:
    assert ask(port, "/live/trace", {"prompt": "x", "policies": ["skip"]}).status == 200
    assert (source.asked[0]["max_tokens"], source.asked[0]["seed"], source.asked[0]["tokens_per_step"]) == (64, 0, None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"prompt": "\xc3"}', "not JSON"),
        (b"[" * 3000, "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        ({}, "prompt must be a string, got nothing"),
        ({**ASKED, "prompt": 5}, "prompt must be a string, got int"),
        ({**ASKED, "prompt": " \n"}, "prompt must hold some text"),
        ({**ASKED, "prompt": "x" * 201}, "may hold 200 characters"),
        (b'{"prompt": "\\ud800", "policies": ["vanilla"]}', "surrogate"),
        ({**ASKED, "policies": "vanilla"}, "list of one or two"),
        ({**ASKED, "policies": []}, "list of one or two"),
        ({**ASKED, "policies": ["vanilla"] * 3}, "list of one or two"),
        ({**ASKED, "policies": [1, 2]}, "list of one or two"),
        ({**ASKED, "policies": ["des-vot"]}, "Did you mean 'des-vote'"),
        ({**ASKED, "max_tokens": 65}, "max_tokens must be a whole number in 1..64"),
        ({**ASKED, "max_tokens": 0}, "max_tokens"),
        ({**ASKED, "max_tokens": 1.5}, "max_tokens"),
        ({**ASKED, "max_tokens": True}, "max_tokens"),
        ({**ASKED, "max_tokens": None}, "max_tokens"),
        ({**ASKED, "seed": -1}, "seed"),
        ({**ASKED, "seed": 2**53}, "seed"),
        ({**ASKED, "tokens_per_step": 0}, "tokens_per_step"),
        ({**ASKED, "max_token": 5}, "Did you mean 'max_tokens'"),
    ],
)
def test_an_unusable_body_is_refused(port: int, source: StubSource, body: Any, message: str) -> None:
    reply = ask(port, "/live/trace", body)
    assert reply.status == 400
    assert message in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    assert source.asked == []


def test_a_large_body_is_refused(port: int) -> None:
    assert ask(port, "/live/trace", b" " * 100_000).status == 413


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_type_is_refused(port: int, content_type: str) -> None:
    """A page of another origin can send these without asking."""
    assert ask(port, "/live/trace", json.dumps(ASKED).encode(), {"Content-Type": content_type}).status == 415


def test_what_the_source_cannot_do_is_refused_before_anything_is_sent() -> None:
    def script() -> Iterator[Event]:
        raise PolicyError("the budget must lie in 12..64")
        yield {}

    source = StubSource(script=script)
    with served(source) as port:
        reply = ask(port, "/live/trace", ASKED)
        assert (reply.status, reply.error["message"]) == (400, "the budget must lie in 12..64")
        wait_for(lambda: ask(port, "/live/trace", ASKED).status == 400)  # the slot is free again


def test_what_goes_wrong_later_is_the_last_event() -> None:
    def script() -> Iterator[Event]:
        yield {"type": "start"}
        raise NumericsError("expected finite logits")

    source = StubSource(script=script)
    source.allow()
    with served(source) as port:
        assert ask(port, "/live/trace", ASKED).events == [
            {"type": "start"},
            {"type": "error", "message": "expected finite logits"},
        ]


def test_a_trace_that_takes_too_long_is_ended() -> None:
    source = StubSource(script=lambda: iter([{"type": "start"}, {"type": "step"}]))
    with served(source, LiveLimits(max_seconds=0.3)) as port:
        connection, response = _begun(source, port)
        assert parse(response.read().decode().strip()) == {
            "type": "error",
            "message": "the trace took longer than the 0.3 s that this server allows: ask for less",
        }
        connection.close()
        wait_for(source.closed.is_set)


def test_one_trace_runs_at_a_time() -> None:
    source = StubSource(script=lambda: iter(SCRIPT))
    with served(source) as port:
        connection, response = _begun(source, port)
        refused = ask(port, "/live/trace", ASKED)
        assert (refused.status, refused.headers["retry-after"]) == (429, "2")
        assert "another trace" in refused.error["message"]
        source.allow()
        assert b"event: end" in response.read()
        connection.close()
        wait_for(source.closed.is_set)
        wait_for(lambda: ask(port, "/live/trace", ASKED).status == 200)


def test_a_client_that_leaves_ends_its_trace() -> None:
    source = StubSource(script=lambda: iter(SCRIPT))
    with served(source) as port:
        connection, response = _begun(source, port)
        response.close()
        connection.close()
        wait_for(source.closed.is_set)
        source.allow()
        wait_for(lambda: ask(port, "/live/trace", ASKED).status == 200)


async def traced(app: FastAPI, on_body: Callable[[bytes, bool], Awaitable[None]]) -> int:
    """The status of a trace whose client hears of every piece of the body, and whether more is to come."""
    unread, status = [{"type": "http.request", "body": json.dumps(ASKED).encode(), "more_body": False}], 0

    async def receive() -> Any:
        return unread.pop() if unread else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        if message["type"] == "http.response.body":
            await on_body(message.get("body", b""), message.get("more_body", False))

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/live/trace", "query_string": b"", "headers": headers}
    await asyncio.wait_for(app(scope, receive, send), 10)
    return status


async def take(_body: bytes, _more: bool) -> None:
    """As a client that is quick."""


def test_whoever_has_read_a_trace_to_its_end_can_ask_for_another_at_once(source: StubSource) -> None:
    app, later = FastAPI(), []
    app.include_router(live_routes(source))

    async def ask_again(_body: bytes, more: bool) -> None:
        if not more:
            later.append(await traced(app, take))

    assert asyncio.run(traced(app, ask_again)) == 200
    assert later == [200]


def test_a_client_that_takes_nothing_gives_up_its_trace(source: StubSource) -> None:
    app = FastAPI()
    app.include_router(live_routes(source, limits=LiveLimits(send_timeout_s=0.1)))

    async def stall(body: bytes, _more: bool) -> None:
        if body:
            await asyncio.Event().wait()

    async def both() -> None:
        assert await traced(app, stall) == 200
        await asyncio.to_thread(wait_for, lambda: asyncio.run(traced(app, take)) == 200)

    asyncio.run(both())


def test_a_trace_that_does_not_begin_in_time_is_refused() -> None:
    with served(StubSource(script=lambda: iter(SCRIPT)), LiveLimits(max_seconds=0.1)) as port:
        reply = ask(port, "/live/trace", ASKED)
        assert (reply.status, reply.error["type"]) == (408, "timeout_error")
        assert "longer than the 0.1 s" in reply.error["message"]


def _begun(source: StubSource, port: int) -> tuple[Any, Any]:
    """A trace of which the first event has come and no other will."""
    source.allow(1)
    connection, response = begin(port, "/live/trace", ASKED)
    lines = response.readline() + response.readline()
    assert parse(lines.decode().rstrip("\n")) == {"type": "start"}
    return connection, response


def test_settings_say_what_can_be_chosen(port: int) -> None:
    settings = json.loads(ask(port, "/live/settings").body)
    assert settings["model"] == FACTS
    assert settings["limits"]["policies"][:2] == ["vanilla", "des-vote"]
    assert (settings["limits"]["max_tokens"], settings["limits"]["max_prompt_chars"]) == (64, 200)


def test_the_body_is_in_the_openapi_description(port: int) -> None:
    paths = json.loads(ask(port, "/openapi.json").body)["paths"]
    schema = paths["/live/trace"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["max_tokens"]["maximum"] == 64
    assert "/" not in paths


def test_the_page_and_every_file_that_it_names_are_served(port: int) -> None:
    page = ask(port, "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    named = set(re.findall(rb'"/live/([\w.]+)"', page.body))
    for name in STATIC.glob("*.js"):
        named |= set(re.findall(rb'from "\./([\w.]+)"', name.read_bytes()))
    assert {name.decode() for name in named} | {"index.html"} == {path.name for path in STATIC.iterdir()}
    assert set(page_paths()) == {"/", *(f"/live/{path.name}" for path in STATIC.iterdir())}
    for name in named:
        reply = ask(port, f"/live/{name.decode()}")
        assert (reply.status, reply.body) == (200, (STATIC / name.decode()).read_bytes())
        assert reply.headers["x-content-type-options"] == "nosniff"
        known = ask(port, f"/live/{name.decode()}", headers={"If-None-Match": reply.headers["etag"]})
        assert (known.status, known.body) == (304, b"")


@pytest.mark.parametrize("path", ["/live/none.js", "/live/..%2froutes.py", "/live/../routes.py", "/live/"])
def test_other_files_do_not_exist(port: int, path: str) -> None:
    assert ask(port, path).status == 404


def test_files_are_package_data_and_name_no_other_host() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "serving/live/static/*" in project["tool"]["setuptools"]["package-data"]["expertshare"]
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert re.findall(r"https?:|src=\"//|url\(", text) == [], path.name
        assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text) == [], path.name


def test_the_example_of_the_document_serves_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    document = (ROOT / "docs" / "live-page.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(example, names)
    with serving(names["app"]) as port:
        reply = ask(port, "/live/trace", {**ASKED, "policies": ["vanilla", "des-vote:budget=16"]})
    assert [event["type"] for event in reply.events][:: len(reply.events) - 1] == ["start", "end"]


@pytest.mark.parametrize("wrong", [{"policies": ()}, {"max_tokens": 0}, {"max_seconds": 0.0}])
def test_limits_that_allow_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LiveLimits(**wrong)
