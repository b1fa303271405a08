"""Commit rules: which of the proposed tokens are written in a step, and when a block is decided.

A rule is a frozen dataclass; `rule_of` chooses one by the options. To add one, write a class with the members of
CommitRule and name it in `rule_of`. R rows, L positions of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from expertshare.decoding.options import DecodingOptions
from expertshare.routing.ranking import top_k_ids

if TYPE_CHECKING:
    from expertshare.decoding.row import Row


@dataclass(frozen=True, slots=True)
class Proposals:
    """What a rule chooses from. tokens_RL, confidence_RL: for every position that may change a token and its
    probability (float32, or noise where options ask for random remasking); elsewhere the old token and -inf.

    old_RL: the tokens before this step; masked_RL: undecided then; frozen_RL: prompt. A rule that wants more of the
    distribution than its best token adds a field here, which `sampling.propose_blocks` fills.
    """

    tokens_RL: Tensor
    confidence_RL: Tensor
    old_RL: Tensor
    masked_RL: Tensor
    frozen_RL: Tensor


@dataclass(frozen=True, slots=True)
class StepState:
    """What a step came to in a row's block. finite: all that was proposed; has_masks: some of it is still undecided;
    changed: some of it was written; eos: the answer surely ends in it; token_ids: the block's, after the step."""

    finite: bool
    has_masks: bool
    changed: bool
    eos: bool
    token_ids: list[int]

    @classmethod
    def read(cls, report: list[int]) -> StepState:
        """From the four flags as 0 or 1, then the tokens."""
        finite, has_masks, changed, eos, *token_ids = report
        return cls(bool(finite), bool(has_masks), bool(changed), bool(eos), token_ids)


class CommitRule(Protocol):
    """What is written in a step. Equal rules are asked once for all their rows, which do not depend on each other."""

    @property
    def edits(self) -> bool:
        """Whether decided positions get proposals too, all but the prompt's."""
        ...

    def least_tokens(self, row: Row) -> int:
        """Fewest masked positions that the row's next step writes."""
        ...

    def choose(self, proposals: Proposals, rows: Sequence[Row]) -> Tensor:
        """The positions that take their proposed token: bool [R, L], at least one where a row has a mask."""
        ...

    def is_decided(self, row: Row, state: StepState) -> bool:
        """Whether the row's block is finished by the step that `state` tells of, which the row's counts include."""
        ...


@dataclass(frozen=True, slots=True)
class FixedSchedule:
    """Each step writes its share of the block, the most confident tokens (LLaDA). shares: by step."""

    shares: tuple[int, ...]
    edits = False

    def least_tokens(self, row: Row) -> int:
        """The step's share; the last one's behind the schedule."""
        return self.shares[min(row.steps, len(self.shares) - 1)]

    def choose(self, proposals: Proposals, rows: Sequence[Row]) -> Tensor:
        """Exactly the share, where there are as many masks."""
        return tokens_to_write(proposals.confidence_RL, proposals.masked_RL, [self.least_tokens(r) for r in rows], None)

    def is_decided(self, row: Row, state: StepState) -> bool:
        """Without a mask, or where the answer surely ends."""
        return not state.has_masks or (state.eos and row.options.stop_at_eos)


@dataclass(frozen=True, slots=True)
class Threshold(FixedSchedule):
    """Each step writes every token that is surer than `threshold`, and its share where fewer are (Fast-dLLM)."""

    threshold: float

    def choose(self, proposals: Proposals, rows: Sequence[Row]) -> Tensor:
        """The sure ones, or the share."""
        least = [self.least_tokens(row) for row in rows]
        return tokens_to_write(proposals.confidence_RL, proposals.masked_RL, least, self.threshold)


@dataclass(frozen=True, slots=True)
class Editing:
    """`masks` fills masks; decided tokens are replaced by others that are surer than `threshold` (LLaDA2.1).

    A block is decided when a step that began without masks changed nothing, or after `max_post_steps` such steps: an
    end-of-text token can still be edited away, so the whole block settles first.
    """

    masks: FixedSchedule
    threshold: float
    max_post_steps: int
    edits = True

    def least_tokens(self, row: Row) -> int:
        """That of the rule that fills masks."""
        return self.masks.least_tokens(row)

    def choose(self, proposals: Proposals, rows: Sequence[Row]) -> Tensor:
        """Masks to fill and tokens to replace."""
        editable_RL = ~proposals.masked_RL & ~proposals.frozen_RL
        return self.masks.choose(proposals, rows) | tokens_to_edit(
            proposals.confidence_RL, proposals.tokens_RL, proposals.old_RL, editable_RL, self.threshold
        )

    def is_decided(self, row: Row, state: StepState) -> bool:
        """Without a mask, and settled."""
        settled = row.post_steps >= self.max_post_steps or (row.post_steps > 0 and not state.changed)
        return not state.has_masks and settled


def rule_of(options: DecodingOptions) -> CommitRule:
    """The commit rule that resolved options ask for."""
    assert options.block_length is not None
    assert options.steps_per_block is not None
    shares = schedule(options.block_length, options.steps_per_block)
    if options.threshold is None:
        rule = FixedSchedule(shares)
    else:
        rule = Threshold(shares if options.editing_threshold is None else (1,), options.threshold)
    if options.editing_threshold is None:
        return rule
    return Editing(rule, options.editing_threshold, options.max_post_steps)


def choose(proposals: Proposals, rows: Sequence[Row]) -> Tensor:
    """Ask each row's rule: bool [R, L]."""
    rules = list(dict.fromkeys(row.rule for row in rows))
    if len(rules) == 1:
        return rules[0].choose(proposals, rows)
    write_RL = torch.zeros_like(proposals.masked_RL)
    for rule in rules:
        at = [place for place, row in enumerate(rows) if row.rule == rule]
        its_own = Proposals(*(getattr(proposals, field.name)[at] for field in fields(proposals)))
        write_RL[at] = rule.choose(its_own, [rows[place] for place in at])
    return write_RL


def schedule(block_length: int, steps: int) -> tuple[int, ...]:
    """Least number of tokens to write at each step: the block spread evenly, remainder first, at least one.

    >>> schedule(8, 3)
    (3, 3, 2)
    """
    base, remainder = divmod(block_length, steps)
    return tuple(max(1, base + (step < remainder)) for step in range(steps))


def tokens_to_write(
    confidence_RL: Tensor, masked_RL: Tensor, least: Sequence[int] | Tensor, threshold: float | Tensor | None
) -> Tensor:
    """Masked positions to fill: those with confidence strictly above `threshold`, or the `least[r]` most confident ones
    where fewer pass (exactly those where there is no threshold); ties go to the lower position.

    confidence_RL: float32, any value where not masked. least: one number for each row, or a tensor [R, 1]. threshold:
    one for all rows or a tensor [R, 1], infinity for a row without one. Returns bool [R, L], inside masked_RL; at least
    one per row that has a mask.
    """
    confidence_RL = confidence_RL.masked_fill(~masked_RL, float("-inf"))
    least_R1 = least if isinstance(least, Tensor) else torch.tensor(least, device=masked_RL.device).unsqueeze(1)
    best_RL = masked_RL & (_ranks(confidence_RL) < least_R1)
    if threshold is None:
        return best_RL
    sure_RL = confidence_RL > threshold
    return torch.where(sure_RL.sum(dim=1, keepdim=True) >= least_R1, sure_RL, best_RL)


def tokens_to_edit(
    confidence_RL: Tensor,
    proposed_RL: Tensor,
    tokens_RL: Tensor,
    editable_RL: Tensor,
    editing_threshold: float | Tensor,
) -> Tensor:
    """Decided positions to overwrite: another token, with confidence strictly above the threshold (LLaDA2.1).

    editable_RL: bool, neither masked when the step began nor prompt. editing_threshold: one for all rows or a tensor
    [R, 1], infinity for a row that is not edited. Returns bool [R, L].
    """
    return editable_RL & (proposed_RL != tokens_RL) & (confidence_RL > editing_threshold)


def holds_eos(eos_RL: Tensor, masked_RL: Tensor, answer_RL: Tensor) -> Tensor:
    """Rows whose answer surely ends in this block: an end-of-text token is decided and so is all before it: bool [R].

    eos_RL: where the tokens are end-of-text ids; those in the prompt or behind the answer do not count.
    """
    undecided_before_RL = masked_RL.cumsum(dim=1) > 0
    return (eos_RL & answer_RL & ~undecided_before_RL).any(dim=1)


def _ranks(confidence_RL: Tensor) -> Tensor:
    order_RL = top_k_ids(confidence_RL, confidence_RL.shape[1])
    place_RL = torch.arange(order_RL.shape[1], device=order_RL.device).expand_as(order_RL)
    return torch.empty_like(order_RL).scatter_(1, order_RL, place_RL)
