"""Who looks on hears of every forward and step, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.decoding.row import Row, Window
from expertshare.measure.cost import ForwardKind
from expertshare.models.runtime import RoutingTrace

OPTIONS = DecodingOptions(gen_length=16, threshold=0.2)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 4]]


@dataclass
class Listener:
    """Writes down what it hears."""

    forwards: list[tuple[ForwardKind, int, Tensor]] = field(default_factory=list)
    steps: list[tuple[tuple[int, ...], Window, Tensor]] = field(default_factory=list)

    def hear_forward(self, kind: ForwardKind, rows: Sequence[Row], routing: RoutingTrace) -> None:
        self.forwards.append((kind, len(rows), routing.load_NE))

    def hear_step(self, rows: Sequence[Row], window: Window, confidence_RL: Tensor) -> None:
        self.steps.append((tuple(row.steps for row in rows), window, confidence_RL))


@pytest.fixture(params=["config", "full_config"])
def any_config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.getfixturevalue(request.param)


def test_a_watched_stream_decodes_the_same(
    any_config: ModelConfig, make_model: Callable[..., Any], runtime: Callable[..., Any]
) -> None:
    decoder = BlockDecoder(make_model(any_config), runtime("des-vote"), OPTIONS)
    assert list(decoder.blocks(PROMPTS, watcher=Listener())) == list(decoder.blocks(PROMPTS))


def test_every_forward_is_heard_of_with_its_experts(
    any_config: ModelConfig, make_model: Callable[..., Any], runtime: Callable[..., Any]
) -> None:
    listener = Listener()
    stream = BlockDecoder(make_model(any_config), runtime("des-vote"), OPTIONS).blocks(PROMPTS, watcher=listener)
    for _ in stream:
        pass
    heard = [(kind, rows, tuple((load_NE > 0).sum(dim=1).tolist())) for kind, rows, load_NE in listener.forwards]
    steps = stream.cost().steps
    assert heard == [(step.kind, len(step.turns), step.active_experts) for step in steps]


def test_a_step_shows_the_block_after_it_has_written(
    config: ModelConfig, make_model: Callable[..., Any], runtime: Callable[..., Any]
) -> None:
    listener = Listener()
    stream = BlockDecoder(make_model(config), runtime(), OPTIONS).blocks(PROMPTS[:1], watcher=listener)
    first = next(stream)
    heard = listener.steps[: first.steps]
    assert [steps for steps, _, _ in heard] == [(step,) for step in range(first.steps)]
    masked = [int(window.masked_RL.sum()) for _, window, _ in heard]
    assert masked == sorted(masked, reverse=True)
    assert masked[-1] == 0
    _, window, _ = heard[-1]
    assert tuple(window.tokens_RL[window.answer_RL].tolist())[: len(first.token_ids)] == first.token_ids
    for (_, before, _), (_, _, confidence_RL) in pairwise(heard):
        assert torch.equal(confidence_RL.isfinite(), before.masked_RL)


def test_advance_runs_one_step_and_next_takes_its_block_at_once(
    config: ModelConfig, make_model: Callable[..., Any], runtime: Callable[..., Any]
) -> None:
    decoder = BlockDecoder(make_model(config), runtime(), OPTIONS)
    stream, expected = decoder.blocks(PROMPTS), list(decoder.blocks(PROMPTS))
    got = []
    while True:
        while not stream.advance():
            assert stream.cost().forwards["denoise"] > 0
        ran = stream.cost().forwards
        assert stream.advance()
        try:
            got.append(next(stream))
        except StopIteration:
            break
        assert stream.cost().forwards == ran
    assert got == expected
