"""The block-diffusion objective: denoise answer blocks, each seeing the clean text of the blocks before it.

The published form runs [noisy ; clean] at twice the length under a mask of three parts: block-diagonal within the noisy
half, offset block-causal from noisy to clean, block-causal within the clean half (arXiv 2605.30876, training code). Two
kinds of position cannot change the loss and are left out here: noisy copies of blocks without answer tokens, and the
clean copy of the last block. What remains is laid out as [noisy answer blocks ; clean earlier blocks].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.models.runtime import ForwardInput


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one problem: the prompt, and the answer that ends with an end-of-text token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Samples of one geometry. targets_BS: int64, the clean token. weights_BS: float32, 0 where there is no loss."""

    inputs: ForwardInput
    targets_BS: Tensor
    weights_BS: Tensor


@dataclass(frozen=True, slots=True)
class NoiseSettings:
    """How blocks are masked; see TrainingConfig."""

    mask_ratio: tuple[float, float]
    full_mask_share: float
    fill_weight: float


def attention_mask(num_noisy: int, num_clean: int, block_length: int) -> Tensor:
    """Who may attend to whom, bool [S, S], S = (num_noisy + num_clean) blocks, noisy ones first.

    The noisy blocks are the last of the text: noisy block j stands for block num_clean + 1 - num_noisy + j.
    """
    first_noisy = num_clean + 1 - num_noisy
    block = torch.cat((torch.arange(num_noisy) + first_noisy, torch.arange(num_clean)))
    noisy = torch.arange(num_noisy + num_clean) < num_noisy
    own = (block[:, None] == block[None, :]) & noisy[:, None] & noisy[None, :]
    before = (block[:, None] > block[None, :]) & ~noisy[None, :]
    clean_own = (block[:, None] == block[None, :]) & ~noisy[:, None] & ~noisy[None, :]
    allowed = own | before | clean_own
    return allowed.repeat_interleave(block_length, 0).repeat_interleave(block_length, 1)


def geometry(sample: Sample, block_length: int) -> tuple[int, int]:
    """Blocks in the whole text, and the first block that holds an answer token."""
    total = len(sample.prompt) + len(sample.answer)
    return -(-total // block_length), len(sample.prompt) // block_length


def training_batches(
    samples: Sequence[Sample], config: ModelConfig, noise: NoiseSettings, generator: torch.Generator
) -> Iterator[TrainingBatch]:
    """Group samples by geometry; one batch each. The same generator state gives the same masks."""
    by_geometry: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_geometry[geometry(sample, config.block_length)].append(sample)
    for (num_blocks, first), members in sorted(by_geometry.items()):
        yield _batch(members, num_blocks, first, config, noise, generator)


def _batch(
    samples: Sequence[Sample],
    num_blocks: int,
    first: int,
    config: ModelConfig,
    noise: NoiseSettings,
    generator: torch.Generator,
) -> TrainingBatch:
    length, eos = config.block_length, config.eos_ids[0]
    size = num_blocks * length
    clean_BS = torch.full((len(samples), size), eos)
    weight_BS = torch.zeros(len(samples), size)
    for row, sample in enumerate(samples):
        text = sample.prompt + sample.answer
        clean_BS[row, : len(text)] = torch.tensor(text)
        weight_BS[row, len(sample.prompt) : len(text)] = 1.0
        weight_BS[row, len(text) :] = noise.fill_weight
    masked_BS = _draw_masks(weight_BS > 0, length, noise, generator)
    noisy_BS = clean_BS.masked_fill(masked_BS, config.mask_id)
    tail, head = slice(first * length, size), slice(0, size - length)
    positions_S = torch.cat((torch.arange(size)[tail], torch.arange(size)[head]))
    tokens_BS = torch.cat((noisy_BS[:, tail], clean_BS[:, head]), dim=1)
    no_loss = torch.zeros_like(weight_BS[:, head])
    allowed = attention_mask(num_blocks - first, num_blocks - 1, length)
    inputs = ForwardInput(
        tokens_BS=tokens_BS,
        positions_BS=positions_S.expand_as(tokens_BS),
        live_BS=torch.ones_like(tokens_BS, dtype=torch.bool),
        mask_BSP=allowed.expand(len(samples), -1, -1),
        block_length=length,
        masked_BS=torch.cat((masked_BS[:, tail], torch.zeros_like(masked_BS[:, head])), dim=1),
    )
    return TrainingBatch(
        inputs,
        torch.cat((clean_BS[:, tail], clean_BS[:, head]), dim=1),
        torch.cat(((weight_BS * masked_BS)[:, tail], no_loss), dim=1),
    )


def _draw_masks(maskable_BS: Tensor, block_length: int, noise: NoiseSettings, generator: torch.Generator) -> Tensor:
    batch, size = maskable_BS.shape
    low, high = noise.mask_ratio
    ratio_BN = low + (high - low) * torch.rand(batch, size // block_length, generator=generator)
    whole_BN = torch.rand(ratio_BN.shape, generator=generator) < noise.full_mask_share
    ratio_BS = ratio_BN.masked_fill(whole_BN, 1.0).repeat_interleave(block_length, dim=1)
    return maskable_BS & (torch.rand(batch, size, generator=generator) < ratio_BS)
