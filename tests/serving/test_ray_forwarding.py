"""A replica that dies: asked again while nobody has seen a token, told otherwise. Needs no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from expertshare.serving.forwarding import Call, Forwarding, ReplicaLostError, answer_call, holds_answer
from expertshare.serving.responses import DONE, as_event

CALL = Call(method="POST", path="/x", query=b"", headers=((b"a", b"b"),), body=b"body")
LOST = None
"""In a script: here the replica dies."""


def head(kind: bytes = b"text/event-stream", status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def body(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def chunk(text: str = "", name: str = "one", **choice: Any) -> bytes:
    return as_event({"id": name, "choices": [{"delta": {"role": "assistant", "content": text}, **choice}]})


def forwarded(*scripts: Sequence[Message | None]) -> tuple[Forwarding, list[Message]]:
    """What a client gets where one replica after the other follows its script, and how many were asked."""
    left = list(scripts)

    async def attempt() -> AsyncGenerator[Message]:
        for message in left.pop(0):
            if message is LOST:
                raise ReplicaLostError("gone")
            yield message

    async def collect() -> list[Message]:
        return [message async for message in forwarding.messages()]

    forwarding = Forwarding(attempt)
    messages = asyncio.run(collect())
    assert not left, "a replica was not asked"
    return forwarding, messages


def sent(messages: Sequence[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages)


WHOLE = [head(), body(b""), body(chunk()), body(chunk("Hi")), body(DONE), body(b"", more=False)]


def test_a_stream_passes_as_it_is() -> None:
    forwarding, messages = forwarded(WHOLE)
    assert messages == WHOLE
    assert not forwarding.retried
    assert not forwarding.lost


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_before_the_first_token_another_replica_answers_it_all(before: int) -> None:
    forwarding, messages = forwarded([*WHOLE[:before], LOST], WHOLE)
    assert messages == WHOLE
    assert forwarding.retried
    assert not forwarding.lost


def test_a_comment_that_keeps_the_connection_alive_is_passed_at_once_and_does_not_forbid_a_second_try() -> None:
    forwarding, messages = forwarded([head(), body(chunk(name="one")), body(b": waiting\n\n"), LOST], WHOLE)
    assert [message["type"] for message in messages].count("http.response.start") == 1
    assert sent(messages) == b": waiting\n\n" + sent(WHOLE)
    assert not forwarding.lost


def test_behind_the_first_token_the_loss_is_an_event() -> None:
    forwarding, messages = forwarded([*WHOLE[:4], LOST])
    assert messages[:4] == WHOLE[:4]
    (last,) = messages[4:]
    assert not last["more_body"]
    error, done = last["body"].decode().split("\n\n")[:2]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert done == "data: [DONE]"
    assert forwarding.lost
    assert not forwarding.retried


def test_two_lost_replicas_are_a_refusal() -> None:
    forwarding, messages = forwarded([LOST], [head(), LOST])
    assert messages[0]["status"] == 503
    assert dict(messages[0]["headers"])[b"retry-after"] == b"1"
    assert json.loads(sent(messages))["error"]["code"] == "replica_lost"
    assert forwarding.retried
    assert forwarding.lost


def test_two_lost_replicas_behind_a_comment_are_an_event() -> None:
    _, messages = forwarded([head(), body(b": waiting\n\n"), LOST], [head(), LOST])
    assert messages[0]["status"] == 200
    assert b"replica_lost" in sent(messages)
    assert sent(messages).endswith(DONE)


def test_a_second_replica_that_refuses_behind_a_comment_is_heard() -> None:
    refusal = [head(b"application/json", 429), body(b'{"error": {"code": "queue_full"}}', more=False)]
    _, messages = forwarded([head(), body(b": waiting\n\n"), LOST], refusal)
    assert sent(messages) == b': waiting\n\ndata: {"error": {"code": "queue_full"}}\n\n' + DONE
    assert not messages[-1]["more_body"]


def test_a_whole_response_is_asked_again_and_half_of_one_is_cut_off() -> None:
    json_head = head(b"application/json")
    done = body(b'{"a": 1}', more=False)
    assert forwarded([json_head, LOST], [json_head, done])[1] == [json_head, done]
    assert forwarded([json_head, body(b"", more=False)])[1] == [json_head, body(b"", more=False)]
    with pytest.raises(ReplicaLostError):
        forwarded([json_head, body(b'{"a"'), LOST])


@pytest.mark.parametrize(
    ("events", "answers"),
    [
        (b"", False),
        (b": waiting\n\n", False),
        (chunk(), False),
        (as_event({"choices": [{"text": "", "finish_reason": None}]}), False),
        (chunk("a"), True),
        (chunk(finish_reason="stop"), True),
        (as_event({"choices": [{"text": "a"}]}), True),
        (as_event({"choices": [], "usage": {}}), True),
        (as_event({"error": {}}), True),
        (as_event({"type": "start"}), True),
        (DONE, True),
        (chunk() + chunk("a"), True),
    ],
)
def test_what_holds_an_answer(events: bytes, answers: bool) -> None:
    assert holds_answer(events) is answers


def test_a_call_is_answered_by_an_application() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        said = await receive()
        assert scope["method"] == "POST"
        assert scope["headers"] == [(b"a", b"b")]
        await JSONResponse(said["body"].decode())(scope, receive, send)

    async def collect() -> list[Message]:
        return [message async for message in answer_call(app, CALL)]

    assert sent(asyncio.run(collect())) == b'"body"'


def test_who_asks_no_more_has_left_and_errors_are_raised() -> None:
    ended: list[str] = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(head())
        leaving = asyncio.ensure_future(receive())
        try:
            await send(body(b"a"))
            ended.append((await leaving)["type"])
        finally:
            ended.append("end")

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send(head())
        raise ValueError("mistake")

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(b"whole")(scope, receive, send)
        raise ValueError("behind the response")

    async def run() -> None:
        answer = answer_call(endless, CALL)
        assert (await anext(answer))["type"] == "http.response.start"
        assert (await anext(answer))["body"] == b"a"
        await answer.aclose()
        with pytest.raises(ValueError, match="mistake"):
            _ = [message async for message in answer_call(broken, CALL)]
        assert sent([message async for message in answer_call(late, CALL)]) == b"whole"

    asyncio.run(run())
    assert ended[-1] == "end"
