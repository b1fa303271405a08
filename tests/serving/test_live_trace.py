"""What a trace says is what decoding did."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from expertshare.api import generate
from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.errors import InputError, PolicyError
from expertshare.kernels import AUTO, choose_backend
from expertshare.measure.cost import Cost
from expertshare.models import LoadedModel, MoETransformer, Runtime, encode_prompt, initialise, load_model
from expertshare.routing import parse_policy

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from expertshare.serving.live import Event, ModelTraceSource
from expertshare.serving.requests import TraceRequest

MODEL = Path(__file__).parents[2] / "models" / "reference"
PROMPT = "Write g(a) that returns a modulo 46. Then write f(data) that returns g of each of data."
POLICIES = ("vanilla", "des-vote:budget=16")
Tracing = Callable[..., list[Event]]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(MODEL)


@pytest.fixture(scope="module")
def full_attention(loaded: LoadedModel) -> LoadedModel:
    """Random weights; every step runs the whole canvas."""
    config = replace(loaded.config, attention="full", block_length=8)
    model = MoETransformer(config)
    initialise(model, seed=0, std=0.2)
    return replace(loaded, model=model.eval(), config=config)


def traced(loaded: LoadedModel, *, lock: threading.Lock | None = None, **asked: Any) -> list[Event]:
    options = asked.pop("options", None)
    source = ModelTraceSource(loaded, lock=lock or threading.Lock(), options=options)
    return list(source.trace(request(**asked), threading.Event()))


def request(**asked: Any) -> TraceRequest:
    wanted: dict[str, Any] = {"prompt": PROMPT, "policies": POLICIES, "max_tokens": 64, **asked}
    return TraceRequest(**wanted)


def of(events: list[Event], kind: str, run: int) -> list[Event]:
    return [event for event in events if event["type"] == kind and event["run"] == run]


def decoded_alone(loaded: LoadedModel, policy: str, options: DecodingOptions) -> Cost:
    """The cost of the same prompt under one policy, unwatched."""
    runtime = Runtime(policy=parse_policy(policy), backend=choose_backend(AUTO, loaded.model.device))
    assert loaded.tokenizer is not None
    stream = BlockDecoder(loaded.model, runtime, options).blocks([encode_prompt(loaded.tokenizer, PROMPT)])
    for _ in stream:
        pass
    return stream.cost()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_answers_are_those_of_generate(loaded: LoadedModel, temperature: float) -> None:
    events = traced(loaded, seed=3, options=DecodingOptions(temperature=temperature))
    for run, policy in enumerate(POLICIES):
        alone = generate(loaded, PROMPT, policy=policy, gen_length=64, seed=3, temperature=temperature).to_json()
        totals = events[-1]["runs"][run]
        assert [totals[key] for key in ("text", "token_ids", "finish_reason", "steps", "forwards")] == [
            alone[key] for key in ("text", "token_ids", "finish_reason", "steps", "forwards")
        ]
        assert totals["unique_experts"] == pytest.approx(alone["unique_experts"]["denoise"])
        assert totals["expert_bytes"] == sum(alone["expert_bytes"].values())
        assert of(events, "block", run)[-1]["answer"] == alone["text"]


@pytest.mark.parametrize("model", ["loaded", "full_attention"])
def test_the_ids_of_a_step_sum_to_its_counts(request: pytest.FixtureRequest, model: str) -> None:
    loaded: LoadedModel = request.getfixturevalue(model)
    events, config = traced(loaded, max_tokens=32, tokens_per_step=2), loaded.config
    for run, policy in enumerate(POLICIES):
        options = DecodingOptions(gen_length=32, threshold=None, steps_per_block=config.block_length // 2)
        cost, steps = decoded_alone(loaded, policy, options), of(events, "step", run)
        denoised = [forward for forward in cost.steps if forward.kind == "denoise"]
        assert [tuple(map(len, step["experts"])) for step in steps] == [forward.active_experts for forward in denoised]
        expert_bytes = config.num_expert_parameters * loaded.model.dtype.itemsize
        for step in steps:
            assert step["expert_bytes"] == sum(map(len, step["experts"])) * expert_bytes
            assert all(ids == sorted(set(ids)) for ids in step["experts"])
            assert step["unique_experts"] == pytest.approx(sum(step["unique_by_layer"]) / config.num_moe_layers)
            if config.attention == "block_causal":
                assert step["unique_by_layer"] == [len(ids) for ids in step["experts"]]
            else:
                assert all(own <= len(ids) for own, ids in zip(step["unique_by_layer"], step["experts"], strict=True))


def test_a_coreset_bounds_the_experts_of_a_block(loaded: LoadedModel) -> None:
    events = traced(loaded)
    assert all(len(ids) <= 16 for step in of(events, "step", 1) for ids in step["experts"])
    assert max(len(ids) for step in of(events, "step", 0) for ids in step["experts"]) > 16


def test_bytes_so_far_count_every_forward_and_end_at_the_total(loaded: LoadedModel) -> None:
    events = traced(loaded, prompt=f"{PROMPT} {PROMPT}", tokens_per_step=4)
    for run in range(2):
        so_far = [step["expert_bytes_so_far"] for step in of(events, "step", run)]
        # the prefill comes before the first step
        assert so_far[0] > of(events, "step", run)[0]["expert_bytes"]
        assert all(before < after for before, after in pairwise(so_far))
        assert so_far[-1] == events[-1]["runs"][run]["expert_bytes"]


def test_masks_fill_in_until_the_block_is_its_part_of_the_answer(loaded: LoadedModel) -> None:
    events = traced(loaded, tokens_per_step=2)
    for run in range(2):
        steps, blocks, text = of(events, "step", run), of(events, "block", run), ""
        assert [step["steps"] for step in steps] == list(range(1, len(steps) + 1))
        for block in blocks:
            own = [step for step in steps if step["block"] == block["block"]]
            assert [step["step"] for step in own] == list(range(block["steps"]))
            masked = [[token["masked"] for token in step["tokens"]] for step in own]
            for before, after in pairwise(masked):
                assert all(was or not now for was, now in zip(before, after, strict=True))
            if block["finish_reason"] is None:
                assert not any(masked[-1])
            text += "".join(token["text"] for token in own[-1]["tokens"] if token["role"] == "answer")
            assert own[-1]["tokens_so_far"] == block["tokens_so_far"]
        assert text.startswith(events[-1]["runs"][run]["text"])


def test_decided_tokens_keep_the_confidence_they_were_written_with(loaded: LoadedModel) -> None:
    for before, after in pairwise(of(traced(loaded, tokens_per_step=2), "step", 1)):
        for was, now in zip(before["tokens"], after["tokens"], strict=True):
            assert (now["confidence"] is None) == (now["role"] == "prompt")
            assert now["confidence"] is None or 0.0 <= now["confidence"] <= 1.0
            if before["block"] == after["block"] and not was["masked"]:
                assert now == was


def test_the_runs_take_turns_block_by_block(loaded: LoadedModel) -> None:
    events = traced(loaded, policies=("vanilla", "vanilla"))
    turns = [key for key, _ in groupby((event["block"], event["run"]) for event in events[1:-1])]
    assert turns == [(block, run) for block in range(events[-1]["runs"][0]["blocks"]) for run in range(2)]


def test_the_start_says_what_will_be_shown(loaded: LoadedModel) -> None:
    start = traced(loaded, policies=POLICIES[1:])[0]
    assert start["type"] == "start"
    assert start["runs"] == [
        {
            "run": 0,
            "policy": "des-vote:budget=16",
            "knobs": {
                "group_limit": "inside",
                "voters": "all",
                "reuse": None,
                "budget": 16,
                "ballots": "ungrouped",
            },
        }
    ]
    facts = {key: start["model"][key] for key in ("num_moe_layers", "num_experts", "experts_per_token", "block_length")}
    assert facts == {"num_moe_layers": 3, "num_experts": 64, "experts_per_token": 8, "block_length": 32}
    assert start["model"]["mask_token"] == "<|mask|>"


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"policies": ("des-vote:budget=3",)}, PolicyError, "budget"),
        ({"policies": ("none-such",)}, PolicyError, "unknown policy"),
        ({"prompt": " "}, InputError, "empty"),
        ({"prompt": "apple " * 2000}, InputError, "positions"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_the_first_event(
    loaded: LoadedModel, asked: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        traced(loaded, **asked)


def test_a_stopped_trace_ends_with_the_step_at_hand(loaded: LoadedModel) -> None:
    stop, lock, seen = threading.Event(), threading.Lock(), []
    source = ModelTraceSource(loaded, lock=lock)
    for event in source.trace(request(tokens_per_step=1), stop):
        seen.append(event["type"])
        assert not lock.locked()  # others may use the model between two steps
        if len(seen) == 4:
            stop.set()
    assert seen == ["start", "step", "step", "step"]


def test_a_trace_waits_for_the_model_and_can_be_stopped_meanwhile(loaded: LoadedModel) -> None:
    lock, stop, seen = threading.Lock(), threading.Event(), []

    def watch() -> None:
        source = ModelTraceSource(loaded, lock=lock)
        seen.extend(source.trace(request(), stop))

    with lock:
        thread = threading.Thread(target=watch)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
    assert [event["type"] for event in seen] == ["start"]
