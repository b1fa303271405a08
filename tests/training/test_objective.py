"""The objective against the published form, written out: [noisy ; clean] at twice the length, three-part mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from expertshare.config import ModelConfig
from expertshare.models.runtime import ForwardInput, Runtime
from expertshare.models.transformer import MoETransformer, initialise
from expertshare.routing import make_policy
from expertshare.training.batches import Sample, attention_mask, draw_mask, geometry, make_batch
from expertshare.training.config import TrainingConfig, reference_architecture

NOISE = TrainingConfig(mask_ratio=(0.3, 0.8), full_mask_share=0.2, fill_weight=0.2)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return reference_architecture(vocab_size=64, mask_id=0, eos_id=1, pad_id=2, hidden=64, layers=2, expert_hidden=8)


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> MoETransformer:
    made = MoETransformer(config)
    initialise(made, seed=3, std=0.2)
    return made


def _sample(prompt: int, answer: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (prompt + answer - 1,), generator=generator).tolist()
    return Sample(tuple(ids[:prompt]), (*ids[prompt:], 1))


def _published_mask(num_blocks: int, length: int) -> torch.Tensor:
    """Entry by entry: query i, key j; the first half of the positions is noisy, the second clean."""
    size = num_blocks * length
    allowed = torch.zeros(2 * size, 2 * size, dtype=torch.bool)
    for i in range(2 * size):
        for j in range(2 * size):
            block_i, block_j = (i % size) // length, (j % size) // length
            noisy_i, noisy_j = i < size, j < size
            if noisy_i and noisy_j:
                allowed[i, j] = block_i == block_j
            elif noisy_i:
                allowed[i, j] = block_i > block_j
            elif not noisy_j:
                allowed[i, j] = block_i >= block_j
    return allowed


@pytest.mark.parametrize(("prompt", "answer"), [(5, 9), (40, 20), (33, 40), (64, 10), (20, 20)])
def test_loss_equals_the_published_form(config: ModelConfig, model: MoETransformer, prompt: int, answer: int) -> None:
    sample = _sample(prompt, answer, prompt + answer)
    batch = make_batch([sample], [0], config, NOISE)
    runtime = Runtime(policy=make_policy("vanilla").bind(config.router))
    output = model(batch.inputs, runtime)
    losses = F.cross_entropy(model.logits(output.hidden_BSD[0]), batch.targets_BS[0], reduction="none")
    ours = (losses * batch.weights_BS[0]).sum()

    length = config.block_length
    num_blocks, first = geometry(sample, length)
    text = torch.full((num_blocks * length,), 1)
    text[: prompt + answer] = torch.tensor(sample.prompt + sample.answer)
    noisy = text.clone()
    noisy[first * length :] = batch.inputs.tokens_BS[0, : (num_blocks - first) * length]
    positions = torch.arange(num_blocks * length)
    doubled = ForwardInput(
        tokens_BS=torch.cat((noisy, text))[None],
        positions_BS=torch.cat((positions, positions))[None],
        live_BS=torch.ones(1, 2 * len(text), dtype=torch.bool),
        mask_BSP=_published_mask(num_blocks, length)[None],
        block_length=length,
    )
    logits = model.logits(model(doubled, runtime).hidden_BSD[0, : len(text)])
    losses = F.cross_entropy(logits, text, reduction="none")
    weights = torch.zeros(len(text))
    weights[prompt : prompt + answer], weights[prompt + answer :] = 1.0, NOISE.fill_weight
    theirs = (losses * weights * (noisy == config.mask_id)).sum()
    assert ours > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_only_answer_positions_are_masked_and_the_prompt_never(config: ModelConfig) -> None:
    samples = [Sample((5,) * (10 + i), (*range(10, 21), 1)) for i in range(40)]
    batch = make_batch(samples, range(40), config, NOISE)
    masked = batch.inputs.tokens_BS == config.mask_id
    assert torch.equal(masked, batch.weights_BS > 0)
    assert batch.inputs.masked_BS is not None
    assert torch.equal(masked, batch.inputs.masked_BS)
    targets = batch.targets_BS.masked_fill(batch.weights_BS == 0, -1)
    prompt_ids = {token for sample in samples for token in sample.prompt}
    assert prompt_ids.isdisjoint(targets.unique().tolist())


def test_every_block_has_a_mask_ratio_of_its_own() -> None:
    """Lengths that differ by what the prompt takes of the first block; the shares of two blocks are independent."""
    pieces = [300, 400, 400]
    shares = torch.tensor(
        [[part.float().mean() for part in draw_mask(pieces, NOISE, seed).split(pieces)] for seed in range(300)]
    )
    whole = (shares == 1.0).float().mean(dim=0)
    assert torch.allclose(whole, torch.full((3,), 0.2), atol=0.07)
    drawn = shares[(shares < 1.0).all(dim=1)]
    assert drawn.min() > 0.2
    assert drawn.max() < 0.9
    assert torch.corrcoef(drawn.T).fill_diagonal_(0.0).abs().max() < 0.2


def test_a_sample_is_masked_in_one_way_whatever_is_beside_it(config: ModelConfig) -> None:
    samples = [_sample(*sizes, seed) for seed, sizes in enumerate([(5, 9), (40, 20), (5, 12), (33, 40)])]
    together = make_batch(samples, range(4), config, NOISE)
    for row, sample in enumerate(samples):
        alone = make_batch([sample], [row], config, NOISE)
        size = alone.num_noisy * config.block_length
        assert torch.equal(together.inputs.tokens_BS[row, :size], alone.inputs.tokens_BS[0, :size])
        assert torch.equal(together.weights_BS[row, :size], alone.weights_BS[0, :size])
        assert not together.weights_BS[row, size:].any()


def test_mask_of_one_block_lets_everyone_see_everyone() -> None:
    assert attention_mask(torch.tensor([[0]]), 1, 4).all()


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    config = TrainingConfig(steps=1000, warmup_steps=100, decay_share=0.5)
    factors = [config.learning_rate_factor(step) for step in (0, 49, 99, 400, 500, 750, 999)]
    assert factors == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0, 0.5, 0.002])
