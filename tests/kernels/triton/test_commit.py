"""The commit rule in Triton against decoding's functions, on random blocks with ties."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from expertshare.decoding.commit_rules import holds_eos, tokens_to_edit, tokens_to_write
from expertshare.errors import ConfigError
from expertshare.kernels.triton.commit import FLAGS, commit_triton

EOS = [1, 2]


@dataclass
class Blocks:
    """A canvas with one block per row, and what was proposed for it."""

    canvas: tuple[Tensor, Tensor, Tensor, Tensor]
    control_R4: Tensor
    thresholds_R2: Tensor
    edited_R1: Tensor
    best_RL: Tensor
    sure_RL: Tensor

    def window(self, of: Tensor) -> Tensor:
        index_RL = self.control_R4[:, :1] + torch.arange(self.best_RL.shape[1], device=of.device)
        return of.gather(1, index_RL)


def random_blocks(seed: int, num_rows: int, length: int, device: torch.device) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    capacity = 3 * length + 5

    def whole(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    frozen_RC = whole(4, num_rows, capacity) == 0
    masked_RC = ~frozen_RC & (whole(2, num_rows, capacity) == 0)
    edited_R1 = whole(2, num_rows, 1) == 0
    inf = torch.tensor(float("inf"))
    thresholds = torch.stack(
        (torch.where(whole(3, num_rows) == 0, inf, 0.5), torch.where(edited_R1[:, 0], 0.4, inf)), dim=1
    )
    control = torch.stack(
        (whole(2 * length, num_rows), 1 + whole(length, num_rows), (whole(5, num_rows) > 0).long(), whole(9, num_rows)),
        dim=1,
    )
    canvas = (whole(6, num_rows, capacity), masked_RC, frozen_RC, whole(4, num_rows, capacity) > 0)
    sure = whole(8, num_rows, length).float() / 8  # many ties
    parts = (control, thresholds, edited_R1, whole(6, num_rows, length), sure)
    return Blocks(tuple(part.to(device) for part in canvas), *(part.to(device) for part in parts))  # type: ignore[arg-type]


def expected(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and masks of the canvas, and the report, by decoding's functions."""
    tokens_RC, masked_RC, frozen_RC, answer_RC = blocks.canvas
    on_R1 = blocks.control_R4[:, 2:3] > 0
    tokens, masked = blocks.window(tokens_RC), blocks.window(masked_RC) & on_R1
    is_open = ~blocks.window(frozen_RC) & on_R1
    wanted = torch.where(blocks.edited_R1, is_open, masked)
    finite = (blocks.sure_RL.isfinite() | ~wanted).all(dim=1)
    confidence = blocks.sure_RL.masked_fill(~wanted, float("-inf"))
    write = torch.zeros_like(masked)
    if finite.all():
        commit, edit = torch.split(blocks.thresholds_R2, 1, dim=1)
        write = tokens_to_write(confidence, masked, blocks.control_R4[:, 1:2], commit)
        write |= tokens_to_edit(confidence, blocks.best_RL, tokens, is_open & ~masked, edit)
    tokens, masked = torch.where(write, blocks.best_RL, tokens), masked & ~write
    eos = holds_eos(torch.isin(tokens, torch.tensor(EOS, device=tokens.device)), masked, blocks.window(answer_RC))
    flags = torch.stack((finite, masked.any(dim=1), write.any(dim=1), eos), dim=1)
    index_RL = blocks.control_R4[:, :1] + torch.arange(tokens.shape[1], device=tokens.device)
    on_canvas = torch.where(on_R1, masked, blocks.window(masked_RC))
    return (
        tokens_RC.scatter(1, index_RL, tokens),
        masked_RC.scatter(1, index_RL, on_canvas),
        torch.cat((flags.long(), tokens), dim=1),
    )


def check(blocks: Blocks) -> None:
    tokens, masked, right_report = expected(blocks)
    frozen, answer = (part.clone() for part in blocks.canvas[2:])
    num_rows, length = blocks.best_RL.shape
    device = tokens.device
    report = torch.full((num_rows, FLAGS + length), -7, device=device)
    commit_triton(
        blocks.canvas,
        blocks.control_R4,
        blocks.thresholds_R2,
        blocks.edited_R1,
        (blocks.best_RL, blocks.sure_RL),
        torch.tensor(EOS, device=device),
        report,
    )
    for found, right in zip(blocks.canvas, (tokens, masked, frozen, answer), strict=True):
        assert torch.equal(found, right)
    assert torch.equal(report, right_report)


@pytest.mark.parametrize("shape", [(1, 4), (2, 8), (3, 5), (5, 32), (2, 33)])
def test_equals_the_rules_of_decoding(shape: tuple[int, int], device: torch.device) -> None:
    for seed in range(8):
        check(random_blocks(seed, *shape, device))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_and_asked_for_stops_all_rows(value: float, device: torch.device) -> None:
    told = set()
    for seed in range(6):
        blocks = random_blocks(seed, 3, 8, device)
        blocks.sure_RL[1, 3] = value
        told.add(bool(expected(blocks)[2][1, 0]))
        check(blocks)
    assert told == {True, False}  # where nobody asked it does not matter


def test_views_are_refused(device: torch.device) -> None:
    blocks = random_blocks(0, 2, 4, device)
    blocks.control_R4 = blocks.control_R4.T.contiguous().T
    with pytest.raises(ConfigError, match="contiguous"):
        check(blocks)
