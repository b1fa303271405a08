"""Answers as training input: [noisy ; clean] under the block-diffusion mask, padded to one shape.

As in `training.objective`, noisy copies of blocks without answer tokens and the clean copy of a sample's last block
are left out: they change neither the loss nor, since a coreset is a block's own, the routing of any other block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.models.runtime import ForwardInput
from expertshare.training.distill.config import DistillConfig
from expertshare.training.objective import Sample, geometry


@dataclass(frozen=True, slots=True)
class DistillBatch:
    """Samples of one forward. targets_BS: int64, the clean token. weights_BS: float32, 0 where there is no loss.

    num_noisy: blocks in the noisy part of a row, the first of its positions.
    """

    inputs: ForwardInput
    targets_BS: Tensor
    weights_BS: Tensor
    num_noisy: int

    @property
    def live_noisy_BN(self) -> Tensor:
        """Which noisy blocks of each row are text and not padding: bool."""
        rows, size = self.inputs.live_BS.shape
        return self.inputs.live_BS.view(rows, size // self.inputs.block_length, -1)[:, : self.num_noisy, 0]

    def to(self, device: torch.device) -> DistillBatch:
        """The same batch there."""
        moved = {f.name: getattr(self.inputs, f.name) for f in fields(self.inputs)}
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()}
        return DistillBatch(
            ForwardInput(**moved), self.targets_BS.to(device), self.weights_BS.to(device), self.num_noisy
        )


@dataclass(frozen=True, slots=True)
class _Row:
    """One sample in whole blocks: text and masked_S over all of it, and the first block that holds an answer."""

    text_S: Tensor
    masked_S: Tensor
    weight_S: Tensor
    first: int


def noise_seed(seed: int, step: int, index: int) -> int:
    """Seed of the masks of sample `index` of a step: the same however a step is split over processes."""
    return Random(f"{seed}:{step}:{index}").getrandbits(63)


def draw_mask(num_positions: int, config: DistillConfig, seed: int, *, learnt: int | None = None) -> Tensor:
    """Which answer positions are masked: bool [num_positions], independently at one drawn ratio.

    At least one of the first `learnt` is (None: of all of them), so that a sample has a loss.
    """
    learnt = num_positions if learnt is None else learnt
    generator = torch.Generator().manual_seed(seed)
    toss, where = torch.rand(3, generator=generator), torch.rand(num_positions, generator=generator)
    low, high = config.mask_ratio
    ratio = 1.0 if toss[1] < config.full_mask_share else low + (high - low) * float(toss[0])
    masked = where < ratio
    masked[int(toss[2] * learnt)] |= not masked[:learnt].any()
    return masked


def _row(sample: Sample, model: ModelConfig, config: DistillConfig, seed: int) -> _Row:
    num_blocks, first = geometry(sample, model.block_length)
    size, start, end = num_blocks * model.block_length, len(sample.prompt), len(sample.prompt) + len(sample.answer)
    text_S = torch.full((size,), model.eos_ids[0])
    text_S[:end] = torch.tensor(sample.prompt + sample.answer)
    masked_S = torch.zeros(size, dtype=torch.bool)
    learnt = size if config.fill_weight > 0.0 else end
    masked_S[start:] = draw_mask(size - start, config, seed, learnt=learnt - start)
    weight_S = torch.zeros(size)
    weight_S[start:end], weight_S[end:] = 1.0, config.fill_weight
    return _Row(text_S, masked_S, weight_S, first)


def distill_batch(
    samples: Sequence[Sample], seeds: Sequence[int], model: ModelConfig, config: DistillConfig
) -> DistillBatch:
    """One padded batch: noisy blocks of each row first, then clean ones. seeds: one per sample, of its masks."""
    length = model.block_length
    rows = [_row(sample, model, config, seed) for sample, seed in zip(samples, seeds, strict=True)]
    totals = [len(row.text_S) // length for row in rows]
    num_noisy = max(total - row.first for total, row in zip(totals, rows, strict=True))
    num_blocks = num_noisy + max(totals) - 1
    shape = (len(rows), num_blocks * length)
    tokens_BS, targets_BS = torch.full(shape, model.pad_id), torch.full(shape, model.pad_id)
    positions_BS, weights_BS = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    masked_BS = torch.zeros(shape, dtype=torch.bool)
    block_BN = torch.full((len(rows), num_blocks), -1)
    for index, (row, total) in enumerate(zip(rows, totals, strict=True)):
        size, tail = len(row.text_S), row.first * length
        noisy, clean = slice(0, size - tail), slice(num_noisy * length, num_noisy * length + size - length)
        tokens_BS[index, noisy] = row.text_S.masked_fill(row.masked_S, model.mask_id)[tail:]
        tokens_BS[index, clean] = row.text_S[: size - length]
        targets_BS[index, noisy], masked_BS[index, noisy] = row.text_S[tail:], row.masked_S[tail:]
        weights_BS[index, noisy] = (row.weight_S * row.masked_S)[tail:]
        positions_BS[index, noisy], positions_BS[index, clean] = torch.arange(tail, size), torch.arange(size - length)
        block_BN[index, : total - row.first] = torch.arange(row.first, total)
        block_BN[index, num_noisy : num_noisy + total - 1] = torch.arange(total - 1)
    inputs = ForwardInput(
        tokens_BS=tokens_BS,
        positions_BS=positions_BS,
        live_BS=(block_BN >= 0).repeat_interleave(length, dim=1),
        mask_BSP=_who_sees_whom(block_BN, num_noisy, length),
        block_length=length,
        masked_BS=masked_BS,
    )
    return DistillBatch(inputs, targets_BS, weights_BS, num_noisy)


def _who_sees_whom(block_BN: Tensor, num_noisy: int, length: int) -> Tensor:
    """bool [B, S, S] from the number of the text block at each place, -1 for padding, which sees only itself."""
    noisy_N = torch.arange(block_BN.shape[1], device=block_BN.device) < num_noisy
    query_BN1, key_B1N = block_BN[:, :, None], block_BN[:, None, :]
    same_part = noisy_N[:, None] == noisy_N[None, :]
    earlier_clean = (query_BN1 > key_B1N) & ~noisy_N[None, :]
    allowed = (query_BN1 == key_B1N) & same_part | earlier_clean
    allowed = allowed & (query_BN1 >= 0) & (key_B1N >= 0)
    allowed_BSS = allowed.repeat_interleave(length, 1).repeat_interleave(length, 2)
    alone = torch.eye(allowed_BSS.shape[1], dtype=torch.bool, device=block_BN.device)
    return allowed_BSS | alone
