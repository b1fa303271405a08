"""Samples as one forward sees them: masked as decoding leaves them, padded to one shape.

Block-causal models: answer blocks are denoised, each seeing the clean text of the blocks before it. The published form
runs [noisy ; clean] at twice the length under a mask of three parts: block-diagonal within the noisy half, offset
block-causal from noisy to clean, block-causal within the clean half (arXiv 2605.30876, training code). Two kinds of
position cannot change the loss nor, since a coreset is a block's own, the routing of any other block, and are left out
here: noisy copies of blocks without answer tokens, and the clean copy of the last block. What remains is laid out as
[noisy answer blocks ; clean earlier blocks].

Full attention: the answer sees the whole canvas. LLaDA masks a share of all answer tokens (arXiv 2502.09992, section
2). Its decoding in blocks shows the model something else: the answer before the current block is decided, the one after
it wholly masked. Most samples are masked as decoding leaves them, and `LLADA_SHARE` of them as published. Answers are
followed by a drawn number of blocks that hold nothing but end-of-text tokens, so that the model does not depend on the
length that a user asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from random import Random

import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.models.runtime import ForwardInput
from expertshare.training.config import RunConfig

LLADA_SHARE = 0.25
"""Share of samples of a model with full attention whose whole answer is masked at one rate."""
ANSWER_BLOCKS = {2: 0.75, 3: 0.1, 4: 0.15}
"""How often a canvas has space for that many blocks of answer, at least."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one problem: the prompt, and the answer that ends with an end-of-text token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Samples of one forward. targets_BS: int64, the clean token. weights_BS: float32, 0 where there is no loss.

    num_noisy: blocks in the noisy part of a row, the first of its positions. seeds: one for each row, of all that is
    drawn for it.
    """

    inputs: ForwardInput
    targets_BS: Tensor
    weights_BS: Tensor
    num_noisy: int
    seeds: tuple[int, ...]

    @property
    def live_noisy_BN(self) -> Tensor:
        """Which noisy blocks of each row hold text and not only padding: bool."""
        rows, size = self.inputs.live_BS.shape
        return self.inputs.live_BS.view(rows, size // self.inputs.block_length, -1)[:, : self.num_noisy].any(dim=2)

    def to(self, device: torch.device) -> TrainingBatch:
        """The same batch on another device."""
        moved = {f.name: getattr(self.inputs, f.name) for f in fields(self.inputs)}
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()}
        targets_BS, weights_BS = self.targets_BS.to(device), self.weights_BS.to(device)
        return TrainingBatch(ForwardInput(**moved), targets_BS, weights_BS, self.num_noisy, self.seeds)


def make_batch(samples: Sequence[Sample], seeds: Sequence[int], model: ModelConfig, config: RunConfig) -> TrainingBatch:
    """Samples of any lengths as one forward of this model. seeds: one for each sample, of all that is drawn for it, so
    that no sample depends on those beside it."""
    lay_out = _canvases if model.attention == "full" else _noisy_and_clean
    return lay_out(samples, seeds, model, config)


def noise_seed(seed: int, step: int, index: int) -> int:
    """Seed of what is drawn for sample `index` of a step: the same however a step is split over processes."""
    return Random(f"{seed}:{step}:{index}").getrandbits(63)


def geometry(sample: Sample, block_length: int) -> tuple[int, int]:
    """Blocks in the whole text, and the first block that holds an answer token."""
    total = len(sample.prompt) + len(sample.answer)
    return -(-total // block_length), len(sample.prompt) // block_length


def draw_mask(pieces: Sequence[int], config: RunConfig, seed: int, *, learnt: int | None = None) -> Tensor:
    """Which answer positions are masked: bool [positions], independently, at a ratio that is drawn for every piece.

    pieces: numbers of positions that have one ratio each. At least one of the first `learnt` positions is masked (None:
    of all of them), so that a sample has a loss.
    """
    generator = torch.Generator().manual_seed(seed)
    toss = torch.rand(2 * len(pieces) + 1, generator=generator)
    where = torch.rand(sum(pieces), generator=generator)
    low, high = config.mask_ratio
    ratio = low + (high - low) * toss[: len(pieces)]
    ratio[toss[len(pieces) : -1] < config.full_mask_share] = 1.0
    masked = where < ratio.repeat_interleave(torch.tensor(pieces))
    learnt = len(where) if learnt is None else learnt
    masked[int(toss[-1] * learnt)] |= not masked[:learnt].any()
    return masked


def _noisy_and_clean(
    samples: Sequence[Sample], seeds: Sequence[int], model: ModelConfig, config: RunConfig
) -> TrainingBatch:
    """Noisy blocks of each row first, then clean ones; end-of-text tokens fill a sample's last block."""
    length = model.block_length
    sizes = [geometry(sample, length) for sample in samples]
    num_noisy = max(total - first for total, first in sizes)
    num_blocks = num_noisy + max(total for total, _ in sizes) - 1
    shape = (len(samples), num_blocks * length)
    tokens_BS, targets_BS = torch.full(shape, model.pad_id), torch.full(shape, model.pad_id)
    positions_BS, weights_BS = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    masked_BS = torch.zeros(shape, dtype=torch.bool)
    block_BN = torch.full((len(samples), num_blocks), -1)
    for row, (sample, seed, (total, first)) in enumerate(zip(samples, seeds, sizes, strict=True)):
        size, tail = total * length, first * length
        start, end = len(sample.prompt), len(sample.prompt) + len(sample.answer)
        text_S, weight_S = torch.full((size,), model.eos_ids[0]), torch.zeros(size)
        text_S[:end] = torch.tensor(sample.prompt + sample.answer)
        weight_S[start:end], weight_S[end:] = 1.0, config.fill_weight
        masked_S = torch.zeros(size, dtype=torch.bool)
        ends = [size] if config.ONE_RATIO else [*range(tail + length, size, length), size]
        pieces = [stop - begin for begin, stop in zip([start, *ends], ends, strict=False)]
        masked_S[start:] = draw_mask(pieces, config, seed, learnt=(size if config.fill_weight > 0.0 else end) - start)
        noisy, clean = slice(0, size - tail), slice(num_noisy * length, num_noisy * length + size - length)
        tokens_BS[row, noisy] = text_S.masked_fill(masked_S, model.mask_id)[tail:]
        tokens_BS[row, clean] = text_S[: size - length]
        targets_BS[row, noisy], masked_BS[row, noisy] = text_S[tail:], masked_S[tail:]
        weights_BS[row, noisy] = (weight_S * masked_S)[tail:]
        positions_BS[row, noisy], positions_BS[row, clean] = torch.arange(tail, size), torch.arange(size - length)
        block_BN[row, : total - first] = torch.arange(first, total)
        block_BN[row, num_noisy : num_noisy + total - 1] = torch.arange(total - 1)
    inputs = ForwardInput(
        tokens_BS=tokens_BS,
        positions_BS=positions_BS,
        live_BS=(block_BN >= 0).repeat_interleave(length, dim=1),
        mask_BSP=attention_mask(block_BN, num_noisy, length),
        block_length=length,
        masked_BS=masked_BS,
    )
    return TrainingBatch(inputs, targets_BS, weights_BS, num_noisy, tuple(seeds))


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


def _canvases(samples: Sequence[Sample], seeds: Sequence[int], model: ModelConfig, config: RunConfig) -> TrainingBatch:
    """Prompts end where a block ends, as in decoding; padding stands before them, and behind the shorter canvases."""
    length = model.block_length
    masks = [_canvas_masks(sample, length, config, seed) for sample, seed in zip(samples, seeds, strict=True)]
    starts = [-(-len(sample.prompt) // length) * length for sample in samples]
    size = max(start + len(masked_A) for start, (masked_A, _) in zip(starts, masks, strict=True))
    shape = (len(samples), size)
    clean_BS, live_BS = torch.full(shape, model.pad_id), torch.zeros(shape, dtype=torch.bool)
    weights_BS, masked_BS = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for row, (sample, start, (masked_A, learnt_A)) in enumerate(zip(samples, starts, masks, strict=True)):
        padding, end, stop = start - len(sample.prompt), start + len(sample.answer), start + len(masked_A)
        live_BS[row, padding:stop] = True
        clean_BS[row, padding:end] = torch.tensor(sample.prompt + sample.answer)
        clean_BS[row, end:stop] = model.eos_ids[0]
        masked_BS[row, start:stop] = masked_A
        weights_BS[row, start:end], weights_BS[row, end:stop] = 1.0, config.fill_weight
        weights_BS[row, start:stop] *= learnt_A
    inputs = ForwardInput(
        tokens_BS=clean_BS.masked_fill(masked_BS, model.mask_id),
        positions_BS=(live_BS.cumsum(dim=1) - 1).clamp(min=0) * live_BS,
        live_BS=live_BS,
        mask_BSP=live_BS.unsqueeze(1).expand(-1, size, -1),
        block_length=length,
        masked_BS=masked_BS,
    )
    return TrainingBatch(inputs, clean_BS, weights_BS, size // length, tuple(seeds))


def _canvas_masks(sample: Sample, length: int, config: RunConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Which positions of a drawn number of answer blocks are masked, and which of them are learnt from: bool."""
    generator = torch.Generator().manual_seed(seed)
    space, place, share, whole, everywhere = torch.rand(5, generator=generator).tolist()
    held = -(-len(sample.answer) // length)
    least = next(n for n, edge in zip(ANSWER_BLOCKS, accumulate(ANSWER_BLOCKS.values()), strict=True) if space < edge)
    low, high = config.mask_ratio
    ratio = 1.0 if whole < config.full_mask_share else low + (high - low) * share
    block_A = torch.arange(max(held, least) * length) // length
    hit_A = torch.rand(len(block_A), generator=generator) < ratio
    if everywhere < LLADA_SHARE:
        return hit_A, hit_A
    current = int(place * held)
    learnt_A = (block_A == current) & hit_A
    return learnt_A | (block_A > current), learnt_A
