"""Which of the proposed tokens are written in a step. Pure functions of R rows by L positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertshare.routing.ranking import top_k_ids


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
    """Masked positions to fill: those with confidence strictly above `threshold`, or the `least[r]` most
    confident ones where fewer pass (exactly those where there is no threshold); ties go to the lower
    position.

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
    """Rows whose answer surely ends in this block: an end-of-text token is decided and so is all before it:
    bool [R].

    eos_RL: where the tokens are end-of-text ids; those in the prompt or behind the answer do not count.
    """
    undecided_before_RL = masked_RL.cumsum(dim=1) > 0
    return (eos_RL & answer_RL & ~undecided_before_RL).any(dim=1)


def _ranks(confidence_RL: Tensor) -> Tensor:
    order_RL = top_k_ids(confidence_RL, confidence_RL.shape[1])
    place_RL = torch.arange(order_RL.shape[1], device=order_RL.device).expand_as(order_RL)
    return torch.empty_like(order_RL).scatter_(1, order_RL, place_RL)
