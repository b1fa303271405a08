"""Stopping, editing and commit rules, end to end, with a model that predicts what each test scripts.

Block 8; a prompt of three tokens leaves positions 3..7 of the first block to decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from expertshare.config import ModelConfig
from expertshare.decoding import DecodingOptions, Generation, generate
from expertshare.errors import NumericsError
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer

MASK, EOS = 63, 62
PROMPT = [1, 2, 3]
Scripted = Callable[[Callable[[int, int], dict[int, float]]], Any]
MakeRuntime = Callable[..., Runtime]


def run(model: Any, runtime: MakeRuntime, prompt: list[int] | None = None, **options: Any) -> Generation:
    """Decode one prompt."""
    settings = DecodingOptions(**{"gen_length": 5, **options})
    return generate(model, runtime(), settings, [prompt or PROMPT])


def test_eos_in_the_prompt_is_text(scripted: Scripted, runtime: MakeRuntime) -> None:
    """Also where it lies in the block being decoded."""
    result = run(scripted(lambda _position, _forward: {7: 0.99}), runtime, [1, EOS, 3])
    assert result.rows[0].token_ids == (7,) * 5
    assert result.rows[0].finish_reason == "length"


def test_eos_stops_inside_a_step(scripted: Scripted, runtime: MakeRuntime) -> None:
    """Positions 6 and 7 are still masked; no further step, no commit forward, the EOS itself is cut off."""
    script = {3: {7: 0.99}, 4: {8: 0.99}, 5: {EOS: 0.99}, 6: {9: 0.5}, 7: {9: 0.5}}
    model = scripted(lambda position, _forward: script[position])
    row = run(model, runtime, gen_length=30).rows[0]
    assert (row.token_ids, row.finish_reason, row.steps, row.forwards) == ((7, 8), "eos", 1, 1)


def test_eos_waits_for_the_masks_before_it(scripted: Scripted, runtime: MakeRuntime) -> None:
    """Position 4 is written a step later than the EOS behind it."""
    script = {3: {7: 0.99}, 4: {8: 0.5}, 5: {EOS: 0.99}, 6: {9: 0.3}, 7: {9: 0.3}}
    row = run(scripted(lambda position, _forward: script[position]), runtime, gen_length=30).rows[0]
    assert (row.token_ids, row.finish_reason, row.steps) == ((7, 8), "eos", 2)


def test_eos_at_the_end_of_a_block(scripted: Scripted, runtime: MakeRuntime) -> None:
    """The last token written in a block is its EOS: no next block."""
    model = scripted(lambda position, _forward: {EOS: 0.4} if position == 7 else {7: 0.99})
    row = run(model, runtime, gen_length=30).rows[0]
    assert (row.token_ids, row.finish_reason, row.steps, row.blocks) == ((7,) * 4, "eos", 2, 1)


def test_eos_behind_the_answer_does_not_count(scripted: Scripted, runtime: MakeRuntime) -> None:
    """The canvas is whole blocks; the answer is not. The block is decoded to its end, then trimmed."""
    script = {3: {7: 0.99}, 4: {8: 0.99}, 5: {EOS: 0.99}, 6: {9: 0.5}, 7: {9: 0.5}}
    row = run(scripted(lambda position, _forward: script[position]), runtime, gen_length=2).rows[0]
    assert (row.token_ids, row.finish_reason, row.steps) == ((7, 8), "length", 2)


def test_without_stopping_the_answer_is_still_cut(scripted: Scripted, runtime: MakeRuntime) -> None:
    """stop_at_eos=False does all the work and returns the same answer."""
    model = scripted(lambda position, _forward: {EOS: 0.99} if position == 5 else {7: 0.99})
    row = run(model, runtime, gen_length=20, stop_at_eos=False).rows[0]
    assert (row.token_ids, row.finish_reason, row.blocks) == ((7, 7), "eos", 3)
    assert run(model, runtime, gen_length=20).rows[0].blocks == 1


@pytest.mark.parametrize(("threshold", "steps"), [(0.5, 13), (0.49, 2)])
def test_threshold_is_strict(scripted: Scripted, runtime: MakeRuntime, threshold: float, steps: int) -> None:
    """Two tokens with probability one half each, exactly: 0.5 does not pass 0.5, and one is written per step.

    The lower id is chosen.
    """
    model = scripted(lambda _position, _forward: {8: 0.5, 7: 0.5})
    row = run(model, runtime, gen_length=13, threshold=threshold).rows[0]
    assert (row.token_ids, row.steps) == ((7,) * 13, steps)


def test_fallback_takes_the_most_confident_mask(scripted: Scripted, runtime: MakeRuntime) -> None:
    """Nothing passes: one per step, best first, and only masked positions are asked for."""
    sure = {3: 0.2, 4: 0.5, 5: 0.3, 6: 0.6, 7: 0.2}
    model = scripted(lambda position, _forward: {7: sure.get(position, 0.99)})
    assert run(model, runtime, gen_length=13).rows[0].steps == 6
    assert model.asked[:5] == [[3, 4, 5, 6, 7], [3, 4, 5, 7], [3, 5, 7], [3, 7], [7]]


@pytest.mark.parametrize(
    ("options", "masks"),
    [
        ({"steps_per_block": 3}, [8, 5, 2]),
        ({"steps_per_block": 8}, [8, 7, 6, 5, 4, 3, 2, 1]),
        ({"minimal_top_k": 4}, [8, 6, 4, 2]),  # steps = min(8, 16 // 4)
        ({"steps_per_block": 2, "minimal_top_k": 4}, [8, 4]),
    ],
)
def test_schedule_without_a_threshold(
    scripted: Scripted, runtime: MakeRuntime, options: dict[str, int], masks: list[int]
) -> None:
    """Exactly the step's share, however sure the model is. The first forward is the prompt's prefill."""
    model = scripted(lambda _position, _forward: {7: 0.99})
    run(model, runtime, [1] * 8, gen_length=16, threshold=None, **options)
    assert [tokens.count(MASK) for tokens in model.seen[1 : 1 + len(masks)]] == masks
    assert model.seen[1 + len(masks)] == [7] * 8  # the commit forward


def test_threshold_may_exceed_the_share(scripted: Scripted, runtime: MakeRuntime) -> None:
    """With a threshold the share is a minimum: three pass though two are due, then two though none does."""
    sure = {0: 0.99, 1: 0.99, 2: 0.99, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.8, 7: 0.4}
    model = scripted(lambda position, _forward: {7: sure[position % 8]})
    run(model, runtime, [1] * 8, gen_length=8, steps_per_block=4)
    assert [len(asked) for asked in model.asked] == [8, 5, 3, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_mask_id_is_never_emitted(scripted: Scripted, runtime: MakeRuntime, temperature: float) -> None:
    """It is the model's favourite everywhere; the next best token is written."""
    model = scripted(lambda _position, _forward: {MASK: 0.9, 7: 0.09})
    row = run(model, runtime, gen_length=13, temperature=temperature).rows[0]
    assert MASK not in row.token_ids
    assert row.finish_reason == "length"
    if temperature == 0.0:
        assert row.token_ids == (7,) * 13


def test_a_mask_id_in_the_prompt_is_text(scripted: Scripted, runtime: MakeRuntime) -> None:
    """It is neither decoded nor edited."""
    model = scripted(lambda _position, _forward: {7: 0.99})
    result = run(model, runtime, [1, MASK, 3], editing_threshold=0.0)
    assert result.rows[0].token_ids == (7,) * 5
    assert all(tokens[:3] == [1, MASK, 3] for tokens in model.seen)


@pytest.mark.parametrize(
    ("editing", "answer", "steps"),
    [
        (None, (7, 7, 7, 7, 7), 1),  # off: done when the last mask is gone
        (0.5, (7, 7, 7, 7, 7), 2),  # nothing is sure enough: one look, no change
        (0.0, (7, 9, 7, 7, 7), 3),  # full editing: one edit, one look
    ],
)
def test_editing_off_and_full_are_different(
    scripted: Scripted, runtime: MakeRuntime, editing: float | None, answer: tuple[int, ...], steps: int
) -> None:
    """After the first step the model leans to 9 at position 4, and strongly so at the prompt, which is
    frozen."""

    def script(position: int, forward: int) -> dict[int, float]:
        if position < 3:
            return {9: 0.99}
        return {9: 0.3} if position == 4 and forward > 0 else {7: 0.99}

    model = scripted(script)
    row = run(model, runtime, editing_threshold=editing).rows[0]
    assert (row.token_ids, row.steps) == (answer, steps)
    assert all(tokens[:3] == PROMPT for tokens in model.seen)
    assert all(min(asked) >= 3 for asked in model.asked)


@pytest.mark.parametrize(("max_post_steps", "steps"), [(0, 1), (1, 2), (3, 4), (16, 17)])
def test_editing_stops_on_its_budget(scripted: Scripted, runtime: MakeRuntime, max_post_steps: int, steps: int) -> None:
    """The model changes its mind at every forward: only the budget of post steps ends the block."""
    model = scripted(lambda _position, forward: {7 + forward % 2: 0.99})
    row = run(model, runtime, editing_threshold=0.5, max_post_steps=max_post_steps).rows[0]
    assert row.steps == steps
    assert row.token_ids == (7 + (steps - 1) % 2,) * 5


def test_commit_forward_sees_the_last_edit(scripted: Scripted, runtime: MakeRuntime) -> None:
    """After a budget stop the cache is made from the edited tokens: the third forward is the commit."""
    model = scripted(lambda _position, forward: {7 + forward % 2: 0.99})
    run(model, runtime, gen_length=6, editing_threshold=0.5, max_post_steps=1)
    assert model.seen[:3] == [PROMPT + [MASK] * 5, PROMPT + [7] * 5, PROMPT + [8] * 5]


def test_writing_and_editing_share_a_step(scripted: Scripted, runtime: MakeRuntime) -> None:
    """The second step fills position 4 and edits 3; a token is not edited in the step that writes it.

    The fallback is one token although the schedule says four.
    """

    def script(position: int, forward: int) -> dict[int, float]:
        if position == 3:
            return {7: 0.6} if forward == 0 else {9: 0.8}
        return {8: 0.5 - position / 100}

    model = scripted(script)
    run(model, runtime, editing_threshold=0.7, steps_per_block=2)
    assert model.seen[1] == [*PROMPT, 7, MASK, MASK, MASK, MASK]
    assert model.seen[2] == [*PROMPT, 9, 8, MASK, MASK, MASK]


def test_edited_away_eos_does_not_stop(scripted: Scripted, runtime: MakeRuntime) -> None:
    """With editing, only the end of a block looks for EOS, because until then it may change."""
    model = scripted(lambda position, forward: {EOS: 0.99} if position == 4 and forward == 0 else {7: 0.99})
    row = run(model, runtime, editing_threshold=0.5).rows[0]
    assert (row.token_ids, row.finish_reason) == ((7,) * 5, "length")
    model = scripted(lambda position, forward: {EOS: 0.99} if position == 4 and forward == 0 else {7: 0.99})
    row = run(model, runtime).rows[0]
    assert (row.token_ids, row.finish_reason) == ((7,), "eos")


def test_earlier_blocks_are_frozen_under_editing(scripted: Scripted, runtime: MakeRuntime) -> None:
    """Only the current block's answer positions are ever asked for."""
    model = scripted(lambda _position, _forward: {7: 0.99})
    run(model, runtime, gen_length=13, editing_threshold=0.0)
    assert model.asked == [[3, 4, 5, 6, 7]] * 2 + [list(range(8, 16))] * 2


@pytest.mark.filterwarnings("error")
def test_non_finite_logits_name_row_block_and_step(
    config: ModelConfig, make_model: Callable[..., MoETransformer], runtime: MakeRuntime
) -> None:
    """Token 50 is poisoned; only the second prompt holds it."""
    model = make_model(replace(config, eos_ids=()))
    with torch.no_grad():
        model.embed.weight[50] = float("nan")
    with pytest.raises(NumericsError, match="row 1, block 0, step 0"):
        generate(model, runtime(), DecodingOptions(gen_length=5), [[1, 2], [3, 50]])
