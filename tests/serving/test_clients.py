"""Clients that people have: the openai package, and curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import Any

import openai
import pytest

from expertshare.models import LoadedModel, decode_answer

from .server import PROMPTS, Serve, Served, alone

ASK = {"model": "reference", "messages": [{"role": "user", "content": PROMPTS[0]}]}


def test_a_chat_is_answered_as_generate_does(served: Served, reference: LoadedModel) -> None:
    expected = alone(reference, PROMPTS[0], gen_length=64, policy="des-vote:budget=24")
    reply = served.openai().chat.completions.create(
        **ASK, max_completion_tokens=64, extra_body={"expert_policy": "des-vote:budget=24"}
    )
    assert reply.object == "chat.completion"
    assert reply.model == "reference"
    assert [choice.message.content for choice in reply.choices] == [expected.answers[0].text]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == len(expected.answers[0].token_ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    costs = reply.model_extra["expertshare"]
    assert costs["policy"] == "des-vote:budget=24"
    assert (costs["steps"], costs["forwards"]) == (expected.answers[0].steps, expected.answers[0].forwards)
    assert costs["unique_experts"] == pytest.approx(dict(expected.cost.unique_experts))


def test_a_stream_brings_the_same_text_block_by_block(served: Served, reference: LoadedModel) -> None:
    expected = alone(reference, PROMPTS[0], gen_length=64)
    stream = served.openai().chat.completions.create(
        **ASK, max_tokens=64, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    with_choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    texts = [choice.delta.content for choice in with_choices if choice.delta.content]
    assert "".join(texts) == expected.answers[0].text
    assert len(texts) == 2  # two blocks
    assert with_choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in with_choices][-2:] == [None, "stop"]
    assert chunks[-1].usage.completion_tokens == len(expected.answers[0].token_ids)
    assert chunks[-2].model_extra["expertshare"]["policy"] == "vanilla"
    assert len({chunk.id for chunk in chunks}) == 1


def test_async_clients_too(served: Served, reference: LoadedModel) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(**ASK, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == alone(reference, PROMPTS[0]).answers[0].text


@pytest.mark.parametrize("policy", ["vanilla", "block-top-p:top_p_experts=0.6"])
def test_a_seed_gives_the_tokens_that_generate_gives(served: Served, reference: LoadedModel, policy: str) -> None:
    how = {"temperature": 4.0, "top_p": 0.99, "top_k": 200, "threshold": 0.7}
    texts = [alone(reference, "Hello", policy=policy, seed=seed, **how).answers[0].text for seed in (11, 12)]
    reply = served.openai().chat.completions.create(
        model="reference",
        messages=[{"role": "user", "content": "Hello"}],
        temperature=how["temperature"],
        top_p=how["top_p"],
        seed=11,
        n=2,
        extra_body={"top_k": 200, "threshold": 0.7, "expert_policy": policy},
    )
    assert [choice.message.content for choice in reply.choices] == texts
    assert texts[0] != texts[1]


def test_without_a_seed_sampling_draws_one_and_says_which(served: Served) -> None:
    def ask(**more: Any) -> Any:
        return served.openai().chat.completions.create(**ASK, temperature=1.5, max_tokens=16, **more)

    first, second = ask(), ask()
    seeds = [reply.model_extra["expertshare"]["seed"] for reply in (first, second)]
    assert seeds[0] != seeds[1]
    again = ask(seed=seeds[0])
    assert again.choices[0].message.content == first.choices[0].message.content


def test_completions_take_text_and_token_ids_as_they_are(served: Served, reference: LoadedModel) -> None:
    client = served.openai()
    texts = [alone(reference, prompt, gen_length=32, chat=False).answers[0].text for prompt in PROMPTS[:2]]
    reply = client.completions.create(model="reference", prompt=list(PROMPTS[:2]), max_tokens=32)
    assert [choice.text for choice in reply.choices] == texts
    assert [choice.index for choice in reply.choices] == [0, 1]
    ids = reference.tokenizer(PROMPTS[1], add_special_tokens=False)["input_ids"]
    for prompt in (ids, [ids]):
        assert client.completions.create(model="reference", prompt=prompt, max_tokens=32).choices[0].text == texts[1]
    stream = client.completions.create(model="reference", prompt=PROMPTS[1], max_tokens=32, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == texts[1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["####", ["zebra", "\n"], "= 15\n#### 15"])
def test_stop_strings(served: Served, reference: LoadedModel, stop: str | list[str], stream: bool) -> None:
    """The last one lies across the border of two blocks."""
    whole = alone(reference, PROMPTS[0]).answers[0].text
    stops = [stop] if isinstance(stop, str) else stop
    expected = whole[: min(whole.find(s) for s in stops if s in whole)]
    reply: Any = served.openai().chat.completions.create(**ASK, stop=stop, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in reply]
        text = "".join(choice.delta.content or "" for choice in choices)
        finish = choices[-1].finish_reason
    else:
        text, finish = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, finish) == (expected, "stop")


def test_a_short_limit_ends_with_length(served: Served, reference: LoadedModel) -> None:
    """A limit below the block's length only cuts: the tokens are those of an answer that may be long."""
    for prompt in PROMPTS:
        whole = alone(reference, prompt, gen_length=64).answers[0].token_ids
        for limit in (1, 5, 20):
            asked = {"model": "reference", "messages": [{"role": "user", "content": prompt}], "temperature": 0}
            reply = served.openai().chat.completions.create(**asked, max_tokens=limit)
            assert reply.usage.completion_tokens == min(limit, len(whole))
            assert reply.choices[0].finish_reason == ("length" if limit < len(whole) else "stop")
            assert reply.choices[0].message.content == decode_answer(reference.tokenizer, whole[:limit])


def test_models(served: Served) -> None:
    client = served.openai()
    assert [model.id for model in client.models.list()] == ["reference"]
    assert client.models.retrieve("reference").owned_by == "expertshare"
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "a"}])
    assert caught.value.code == "model_not_found"


def test_a_conversation_goes_through_the_chat_template(served: Served) -> None:
    client = served.openai()
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "What is 7 "}, {"type": "text", "text": "plus 8?"}]},
        {"role": "assistant", "content": "#### 15", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "What is 2 plus 3?"},
    ]
    reply = client.chat.completions.create(model="reference", messages=turns)  # type: ignore[arg-type]
    longer = reply.usage.prompt_tokens
    assert longer > client.chat.completions.create(model="reference", messages=turns[2:]).usage.prompt_tokens  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="chat template refuses"):  # this model's knows no system turns
        client.chat.completions.create(model="reference", messages=[{"role": "system", "content": "Be kind."}])


def test_what_has_no_effect_is_accepted_and_the_rest_refused_by_name(served: Served) -> None:
    client = served.openai()
    client.chat.completions.create(
        **ASK, user="me", metadata={"a": "b"}, frequency_penalty=0, logprobs=False, tools=[], logit_bias={}
    )
    for name, value in (
        ("frequency_penalty", 0.5),
        ("logprobs", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 3}),
    ):
        with pytest.raises(openai.BadRequestError, match=f"unsupported parameter: '{name}'") as caught:
            client.chat.completions.create(**ASK, **{name: value})
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_only_offered_policies(serve: Serve) -> None:
    limited = serve(policy="des-vote:budget=24", policies=["des-seq"])
    client = limited.openai()
    assert client.chat.completions.create(**ASK).model_extra["expertshare"]["policy"] == "des-vote:budget=24"
    client.chat.completions.create(**ASK, extra_body={"expert_policy": "des-seq:experts_per_vote=2"})
    with pytest.raises(openai.BadRequestError, match="does not offer the policy vanilla") as caught:
        client.chat.completions.create(**ASK, extra_body={"expert_policy": "vanilla"})
    assert caught.value.param == "expert_policy"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served: Served, reference: LoadedModel) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "-N", "-H", "Content-Type: application/json", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    body = json.dumps({**ASK, "stream": True})
    events = [line for line in curl(f"{served.url}/v1/chat/completions", "-d", body).split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == alone(reference, PROMPTS[0]).answers[0].text
    assert json.loads(curl(f"{served.url}/health")) == {"status": "ready"}
