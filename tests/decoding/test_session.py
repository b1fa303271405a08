"""Rows that join and leave a running batch, against each prompt decoded alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from backends import backend_named
from expertshare import native
from expertshare.config import ModelConfig
from expertshare.decoding import BlockResult, BlockSession, DecodingOptions, Joining, generate
from expertshare.errors import NumericsError
from expertshare.measure.cost import CostLedger, ForwardKind, Turn
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer

MakeModel = Callable[..., MoETransformer]
MakeRuntime = Callable[..., Runtime]
BACKENDS = ["torch", *(["cpu"] if native.available() else [])]
OPTIONS = [
    DecodingOptions(gen_length=24, threshold=0.6),
    DecodingOptions(gen_length=8, threshold=0.3, temperature=0.9, seed=5),
    DecodingOptions(gen_length=16, threshold=None, steps_per_block=3),
    DecodingOptions(gen_length=32, temperature=0.7, top_k=9, top_p=0.8, seed=6, filtered_confidence=True),
    DecodingOptions(gen_length=16, threshold=0.5, editing_threshold=0.2, max_post_steps=3),
    DecodingOptions(gen_length=16, threshold=0.9, temperature=0.9, seed=5, stop_at_eos=False),
]


def prompts(count: int) -> list[list[int]]:
    """Ragged: 3, 8, 13, ... tokens."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 60, (3 + 5 * row,), generator=generator).tolist() for row in range(count)]


@dataclass
class Turns:
    """A ledger that keeps who took part in which forward."""

    seen: list[tuple[ForwardKind, list[int]]] = field(default_factory=list)

    def record(self, kind: ForwardKind, turns: Sequence[Turn], **_figures: Tensor) -> None:
        self.seen.append((kind, [turn.row for turn in turns]))


def bound(runtime: Runtime, model: MoETransformer) -> Runtime:
    return replace(runtime, policy=runtime.policy.bind(model.config.router))


def join_as_blocks_end(
    session: BlockSession, waiting: list[Joining], at_once: int
) -> tuple[dict[int, list[int]], dict[int, list[BlockResult]]]:
    """Admit two at first, and one more whenever some row's block is committed. Returns answers and blocks by row."""
    order, blocks = list(waiting), {}
    answers: dict[int, list[int]] = {}

    def admit(most: int) -> None:
        for number in session.join(order[:most]):
            answers[number], blocks[number] = [], []
        del order[:most]

    admit(2)
    while session.num_rows or order:
        for block in session.advance():
            answers[block.row].extend(block.token_ids)
            blocks[block.row].append(block)
            if order and session.num_rows < at_once:
                admit(1)
    return answers, blocks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", ["vanilla", "des-vote:budget=8", "des-vote:budget=8,voters=masked,reuse=3"])
def test_every_row_is_decoded_as_it_would_be_alone(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime, policy: str, backend: str
) -> None:
    model, run = make_model(config), replace(runtime(policy), backend=backend_named(backend))
    joining = [
        Joining(prompt=tuple(prompt), options=options.resolve(config))
        for prompt, options in zip(prompts(6), OPTIONS, strict=True)
    ]
    session = BlockSession(model, bound(run, model), CostLedger(config.num_moe_layers, 1))
    answers, blocks = join_as_blocks_end(session, joining, at_once=3)
    assert sorted(answers) == list(range(6))
    for number, entry in enumerate(joining):
        alone = generate(model, run, entry.options, [entry.prompt]).rows[0]
        assert answers[number] == list(alone.token_ids)
        assert blocks[number][-1].finish_reason == alone.finish_reason
        assert sum(block.steps for block in blocks[number]) == alone.steps
        assert sum(block.forwards for block in blocks[number]) == alone.forwards


@pytest.mark.parametrize("policy", ["des-vote:budget=8", "des-vote:budget=8,voters=masked,reuse=3"])
def test_full_attention_rows_too(
    full_config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime, policy: str
) -> None:
    """Kept coresets of short rows, too, when a longer row joins or leaves."""
    model, run = make_model(full_config), runtime(policy)
    options = [
        DecodingOptions(gen_length=16, threshold=0.6),
        DecodingOptions(gen_length=24, threshold=None, remasking="random", seed=3),
        DecodingOptions(gen_length=8, threshold=0.6, temperature=0.8, seed=4),
        DecodingOptions(gen_length=16, threshold=None, remasking="random", temperature=0.8, seed=5),
    ]
    joining = [
        Joining(prompt=tuple(prompt), options=one.resolve(full_config))
        for prompt, one in zip(prompts(4), options, strict=True)
    ]
    session = BlockSession(model, bound(run, model), CostLedger(full_config.num_moe_layers, 1))
    answers, _ = join_as_blocks_end(session, joining, at_once=3)
    for number, entry in enumerate(joining):
        assert answers[number] == list(generate(model, run, entry.options, [entry.prompt]).rows[0].token_ids)


def test_a_row_that_leaves_takes_no_part_any_more_and_changes_nobody(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime
) -> None:
    """In the middle of a block; its place is given to a new row, with a longer prompt."""
    model, run, ledger = make_model(replace(config, eos_ids=())), runtime(), Turns()
    options = DecodingOptions(gen_length=16).resolve(model.config)
    short, other, longer = prompts(6)[0], prompts(6)[2], prompts(6)[5]
    session = BlockSession(model, bound(run, model), ledger)
    first, second = session.join([Joining(prompt=tuple(p), options=options) for p in (short, other)])
    session.advance()
    session.leave(first)
    (third,) = session.join([Joining(prompt=tuple(longer), options=options)])
    seen_before = len(ledger.seen)
    answers: dict[int, list[int]] = {second: [], third: []}
    while session.num_rows:
        for block in session.advance():
            answers[block.row].extend(block.token_ids)
    assert (first, second, third) == (0, 1, 2)
    assert all(first not in rows for _, rows in ledger.seen[seen_before - 1 :])
    assert len(session.forwards.cache._held) <= 2  # type: ignore[attr-defined]
    for number, prompt in ((second, other), (third, longer)):
        assert answers[number] == list(generate(model, run, options, [prompt]).rows[0].token_ids)


def test_memory_grows_to_the_most_that_was_needed_at_once(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime
) -> None:
    model, run = make_model(replace(config, eos_ids=())), runtime()
    options = DecodingOptions(gen_length=8, threshold=0.0).resolve(model.config)
    session = BlockSession(model, bound(run, model), Turns())
    sizes = set()
    for turn in range(30):
        session.join([Joining(prompt=(turn + 1,) * (1 + turn % 20), options=options)] * 2)
        while session.num_rows:
            session.advance()
        if turn >= 20:
            memory = session.forwards.cache._memory_N2BHCD  # type: ignore[attr-defined]
            sizes.add(tuple(memory.shape))
    assert len(sizes) == 1


def test_a_row_that_is_not_finite_is_named_and_the_others_go_on(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime
) -> None:
    model, run = make_model(replace(config, eos_ids=())), runtime()
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    options = DecodingOptions(gen_length=8).resolve(model.config)
    session = BlockSession(model, bound(run, model), Turns())
    good, bad = session.join([Joining(prompt=prompt, options=options) for prompt in ((5, 6), (7, 8))])
    with pytest.raises(NumericsError) as caught:
        session.advance()
    assert caught.value.row == bad
    session.leave(bad)
    (after,) = session.join([Joining(prompt=(5, 6), options=options)])  # on the place of the one that was not finite
    answers: dict[int, list[int]] = {good: [], after: []}
    while session.num_rows:
        for block in session.advance():
            answers[block.row].extend(block.token_ids)
    alone = list(generate(model, run, options, [(5, 6)]).rows[0].token_ids)
    assert answers == {good: alone, after: alone}
