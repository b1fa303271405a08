"""The plain loop over transformers and our decoder say the same; repetitions agree."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from expertshare.errors import ConfigError, InputError
from expertshare.lab.bench.cases import find_case
from expertshare.lab.bench.generate import Subject, answer_with, bench_generate, random_subject, same_tokens
from expertshare.lab.bench.peer_models import decode_with_peer
from expertshare.routing import parse_policy


def _subject(threshold: float = 0.95) -> Subject:
    return random_subject(
        "tiny",
        find_case("tiny"),
        num_layers=3,
        num_prompts=2,
        prompt_blocks=2,
        gen_length=16,
        threshold=threshold,
        dtype=torch.float32,
        seed=5,
        memory_bytes=10**8,
    )


@pytest.mark.parametrize("threshold", [0.95, 0.004], ids=["one-by-one", "several-at-once"])
def test_peers_decode_the_same_tokens(threshold: float) -> None:
    policies = {name: parse_policy(name) for name in ("vanilla", "des-vote:budget=8")}
    backends = ["torch", "transformers-grouped-mm"]
    found = bench_generate(_subject(threshold), policies, backends, batch_sizes=(1, 2), repeats=1, warmup=1)
    points = {(point["backend"], point["policy"], point["batch_size"]): point for point in found["generations"]}
    assert points.keys() == {
        *(("torch", policy, size) for policy in policies for size in (1, 2)),
        ("transformers-grouped-mm", "vanilla", 1),
    }
    for point in points.values():
        assert point["tokens"] == 32
        assert point["equal_across_repeats"]
        assert point["tokens_per_s"] == pytest.approx(32 / (point["ms"] / 1e3))
    for size in (1, 2):
        assert points["torch", "vanilla", size]["same_as_peer"] == {"transformers-grouped-mm": 1.0}
    assert points["torch", "des-vote:budget=8", 1]["unique_experts"] <= 8
    assert points["torch", "vanilla", 1]["faster_than"].keys() == {"transformers-grouped-mm", "vanilla"}
    assert points["torch", "vanilla", 2]["faster_than"].keys() == {"vanilla"}  # the peer has no batch of two
    json.dumps(found, allow_nan=False)


def test_batches_do_not_change_the_mean_of_unique_experts() -> None:
    """In float32 every batch decodes the same tokens, so its blocks use the same experts: 5 rows in batches of 1 and 4,
    of which the last has one row."""
    subject = replace(_subject(0.004), prompts=[[3 + row, *range(7, 22)] for row in range(5)])
    found = bench_generate(subject, {"vanilla": parse_policy("vanilla")}, ["torch"], batch_sizes=(1, 4), repeats=1)
    one, four = found["generations"]
    assert one["same_as_vanilla"] == four["same_as_vanilla"] == 1.0
    assert four["denoise_forwards"] < one["denoise_forwards"]
    assert four["unique_experts"] == pytest.approx(one["unique_experts"])


def test_repetitions_that_differ_are_told() -> None:
    from expertshare.lab.bench import generate

    subject = _subject()
    decoding = generate.Decoding(_answer(subject), subject.prompts, 2)
    decoding()
    decoding.tokens.append([(1,), (2,)])
    point = generate._point("tiny", ("torch", "vanilla", 2), decoding, [1.0], {})
    assert not point["equal_across_repeats"]


def _answer(subject: Subject):  # type: ignore[no-untyped-def]
    from expertshare.decoding import BlockDecoder
    from expertshare.models import Runtime

    decoder = BlockDecoder(subject.model, Runtime(policy=parse_policy("vanilla")), subject.options)
    return partial(answer_with, decoder)


def test_on_a_gpu_replays_run_beside_launches_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from expertshare.lab.bench import generate

    cuda = torch.device("cuda")
    assert generate.generate_backends(None, cuda)[:3] == ["triton", "triton-no-graphs", "torch"]
    assert generate.generate_backends(["triton-no-graphs"], cuda) == ["triton-no-graphs"]
    assert "triton-no-graphs" not in generate.generate_backends(None, torch.device("cpu"))
    with pytest.raises(ConfigError, match="unknown backend 'triton-graphs'"):
        generate.generate_backends(["triton-graphs"], cuda)
    monkeypatch.setattr(generate, "choose_backend", lambda name, device: name)
    runtimes = [generate._runtime(name, parse_policy("vanilla"), cuda) for name in ("triton", "triton-no-graphs")]
    assert [(runtime.backend, runtime.graphs) for runtime in runtimes] == [("triton", True), ("triton", False)]


def test_points_say_whether_steps_were_replayed() -> None:
    (point,) = bench_generate(_subject(), {"vanilla": parse_policy("vanilla")}, ["torch"], repeats=1, warmup=0)[
        "generations"
    ]
    assert point["captured"] is False
    assert "graphs are a GPU's" in point["uncaptured_because"]


def test_positions_that_only_one_answer_has_count_as_different() -> None:
    assert same_tokens([(1, 2, 3)], [(1, 9)]) == pytest.approx(1 / 3)
    assert same_tokens([()], [()]) == 1.0


def test_the_plain_loop_takes_whole_blocks_only() -> None:
    with pytest.raises(InputError, match="whole blocks"):
        decode_with_peer(None, _subject().model.config, [1, 2, 3], gen_length=8, block_length=8, threshold=0.9)  # type: ignore[arg-type]


def test_unusable_batches_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        bench_generate(_subject(), {"vanilla": parse_policy("vanilla")}, ["torch"], batch_sizes=(0,))
