"""What an operator can bound, and what clients do that must not hurt others."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from expertshare.models import LoadedModel
from expertshare.serving import EngineLimits, ServerSettings

from .server import PROMPTS, Serve, Served, alone

ASK = {"model": "reference", "messages": [{"role": "user", "content": PROMPTS[0]}]}
STEADY = {"threshold": None, "stop_at_eos": False, "gen_length": 256}
"""One token a step and on to the end: hundreds of forwards."""
Slowly = Callable[[float], None]


def open_stream(served: Served, **more: Any) -> socket.socket:
    """A client that has sent its request and reads nothing."""
    body = json.dumps({**ASK, "stream": True, **more}).encode()
    connection = socket.create_connection(served.address)
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    connection.sendall(head.encode() + body)
    return connection


def test_a_full_queue_answers_429_with_retry_after(serve: Serve) -> None:
    served = serve(limits=EngineLimits(max_batch=1, max_queue=1))
    client, http = served.openai(), served.http()
    replies: list[Any] = []
    threads = []
    with served.engine.model_lock:  # nothing moves
        for known in (1, 2):
            threads.append(threading.Thread(target=lambda: replies.append(client.chat.completions.create(**ASK))))
            threads[-1].start()
            served.wait_until(lambda k=known: served.engine.num_running + served.engine.num_waiting == k)
        assert served.engine.num_running == 1
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**ASK)
        refused = http.post("/v1/chat/completions", json={**ASK, "stream": True})
    assert caught.value.code == "queue_full"
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join()
    assert len({reply.choices[0].message.content for reply in replies}) == 1
    assert len(replies) == 2


@pytest.mark.parametrize("more", [{"n": 3}, {"n": 4, "stream": True}])
def test_what_never_fits_is_refused_and_not_put_off(serve: Serve, more: dict[str, Any]) -> None:
    """A client would take 429 for an invitation to ask again, for ever."""
    served = serve(limits=EngineLimits(max_batch=1, max_queue=1))
    refused = served.http().post("/v1/chat/completions", json={**ASK, **more})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "at most 2 answers at once" in refused.json()["error"]["message"]
    assert served.http().post("/v1/chat/completions", json={**ASK, "n": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_work_with_it(serve: Serve, slowly: Slowly, stream: bool) -> None:
    served = serve(**STEADY)
    slowly(0.01)
    connection = open_stream(served, stream=stream)
    served.wait_until(lambda: served.forwards() >= 3)
    connection.close()
    served.wait_until(lambda: served.engine.num_running == 0, seconds=5)
    after = served.forwards()
    time.sleep(0.2)
    assert served.forwards() == after < 100  # of at least 256
    assert served.engine.counts.finished["cancelled"] == 1


def test_a_client_that_leaves_the_queue_is_never_decoded(serve: Serve) -> None:
    served = serve(limits=EngineLimits(max_batch=1))
    with served.engine.model_lock:
        first, second = open_stream(served), None
        served.wait_until(lambda: served.engine.num_running == 1)
        second = open_stream(served)
        served.wait_until(lambda: served.engine.num_waiting == 1)
        second.close()
        time.sleep(0.1)
    served.wait_until(lambda: served.engine.num_running == served.engine.num_waiting == 0)
    assert served.engine.counts.finished == {"eos": 1, "cancelled": 1}
    first.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request_wherever_it_is(serve: Serve, slowly: Slowly, stream: bool) -> None:
    served = serve(limits=EngineLimits(timeout_s=0.3), **STEADY)
    slowly(0.01)
    if stream:
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(served.openai().chat.completions.create(**ASK, stream=True))
    else:
        with pytest.raises(openai.APIStatusError) as caught:
            served.openai().chat.completions.create(**ASK)
        assert (caught.value.status_code, caught.value.code) == (408, "deadline_exceeded")
        assert caught.value.response.headers["x-should-retry"] == "false"
    served.wait_until(lambda: served.engine.num_running == 0)
    assert served.engine.counts.finished == {"deadline": 1}
    assert served.forwards() < 100


def test_slow_readers_block_nobody_and_lose_their_place(serve: Serve, reference: LoadedModel) -> None:
    """Twenty who read nothing, beside one who does; their answers wait in bounded buffers."""
    served = serve(limits=EngineLimits(max_batch=4), settings=ServerSettings(send_timeout_s=0.5))
    slow = [open_stream(served, max_tokens=64) for _ in range(20)]
    text = served.openai().chat.completions.create(**ASK).choices[0].message.content
    assert text == alone(reference, PROMPTS[0]).answers[0].text
    served.wait_until(lambda: served.engine.num_running == served.engine.num_waiting == 0)
    for connection in slow:
        connection.close()


def test_no_key_no_answer(serve: Serve) -> None:
    served = serve(settings=ServerSettings(api_key="open sesame"))
    assert served.openai("open sesame").chat.completions.create(**ASK).choices
    for key in ("open", "open sesame2", "öffne dich".encode().decode("latin-1")):
        with pytest.raises(openai.AuthenticationError) as caught:
            served.openai(key.encode("latin-1", "ignore").decode("ascii", "ignore")).models.list()
        assert caught.value.code == "invalid_api_key"
    http = served.http()
    for path in ("/v1/models", "/openapi.json", "/", "/nothing"):
        assert http.get(path).status_code == 401
    raw = http.get("/v1/models", headers={b"Authorization": "Bearer öffne".encode()})  # type: ignore[dict-item]
    assert (raw.status_code, raw.headers["www-authenticate"]) == (401, "Bearer")
    for path in ("/health", "/ready", "/metrics"):
        assert http.get(path).status_code == 200


def test_long_prompts_and_bodies_are_refused(serve: Serve) -> None:
    settings = ServerSettings(max_body_bytes=2000, max_prompt_tokens=40, max_choices=2)
    served = serve(settings=settings, limits=EngineLimits(max_context=64))
    http, client = served.http(), served.openai()
    long = {**ASK, "messages": [{"role": "user", "content": "x" * 3000}]}
    for send in ({"json": long}, {"content": (b"x" * 100 for _ in range(100))}):
        refused = http.post("/v1/chat/completions", **send)  # with a length, and in chunks
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="reference", prompt=[5] * 41)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="this server takes 64"):
        client.completions.create(model="reference", prompt=[5] * 30, max_tokens=35)
    assert client.completions.create(model="reference", prompt=[5] * 30).usage.completion_tokens <= 34
    for more in ({"n": 3}, {"prompt": ["a", "b", "c"]}, {"prompt": ["a", "b"], "n": 2}):
        with pytest.raises(openai.BadRequestError, match="at most 2 answers"):
            client.completions.create(**{"model": "reference", "prompt": "a", **more})


def test_a_body_that_does_not_come(serve: Serve) -> None:
    served = serve(settings=ServerSettings(body_timeout_s=0.2))
    connection = socket.create_connection(served.address)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    connection.close()


def test_the_live_page_takes_turns_with_the_engine(serve: Serve, reference: LoadedModel) -> None:
    served = serve()
    assert "<html" in served.http().get("/").text
    trace = {"prompt": PROMPTS[0], "policies": ["vanilla", "des-vote"], "max_tokens": 64, "seed": 0}
    with httpx.stream("POST", f"{served.url}/live/trace", json=trace, timeout=60) as events:
        lines = events.iter_lines()
        first = next(lines)
        text = served.openai().chat.completions.create(**ASK).choices[0].message.content
        rest = list(lines)
    assert text == alone(reference, PROMPTS[0]).answers[0].text
    assert "start" in first + "".join(rest)
    assert '"end"' in "".join(rest)
