"""Many prompts in batches: the same answers, and costs that add up."""

from __future__ import annotations

import pytest

from expertshare.decoding import BlockResult, DecodingOptions
from expertshare.errors import InputError
from expertshare.evaluation.runner import PolicyRun, Setup, answer_prompts, encode_prompts
from expertshare.measure.cost import FORWARD_KINDS
from expertshare.models import LoadedModel
from expertshare.routing import parse_policy

PROMPTS = ["What is 7 plus 8?", "Hello", "Solve x + 5 = 12 and say what x is, please.", "A cow has 4 legs.", "é?"]
OPTIONS = DecodingOptions(gen_length=16)


def answered(loaded: LoadedModel, batch_size: int, policy: str = "des-vote:budget=8") -> PolicyRun:
    prompts = encode_prompts(loaded, PROMPTS, chat=False)
    return answer_prompts(loaded, prompts, parse_policy(policy), OPTIONS, setup=Setup(batch_size=batch_size))


def test_batches_do_not_change_answers_or_unique_experts(loaded: LoadedModel) -> None:
    single = answered(loaded, 1)
    for batch_size in (2, 5, 8):
        batched = answered(loaded, batch_size)
        assert [a.token_ids for a in batched.answers] == [a.token_ids for a in single.answers]
        assert batched.cost.unique_experts == pytest.approx(single.cost.unique_experts)
        assert batched.cost.pairs == single.cost.pairs
        assert batched.forwards < single.forwards


def test_joined_costs_are_sums_over_forwards(loaded: LoadedModel) -> None:
    cost = answered(loaded, 2).cost
    bytes_per_expert = 3 * 32 * 16 * 4
    for kind in FORWARD_KINDS:
        steps = [step for step in cost.steps if step.kind == kind]
        assert cost.forwards[kind] == len(steps) > 0
        assert cost.expert_bytes[kind] == sum(sum(s.active_experts) for s in steps) * bytes_per_expert
        assert cost.pairs[kind] == sum(sum(s.pairs) for s in steps)
        union = [experts for s in steps for experts in s.active_experts]
        assert cost.union_experts[kind] == pytest.approx(sum(union) / len(union))
        groups = sum(s.groups for s in steps)
        unique = [sum(s.unique_experts[n] * s.groups for s in steps) / groups for n in range(2)]
        assert cost.unique_experts_by_layer[kind] == pytest.approx(unique)
        assert cost.unique_experts[kind] == pytest.approx(sum(unique) / 2)
    assert {turn.row for step in cost.steps for turn in step.turns} == set(range(len(PROMPTS)))


def test_blocks_are_heard_with_the_number_of_their_prompt(loaded: LoadedModel) -> None:
    heard: list[BlockResult] = []
    prompts = encode_prompts(loaded, PROMPTS, chat=False)
    run = answer_prompts(
        loaded, prompts, parse_policy("vanilla"), OPTIONS, setup=Setup(batch_size=2), on_block=heard.append
    )
    for row, answer in enumerate(run.answers):
        blocks = [block for block in heard if block.row == row]
        assert [token for block in blocks for token in block.token_ids] == list(answer.token_ids)
        assert blocks[-1].finish_reason == answer.finish_reason
        assert sum(block.steps for block in blocks) == answer.steps


def test_a_late_prompt_that_is_too_long_is_refused_before_the_first_batch(loaded: LoadedModel) -> None:
    heard: list[BlockResult] = []
    prompts = encode_prompts(loaded, ["short", "long " * 200], chat=False)
    with pytest.raises(InputError, match="prompt 2 has"):
        answer_prompts(loaded, prompts, parse_policy("vanilla"), OPTIONS, setup=Setup(), on_block=heard.append)
    assert heard == []
