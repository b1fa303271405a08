"""The block-diffusion objective: denoise answer blocks, each seeing the clean text of the blocks before it.

The published form runs [noisy ; clean] at twice the length under a mask of three parts: block-diagonal within the noisy
half, offset block-causal from noisy to clean, block-causal within the clean half (arXiv 2605.30876, training code). Two
kinds of position cannot change the loss nor, since a coreset is a block's own, the routing of any other block, and are
left out here: noisy copies of blocks without answer tokens, and the clean copy of the last block. What remains is laid
out as [noisy answer blocks ; clean earlier blocks].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from random import Random

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.models.runtime import ForwardInput
from expertshare.training.config import RunConfig


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one problem: the prompt, and the answer that ends with an end-of-text token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Samples of one forward. targets_BS: int64, the clean token. weights_BS: float32, 0 where there is no loss.

    num_noisy: blocks in the noisy part of a row, the first of its positions.
    """

    inputs: ForwardInput
    targets_BS: Tensor
    weights_BS: Tensor
    num_noisy: int

    @property
    def live_noisy_BN(self) -> Tensor:
        """Which noisy blocks of each row hold text and not only padding: bool."""
        rows, size = self.inputs.live_BS.shape
        return self.inputs.live_BS.view(rows, size // self.inputs.block_length, -1)[:, : self.num_noisy].any(dim=2)

    def to(self, device: torch.device) -> TrainingBatch:
        """The same batch on another device."""
        moved = {f.name: getattr(self.inputs, f.name) for f in fields(self.inputs)}
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()}
        return TrainingBatch(
            ForwardInput(**moved), self.targets_BS.to(device), self.weights_BS.to(device), self.num_noisy
        )


def geometry(sample: Sample, block_length: int) -> tuple[int, int]:
    """Blocks in the whole text, and the first block that holds an answer token."""
    total = len(sample.prompt) + len(sample.answer)
    return -(-total // block_length), len(sample.prompt) // block_length


def grouped_batches(
    samples: Sequence[Sample], model: ModelConfig, config: RunConfig, generator: torch.Generator
) -> Iterator[TrainingBatch]:
    """Group samples by geometry; one batch each, masked at a ratio that is drawn for every block.

    The same generator state gives the same masks.
    """
    by_geometry: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_geometry[geometry(sample, model.block_length)].append(sample)
    for _, members in sorted(by_geometry.items()):
        rows = [_Row.of(sample, model, config) for sample in members]
        maskable_BS = torch.stack([row.weight_S for row in rows]) > 0
        for row, masked_S in zip(rows, _mask_by_block(maskable_BS, model.block_length, config, generator), strict=True):
            row.masked_S = masked_S
        yield _lay_out(rows, model)


def padded_batch(
    samples: Sequence[Sample], seeds: Sequence[int], model: ModelConfig, config: RunConfig
) -> TrainingBatch:
    """Samples of any geometry, padded to one shape. seeds: one per sample, of its masks (`draw_mask`)."""
    rows = [_Row.of(sample, model, config) for sample in samples]
    for row, sample, seed in zip(rows, samples, seeds, strict=True):
        start, end = len(sample.prompt), len(sample.prompt) + len(sample.answer)
        learnt = len(row.text_S) if config.fill_weight > 0.0 else end
        row.masked_S[start:] = draw_mask(len(row.text_S) - start, config, seed, learnt=learnt - start)
    return _lay_out(rows, model)


def noise_seed(seed: int, step: int, index: int) -> int:
    """Seed of the masks of sample `index` of a step: the same however a step is split over processes."""
    return Random(f"{seed}:{step}:{index}").getrandbits(63)


def draw_mask(num_positions: int, config: RunConfig, seed: int, *, learnt: int | None = None) -> Tensor:
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


def _mask_by_block(maskable_BS: Tensor, block_length: int, config: RunConfig, generator: torch.Generator) -> Tensor:
    batch, size = maskable_BS.shape
    low, high = config.mask_ratio
    ratio_BN = low + (high - low) * torch.rand(batch, size // block_length, generator=generator)
    whole_BN = torch.rand(ratio_BN.shape, generator=generator) < config.full_mask_share
    ratio_BS = ratio_BN.masked_fill(whole_BN, 1.0).repeat_interleave(block_length, dim=1)
    return maskable_BS & (torch.rand(batch, size, generator=generator) < ratio_BS)


@dataclass(slots=True)
class _Row:
    """One sample in whole blocks: text, loss weights and masks over all of it, and the first block with an answer."""

    text_S: Tensor
    weight_S: Tensor
    masked_S: Tensor
    first: int

    @classmethod
    def of(cls, sample: Sample, model: ModelConfig, config: RunConfig) -> _Row:
        """Nothing is masked yet; end-of-text tokens fill the last block."""
        num_blocks, first = geometry(sample, model.block_length)
        size, start, end = num_blocks * model.block_length, len(sample.prompt), len(sample.prompt) + len(sample.answer)
        text_S, weight_S = torch.full((size,), model.eos_ids[0]), torch.zeros(size)
        text_S[:end] = torch.tensor(sample.prompt + sample.answer)
        weight_S[start:end], weight_S[end:] = 1.0, config.fill_weight
        return cls(text_S, weight_S, torch.zeros(size, dtype=torch.bool), first)


def _lay_out(rows: Sequence[_Row], model: ModelConfig) -> TrainingBatch:
    """One padded batch: noisy blocks of each row first, then clean ones."""
    length = model.block_length
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
        mask_BSP=attention_mask(block_BN, num_noisy, length),
        block_length=length,
        masked_BS=masked_BS,
    )
    return TrainingBatch(inputs, targets_BS, weights_BS, num_noisy)


def attention_mask(block_BN: Tensor, num_noisy: int, length: int) -> Tensor:
    """Which position attends to which, bool [B, S, S], from the number of the text block in each place, the noisy
    places first; -1 is padding, whose positions see only themselves."""
    noisy_N = torch.arange(block_BN.shape[1], device=block_BN.device) < num_noisy
    query_BN1, key_B1N = block_BN[:, :, None], block_BN[:, None, :]
    same_part = noisy_N[:, None] == noisy_N[None, :]
    earlier_clean = (query_BN1 > key_B1N) & ~noisy_N[None, :]
    allowed = (query_BN1 == key_B1N) & same_part | earlier_clean
    allowed = allowed & (query_BN1 >= 0) & (key_B1N >= 0)
    allowed_BSS = allowed.repeat_interleave(length, 1).repeat_interleave(length, 2)
    alone = torch.eye(allowed_BSS.shape[1], dtype=torch.bool, device=block_BN.device)
    return allowed_BSS | alone


LLADA_SHARE = 0.25
"""Share of samples whose whole answer is masked at one rate."""

ANSWER_BLOCKS = {2: 0.75, 3: 0.1, 4: 0.15}
"""How often a canvas has space for that many blocks of answer, at least."""


def canvas_batches(
    samples: Sequence[Sample], model: ModelConfig, config: RunConfig, generator: torch.Generator
) -> Iterator[TrainingBatch]:
    """Group samples by geometry; one batch each. The same generator state gives the same masks."""
    length = model.block_length
    drawn = torch.tensor(list(ANSWER_BLOCKS))[
        torch.multinomial(torch.tensor(list(ANSWER_BLOCKS.values())), len(samples), True, generator=generator)
    ].tolist()
    by_geometry: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample, least in zip(samples, drawn, strict=True):
        needed = -(-len(sample.answer) // length)
        by_geometry[-(-len(sample.prompt) // length), max(needed, least)].append(sample)
    for (prompt_blocks, answer_blocks), members in sorted(by_geometry.items()):
        yield _batch(members, prompt_blocks, answer_blocks, model, config, generator)


def _batch(
    samples: Sequence[Sample],
    prompt_blocks: int,
    answer_blocks: int,
    model: ModelConfig,
    config: RunConfig,
    generator: torch.Generator,
) -> TrainingBatch:
    length, start = model.block_length, prompt_blocks * model.block_length
    size = start + answer_blocks * length
    clean_BS = torch.full((len(samples), size), model.eos_ids[0])
    live_BS = torch.ones(clean_BS.shape, dtype=torch.bool)
    weight_BS = torch.zeros(clean_BS.shape)
    for row, sample in enumerate(samples):
        padding, end = start - len(sample.prompt), start + len(sample.answer)
        clean_BS[row, :padding], live_BS[row, :padding] = model.pad_id, False
        clean_BS[row, padding:end] = torch.tensor(sample.prompt + sample.answer)
        weight_BS[row, start:end], weight_BS[row, end:] = 1.0, config.fill_weight
    masked_BA, learnt_BA = _draw_masks([len(s.answer) for s in samples], answer_blocks, length, config, generator)
    prompt_BP = torch.zeros(len(samples), start, dtype=torch.bool)
    masked_BS, learnt_BS = torch.cat((prompt_BP, masked_BA), dim=1), torch.cat((prompt_BP, learnt_BA), dim=1)
    positions_BS = (live_BS.cumsum(dim=1) - 1).clamp(min=0)
    inputs = ForwardInput(
        tokens_BS=clean_BS.masked_fill(masked_BS, model.mask_id),
        positions_BS=positions_BS,
        live_BS=live_BS,
        mask_BSP=live_BS.unsqueeze(1).expand(-1, size, -1),
        block_length=length,
        masked_BS=masked_BS,
    )
    return TrainingBatch(inputs, clean_BS, weight_BS * learnt_BS, num_noisy=size // length)


def _draw_masks(
    answer_lengths: Sequence[int], num_blocks: int, length: int, config: RunConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which answer positions are masked, and which of them are learnt from: bool [B, answer positions] each."""
    batch = len(answer_lengths)
    held_B = torch.tensor([-(-count // length) for count in answer_lengths])
    current_B = (torch.rand(batch, generator=generator) * held_B).long()
    low, high = config.mask_ratio
    ratio_B = low + (high - low) * torch.rand(batch, generator=generator)
    ratio_B[torch.rand(batch, generator=generator) < config.full_mask_share] = 1.0
    everywhere_B = torch.rand(batch, generator=generator) < LLADA_SHARE
    hit_BA = torch.rand(batch, num_blocks * length, generator=generator) < ratio_B.unsqueeze(1)
    block_A = torch.arange(num_blocks * length) // length
    here_BA = (block_A == current_B.unsqueeze(1)) | everywhere_B.unsqueeze(1)
    later_BA = (block_A > current_B.unsqueeze(1)) & ~everywhere_B.unsqueeze(1)
    return (here_BA & hit_BA) | later_BA, here_BA & hit_BA
