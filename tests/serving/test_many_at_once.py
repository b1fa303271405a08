"""Many clients at once, of all kinds, some of whom leave: every answer is the one that its request gets alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from expertshare.config import ModelConfig, RouterSpec
from expertshare.decoding import DecodingOptions, generate
from expertshare.models import LoadedModel, MoETransformer, Runtime, decode_answer, initialise
from expertshare.routing import parse_policy
from expertshare.serving import Engine, EngineLimits
from expertshare.serving.scheduling import Event, Failure, Order, Progress

from .server import PROMPTS, Serve, alone

POLICIES = ("vanilla", "des-vote:budget=24", "des-seq")


@dataclass(frozen=True, slots=True)
class Asked:
    """One client's request; leaves: after its first piece of text."""

    prompt: str
    policy: str
    options: dict[str, Any]
    leaves: bool


def requests(count: int, seed: int) -> list[Asked]:
    chance = random.Random(seed)
    return [
        Asked(
            prompt=chance.choice(PROMPTS),
            policy=chance.choice(POLICIES),
            options={
                "max_tokens": chance.choice((8, 24, 40, 64)),
                **chance.choice(({}, {"temperature": 1.0, "seed": chance.randrange(4)})),
            },
            leaves=number % 5 == 4,
        )
        for number in range(count)
    ]


def test_sixteen_concurrent_streams_of_which_a_fifth_leaves(serve: Serve, reference: LoadedModel) -> None:
    served = serve(limits=EngineLimits(max_batch=6))
    asked = requests(16, seed=3)
    expected = []
    for one in asked:
        options = {**one.options, "gen_length": max(one.options["max_tokens"], reference.config.block_length)}
        limit = options.pop("max_tokens")
        answer = alone(reference, one.prompt, policy=one.policy, **options).answers[0]
        expected.append(decode_answer(reference.tokenizer, answer.token_ids[:limit]))

    async def ask(client: openai.AsyncOpenAI, one: Asked) -> str:
        stream = await client.chat.completions.create(
            model="reference",
            messages=[{"role": "user", "content": one.prompt}],
            stream=True,
            extra_body={"expert_policy": one.policy},
            **one.options,
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if one.leaves and text:
                await stream.close()
                break
        return text

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(ask(client, one) for one in asked)))

    texts = asyncio.run(ask_all())
    for one, text, whole in zip(asked, texts, expected, strict=True):
        assert whole.startswith(text) if one.leaves else text == whole
    served.wait_until(lambda: served.engine.num_running == served.engine.num_waiting == 0)
    counts = served.engine.counts
    assert counts.finished["cancelled"] + counts.finished["eos"] + counts.finished["length"] == 16
    assert counts.row_steps > counts.forwards["denoise"]  # rows did share forwards


def test_rows_share_forwards_and_policies_take_turns(serve: Serve, reference: LoadedModel) -> None:
    """Eight equal requests in two policies: each policy's four run as one, the policies step by step."""
    served, seen = serve(), []
    handle = reference.model.register_forward_pre_hook(
        lambda _model, given: seen.append((given[1].policy.name, len(given[0].tokens_BS)))
    )
    events: list[Event] = []
    policies = [served.engine.offered.choose(name) for name in ("vanilla", "des-vote")]
    options = DecodingOptions(gen_length=8, threshold=None, stop_at_eos=False)
    orders = [
        (Order(prompt=(5, 6, 7), options=options, policy=policy), events.append)
        for policy in policies
        for _ in range(4)
    ]
    served.engine.submit(orders)
    assert served.engine.wait_until_idle(60)
    handle.remove()
    assert seen == [("vanilla", 4), ("des-vote", 4)] * 8
    assert sum(isinstance(event, Progress) for event in events) == 8


def test_rows_of_different_policies_do_not_share_numbers(serve: Serve) -> None:
    """The first row of one policy leaves; the first row of another one stays."""
    served, heard = serve(), {}
    orders = []
    options = DecodingOptions(gen_length=64, threshold=None, stop_at_eos=False)
    for name in ("vanilla", "des-vote", "des-seq"):
        heard[name] = []
        order = Order(prompt=(5, 6, 7), options=options, policy=served.engine.offered.choose(name))
        orders.append((order, heard[name].append))
    with served.engine.model_lock:
        tickets = served.engine.submit(orders)
    served.wait_until(lambda: all(heard.values()))
    served.engine.cancel(tickets[:1])
    assert served.engine.wait_until_idle(60)
    assert [heard[name][-1].finish_reason is None for name in heard] == [True, False, False]


def _full_attention_model() -> LoadedModel:
    config = ModelConfig(
        family="llada_moe",
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        rotary_dim=8,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        num_dense_layers=0,
        dense_hidden=48,
        expert_hidden=16,
        shared_hidden=0,
        router=RouterSpec(num_experts=16, top_k=4, activation="softmax", renormalise=False),
        attention="full",
        block_length=8,
        max_positions=128,
        mask_id=63,
        eos_ids=(62,),
        pad_id=0,
    )
    model = MoETransformer(config).eval()
    initialise(model, seed=2, std=0.3)
    with torch.no_grad():
        model.head.weight.mul_(2.0)
    return LoadedModel(model=model, config=config, tokenizer=None, path=Path("tiny"))


@pytest.fixture
def full_attention() -> Iterator[Engine]:
    loaded = _full_attention_model()
    with Engine(loaded, Runtime(policy=parse_policy("des-vote:budget=8")), limits=EngineLimits(max_batch=3)) as engine:
        yield engine


def test_full_attention_rows_are_batched_too(full_attention: Engine) -> None:
    engine, chance = full_attention, random.Random(1)
    orders, heard = [], {}
    for number in range(7):
        options = DecodingOptions(gen_length=chance.choice((8, 16, 24)), threshold=0.6, temperature=0.5, seed=number)
        prompt = tuple(chance.randrange(60) for _ in range(chance.randrange(1, 20)))
        heard[number] = []
        orders.append((Order(prompt=prompt, options=options, policy=engine.offered.default), heard[number].append))
    engine.submit(orders)
    assert engine.wait_until_idle(60)
    runtime = engine.runtime
    for number, (order, _) in enumerate(orders):
        assert all(isinstance(event, Progress) for event in heard[number])
        tokens = [token for event in heard[number] for token in event.token_ids]
        row = generate(engine.loaded.model, runtime, order.options, [order.prompt]).rows[0]
        assert tokens == list(row.token_ids)
        assert heard[number][-1].finish_reason == row.finish_reason
    assert engine.counts.row_steps > engine.counts.forwards["denoise"]


def test_a_failed_engine_tells_everybody_and_takes_nothing_more(
    full_attention: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody foresaw ends the thread: no request hangs, and the state says so."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of something")

    engine, events = full_attention, []
    monkeypatch.setattr("threading.excepthook", lambda _arguments: None)
    monkeypatch.setattr(engine.loaded.model, "forward", fail)
    order = Order(prompt=(1, 2), options=DecodingOptions(gen_length=8), policy=engine.offered.default)
    engine.submit([(order, events.append), (replace(order, prompt=(3,)), events.append)])
    engine._thread.join(20)
    assert [event.kind for event in events if isinstance(event, Failure)] == ["broken", "broken"]
    assert engine.state == "broken"
    with pytest.raises(Exception, match="but it is broken"):
        engine.submit([(order, events.append)])
