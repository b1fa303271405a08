"""The objective of models with full attention: denoise an answer that sees the whole canvas.

LLaDA masks a share of all answer tokens (arXiv 2502.09992, section 2). Its decoding in blocks shows the model something
else: the answer before the current block is decided, the one after it wholly masked. Most samples here are masked as
decoding leaves them, and `LLADA_SHARE` of them as published. Answers are followed by a drawn number of blocks that
hold nothing but end-of-text tokens, so that the model does not depend on the length that a user asks for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.models.runtime import ForwardInput
from expertshare.training.block_diffusion import Sample, TrainingBatch
from expertshare.training.config import RunConfig

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
