"""The commit rule against examples worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.decoding.commit_rules import Proposals, StepState, holds_eos, schedule, tokens_to_edit, tokens_to_write
from expertshare.decoding.row import Row
from expertshare.models.runtime import Runtime
from expertshare.models.transformer import MoETransformer


def bits(text: str) -> Tensor:
    """One row of booleans from ones and zeros."""
    return torch.tensor([[character == "1" for character in text]])


@pytest.mark.parametrize(
    ("length", "steps", "expected"),
    [
        (8, 8, (1,) * 8),
        (8, 4, (2, 2, 2, 2)),
        (8, 3, (3, 3, 2)),
        (32, 5, (7, 7, 6, 6, 6)),
        (4, 1, (4,)),
        (2, 3, (1, 1, 1)),
    ],
)
def test_schedule_spreads_the_block(length: int, steps: int, expected: tuple[int, ...]) -> None:
    """base + (i < rem), and at least one token per step."""
    assert schedule(length, steps) == expected


@pytest.mark.parametrize(
    ("confidence", "masked", "least", "threshold", "expected"),
    [
        ([0.97, 0.96, 0.5, 0.4], "1111", 1, 0.95, "1100"),  # all that pass, though the share is one
        ([0.97, 0.96, 0.5, 0.4], "1111", 3, 0.95, "1110"),  # two pass, three are due: the three best
        ([0.2, 0.3, 0.1, 0.3], "1111", 1, 0.95, "0100"),  # none passes: the best, the lower of two equals
        ([0.95, 0.2, 0.2, 0.2], "1111", 1, 0.25, "1000"),
        ([0.5, 0.75, 0.25, 0.5], "1111", 1, 0.5, "0100"),  # equal to the threshold does not pass
        ([0.5, 0.5, 0.5, 0.5], "1111", 2, 0.5, "1100"),
        ([0.99, 0.99, 0.3, 0.2], "0011", 1, 0.95, "0010"),  # what is decided cannot be written again
        ([0.99, 0.1, 0.99, 0.2], "0101", 4, 0.95, "0101"),  # fewer masks than due: all of them
        ([0.9, 0.8, 0.7, 0.99], "1111", 2, None, "1001"),  # fixed schedule: exactly two, however sure
        ([0.99, 0.99, 0.99, 0.99], "1111", 1, None, "1000"),
        ([0.0, 0.0, 0.0, 0.0], "0110", 1, 0.0, "0100"),  # probability 0 still leaves one per step
        ([0.1, 0.1, 0.1, 0.1], "0000", 1, 0.95, "0000"),
    ],
)
def test_tokens_to_write(
    confidence: list[float], masked: str, least: int, threshold: float | None, expected: str
) -> None:
    """Strictly above the threshold, else the most confident masked ones."""
    written = tokens_to_write(torch.tensor([confidence]), bits(masked), [least], threshold)
    assert torch.equal(written, bits(expected))


def test_rows_do_not_influence_each_other() -> None:
    """Each row has its own share and its own fallback."""
    confidence = torch.tensor([[0.99, 0.2, 0.1], [0.3, 0.2, 0.1]])
    written = tokens_to_write(confidence, torch.ones(2, 3, dtype=torch.bool), [1, 2], 0.9)
    assert written.tolist() == [[True, False, False], [True, True, False]]


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 12),
    st.one_of(st.none(), st.sampled_from([0.0, 0.5, 0.75])),
)
def test_every_step_makes_progress(cells: list[tuple[float, bool]], least: int, threshold: float | None) -> None:
    """Inside the masks, at least min(least, masks), and never a less confident token before a more confident
    one."""
    confidence = torch.tensor([[value for value, _ in cells]])
    masked = torch.tensor([[value for _, value in cells]])
    written = tokens_to_write(confidence, masked, [least], threshold)
    assert not (written & ~masked).any()
    assert written.sum() >= min(least, int(masked.sum()))
    left = masked & ~written
    if written.any() and left.any():
        assert confidence[written].min() >= confidence[left].max()


def test_edits_replace_only_decided_tokens_with_other_tokens() -> None:
    """Columns: edited; same token; not sure enough; equal to the threshold; not editable."""
    edits = tokens_to_edit(
        confidence_RL=torch.tensor([[0.9, 0.9, 0.3, 0.5, 0.9]]),
        proposed_RL=torch.tensor([[1, 2, 3, 4, 5]]),
        tokens_RL=torch.tensor([[9, 2, 9, 9, 9]]),
        editable_RL=bits("11110"),
        editing_threshold=0.5,
    )
    assert torch.equal(edits, bits("10000"))


def test_full_editing_takes_any_other_token() -> None:
    """Threshold 0.0 is full editing, not off."""
    edits = tokens_to_edit(
        torch.tensor([[0.01, 0.01]]), torch.tensor([[1, 2]]), torch.tensor([[5, 2]]), bits("11"), 0.0
    )
    assert torch.equal(edits, bits("10"))


@pytest.mark.parametrize(
    ("eos", "masked", "answer", "expected"),
    [
        ("0010", "0000", "1111", True),
        ("0010", "0001", "1111", True),  # masks behind it do not matter
        ("0010", "0100", "1111", False),  # a mask before it does
        ("1000", "0000", "0111", False),  # in the prompt
        ("1010", "0000", "0111", True),
        ("0001", "0000", "1110", False),  # behind the answer
        ("0101", "0010", "1111", True),  # the first one counts
        ("0000", "0000", "1111", False),
    ],
)
def test_holds_eos(eos: str, masked: str, answer: str, expected: bool) -> None:
    """An answer ends at an end-of-text token with nothing undecided before it."""
    assert holds_eos(bits(eos), bits(masked), bits(answer)).tolist() == [expected]


@dataclass(frozen=True)
class LeftToRight:
    """A rule that is none of ours: one token a step, the first that is undecided."""

    edits = False

    def least_tokens(self, row: Row) -> int:
        return 1

    def choose(self, proposals: Proposals, rows: Sequence[Row]) -> Tensor:
        return proposals.masked_RL & (proposals.masked_RL.cumsum(dim=1) == 1)

    def is_decided(self, row: Row, state: StepState) -> bool:
        return not state.has_masks


def test_a_rule_of_ones_own_beside_another(
    config: ModelConfig, make_model: Callable[..., MoETransformer], runtime: Callable[..., Runtime]
) -> None:
    """Rows ask their own rules: one decodes left to right, the other is as it is alone."""
    model, options = make_model(replace(config, eos_ids=())), DecodingOptions(gen_length=16, threshold=0.3)
    decoder = BlockDecoder(model, runtime(), options)
    alone = list(decoder.blocks([[5, 6, 7]]))
    stream = decoder.blocks([[3, 4], [5, 6, 7]])
    first = stream.rows[0]
    first.rule = LeftToRight()
    while first.block == 0:
        before = first.masked_C[:8].clone()
        stream.advance()
        stream._ready.clear()
        changed = (before & ~first.masked_C[:8]).nonzero().flatten().tolist()
        assert changed == [int(before.nonzero()[0])]
    again = decoder.blocks([[3, 4], [5, 6, 7]])
    again.rows[0].rule = LeftToRight()
    blocks = list(again)
    assert [(block.token_ids, block.steps) for block in blocks if block.row == 1] == [
        (block.token_ids, block.steps) for block in alone
    ]
    assert [block.steps for block in blocks if block.row == 0] == [6, 8, 8]
