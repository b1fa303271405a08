"""Coresets that serve several steps: chosen when they should be, kept between, and each row's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from backends import backend_named
from expertshare import native
from expertshare.config import ModelConfig
from expertshare.decoding import BlockDecoder, DecodingOptions, generate
from expertshare.decoding.forwards import AccountedModel
from expertshare.decoding.row import Row
from expertshare.measure.cost import ForwardKind
from expertshare.models.runtime import ForwardInput, ForwardOutput, Runtime
from expertshare.models.transformer import MoETransformer
from expertshare.routing import Layerwise, make_policy

MakeModel = Callable[..., MoETransformer]
MakeRuntime = Callable[..., Runtime]
OPTIONS = DecodingOptions(gen_length=16, threshold=None, steps_per_block=5, stop_at_eos=False)
PROMPTS = [list(range(5, 5 + length)) for length in (3, 11, 8)]

Seen = list[tuple[ForwardKind, list[tuple[int, int, int]], ForwardInput, ForwardOutput]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every forward of decoding: its kind, (row, block, step) of its rows, and what went in and came out."""
    found: Seen = []
    forward = MoETransformer.forward

    def watched(self: MoETransformer, inputs: ForwardInput, *others: Any) -> ForwardOutput:
        output = forward(self, inputs, *others)
        found[-1] = (*found[-1][:2], inputs, output)
        return output

    call = AccountedModel.__call__

    def accounted(self: AccountedModel, kind: ForwardKind, rows: Sequence[Row], *others: Any) -> ForwardOutput:
        found.append((kind, [(row.number, row.block, row.steps) for row in rows], *([None] * 2)))  # type: ignore[arg-type]
        return call(self, kind, rows, *others)

    monkeypatch.setattr(MoETransformer, "forward", watched)
    monkeypatch.setattr(AccountedModel, "__call__", accounted)
    return found


def _by_step(seen: Seen, layer: int) -> dict[tuple[int, int, int], torch.Tensor]:
    """Coresets [groups of the row, E] of one MoE layer in denoising forwards, by row, block and step."""
    found: dict[tuple[int, int, int], torch.Tensor] = {}
    for kind, places, _, output in seen:
        if kind == "denoise":
            member_GE = output.routing.coresets[layer].member_GE
            found |= dict(zip(places, member_GE.chunk(len(places)), strict=True))
    return found


@pytest.mark.parametrize("layout", ["config", "full_config"])
@pytest.mark.parametrize("reuse", [2, 3, 100])
def test_a_block_keeps_its_coreset_for_so_many_steps(
    request: pytest.FixtureRequest, make_model: MakeModel, runtime: MakeRuntime, seen: Seen, layout: str, reuse: int
) -> None:
    config: ModelConfig = request.getfixturevalue(layout)
    model = make_model(config)
    policy = Layerwise(
        layers=tuple(
            make_policy("des-vote", {"budget": 6, **({"reuse": reuse} if layer else {})})
            for layer in range(config.num_moe_layers)
        )
    )
    generate(model, replace(runtime(), policy=policy), OPTIONS, PROMPTS)
    for layer in range(config.num_moe_layers):
        coresets = _by_step(seen, layer)
        assert max(step for *_, step in coresets) == 4
        for (row, block, step), member_GE in coresets.items():
            every = reuse if layer else 1
            held = coresets[row, block, step // every * every]
            assert torch.equal(member_GE, held[: len(member_GE)])
        changes = sum(not torch.equal(m, coresets[r, b, s - 1][: len(m)]) for (r, b, s), m in coresets.items() if s)
        assert (changes > 0) == (layer == 0 or reuse < 5)


def test_a_new_block_and_other_forwards_select_anew(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime, seen: Seen
) -> None:
    generate(make_model(config), runtime("des-vote:budget=8,reuse=100"), OPTIONS, PROMPTS)
    for kind, places, inputs, _ in seen:
        if kind != "denoise" or all(step == 0 for *_, step in places):
            assert inputs.previous is None or set(inputs.previous) == {None}
    first = {(row, block): m for (row, block, step), m in _by_step(seen, 0).items() if step == 0}
    assert not torch.equal(first[0, 0], first[0, 1])


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
def test_layers_that_the_native_library_routes_have_nothing_to_keep(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime
) -> None:
    """One layer with reuse, the others without: by the library's own routing step and by torch, to the same tokens."""
    plain = make_policy("des-vote", {"budget": 6})
    layers = [plain] * config.num_moe_layers
    layers[-1] = make_policy("des-vote", {"budget": 6, "reuse": 3, "voters": "masked"})
    model, answers = make_model(config), []
    for backend in ("cpu", "torch"):
        chosen = replace(runtime(), policy=Layerwise(layers=tuple(layers)), backend=backend_named(backend))
        answers.append([row.token_ids for row in generate(model, chosen, OPTIONS, PROMPTS).rows])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("policy", ["des-vote:budget=8,reuse=3", "coverage:budget=8,reuse=2,voters=masked"])
@pytest.mark.parametrize("layout", ["config", "full_config"])
def test_a_batch_is_its_rows_alone(
    request: pytest.FixtureRequest, make_model: MakeModel, runtime: MakeRuntime, policy: str, layout: str
) -> None:
    """Rows of different lengths that finish at different times, with and without others beside them."""
    model = make_model(request.getfixturevalue(layout))
    options = replace(OPTIONS, stop_at_eos=True)
    together = generate(model, runtime(policy), options, PROMPTS)
    again = generate(model, runtime(policy), options, PROMPTS)
    alone = [generate(model, runtime(policy), options, [prompt]).rows[0] for prompt in PROMPTS]
    assert [row.token_ids for row in together.rows] == [row.token_ids for row in alone]
    assert together.cost == again.cost


def test_one_step_is_no_reuse(config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime, seen: Seen) -> None:
    model = make_model(config)
    once = generate(model, runtime("des-vote:budget=8,reuse=1"), OPTIONS, PROMPTS)
    assert all(inputs.previous is None for _, _, inputs, _ in seen)
    assert once.cost == generate(model, runtime("des-vote:budget=8"), OPTIONS, PROMPTS).cost


def test_streams_do_not_share_what_they_keep(config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime) -> None:
    """Two streams of one decoder, taken in turns, give what each gives alone."""
    decoder = BlockDecoder(make_model(config), runtime("des-vote:budget=8,reuse=4"), OPTIONS)
    expected = [generate(decoder.model, decoder.runtime, OPTIONS, [prompt]).rows[0].token_ids for prompt in PROMPTS[:2]]
    streams = [decoder.blocks([prompt]) for prompt in PROMPTS[:2]]
    answers: list[list[int]] = [[], []]
    for _ in range(4):
        for stream, answer in zip(streams, answers, strict=True):
            answer.extend(token for block in [next(stream, None)] if block for token in block.token_ids)
    assert [tuple(answer) for answer in answers] == expected
