"""Input, loss and routing of self-distillation, against the published form and against decoding's forwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import expertshare.models.moe as moe
from expertshare.config import ModelConfig
from expertshare.models.runtime import ForwardInput, Runtime
from expertshare.models.transformer import MoETransformer, initialise
from expertshare.routing import parse_policy
from expertshare.training.batches import Sample, draw_mask, make_batch
from expertshare.training.config import DistillConfig, reference_architecture
from expertshare.training.trainer import BatchLoss
from expertshare.types import RoutingPlan

LENGTH, MASK, EOS = 8, 0, 1
POLICY = "block-top-p:top_p_experts=0.5"
SETTINGS = DistillConfig(policy=POLICY)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    made = reference_architecture(
        vocab_size=64, mask_id=MASK, eos_id=EOS, pad_id=2, hidden=64, layers=3, expert_hidden=8
    )
    return replace(made, block_length=LENGTH)


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> MoETransformer:
    made = MoETransformer(config)
    initialise(made, seed=3, std=0.2)
    generator = torch.Generator().manual_seed(4)
    for module in made.modules():
        if isinstance(module, moe.Router) and module.bias is not None:
            module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
    return made.eval()


@pytest.fixture(scope="module")
def runtime(config: ModelConfig) -> Runtime:
    return Runtime(policy=parse_policy(POLICY).bind(config.router))


def _sample(prompt: int, answer: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (prompt + answer - 1,), generator=generator).tolist()
    return Sample(tuple(ids[:prompt]), (*ids[prompt:], EOS))


def _text(sample: Sample) -> list[int]:
    text = [*sample.prompt, *sample.answer]
    return text + [EOS] * (-len(text) % LENGTH)


def _noisy_text(batch_row: torch.Tensor, sample: Sample) -> list[int]:
    """The whole text with the answer's blocks replaced by the noisy ones at the head of the row."""
    text = _text(sample)
    tail = len(sample.prompt) // LENGTH * LENGTH
    return text[:tail] + batch_row[: len(text) - tail].tolist()


def _published_forward(model: MoETransformer, runtime: Runtime, noisy: list[int], clean: list[int]) -> torch.Tensor:
    """Logits of the noisy half of [noisy ; clean], alone, unpadded, with the mask written entry by entry."""
    size = len(clean)
    allowed = torch.zeros(2 * size, 2 * size, dtype=torch.bool)
    for i in range(2 * size):
        for j in range(2 * size):
            mine, theirs = i % size // LENGTH, j % size // LENGTH
            if i < size:
                allowed[i, j] = mine == theirs if j < size else mine > theirs
            else:
                allowed[i, j] = j >= size and mine >= theirs
    masked = [now != then for now, then in zip(noisy, clean, strict=True)] + [False] * size
    inputs = ForwardInput(
        tokens_BS=torch.tensor([noisy + clean]),
        positions_BS=torch.arange(size).repeat(2)[None],
        live_BS=torch.ones(1, 2 * size, dtype=torch.bool),
        mask_BSP=allowed[None],
        block_length=LENGTH,
        masked_BS=torch.tensor([masked]),
    )
    return model.logits(model(inputs, runtime).hidden_BSD[0, :size])


SHAPES = [[(5, 9)], [(16, 10)], [(3, 4), (20, 21), (8, 8), (15, 2)]]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    "policy", ["vanilla", POLICY, "des-vote:budget=14", "des-vote:budget=14,voters=masked", "block-max:budget=12"]
)
def test_loss_equals_the_published_form_of_each_sample_alone(
    config: ModelConfig, model: MoETransformer, shapes: list[tuple[int, int]], policy: str
) -> None:
    runtime = Runtime(policy=parse_policy(policy).bind(config.router))
    samples = [_sample(*shape, seed) for seed, shape in enumerate(shapes)]
    batch = make_batch(samples, range(len(samples)), config, SETTINGS)
    ours, _, _ = BatchLoss(model)(batch, runtime)
    theirs = torch.zeros(())
    for row, sample in zip(batch.inputs.tokens_BS, samples, strict=True):
        clean, noisy = _text(sample), _noisy_text(row, sample)
        losses = F.cross_entropy(
            _published_forward(model, runtime, noisy, clean), torch.tensor(clean), reduction="none"
        )
        end = len(sample.prompt) + len(sample.answer)
        for place, loss in enumerate(losses):
            if place >= len(sample.prompt) and noisy[place] == MASK:
                theirs = theirs + loss * (1.0 if place < end else SETTINGS.fill_weight)
    assert ours > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_answer_positions_are_masked_and_have_a_loss(config: ModelConfig) -> None:
    samples = [_sample(prompt, answer, prompt) for prompt in (1, 7, 8, 19) for answer in (2, 9)]
    batch = make_batch(samples, range(len(samples)), config, replace(SETTINGS, fill_weight=0.0))
    for row, weights, targets, sample in zip(
        batch.inputs.tokens_BS, batch.weights_BS, batch.targets_BS, samples, strict=True
    ):
        noisy, clean = _noisy_text(row, sample), _text(sample)
        assert noisy[: len(sample.prompt)] == list(sample.prompt)
        assert all(a in (b, MASK) for a, b in zip(noisy, clean, strict=True))
        tail = len(sample.prompt) // LENGTH * LENGTH
        scored = [tail + place for place in weights.nonzero().flatten().tolist()]
        end = len(sample.prompt) + len(sample.answer)
        assert scored == [i for i in range(len(sample.prompt), end) if noisy[i] == MASK]
        assert [clean[i] for i in scored] == targets[weights > 0].tolist()
        rest = row[batch.num_noisy * LENGTH :].tolist()
        assert rest[: len(clean) - LENGTH] == clean[: len(clean) - LENGTH]


def test_the_masked_share_is_uniform_between_its_limits() -> None:
    shares = torch.tensor([draw_mask([400], SETTINGS, seed).float().mean() for seed in range(600)])
    assert shares.min() > 0.3 - 0.1
    assert shares.max() < 0.8 + 0.1
    assert shares.mean() == pytest.approx(0.55, abs=0.02)
    assert shares.std() == pytest.approx(0.5 / 12**0.5, abs=0.015)
    assert all(draw_mask([2], SETTINGS, seed).any() for seed in range(200))
    assert draw_mask([50], replace(SETTINGS, full_mask_share=1.0), 0).all()


def test_a_neighbour_and_padding_change_nothing(config: ModelConfig, model: MoETransformer, runtime: Runtime) -> None:
    """A short sample alone, and beside one that pads it: the same loss, the same experts."""
    short, long = _sample(3, 4, 0), _sample(20, 30, 1)
    alone, experts, _ = BatchLoss(model)(make_batch([short], [5], config, SETTINGS), runtime)
    other, _, _ = BatchLoss(model)(make_batch([long], [6], config, SETTINGS), runtime)
    both, _, _ = BatchLoss(model)(make_batch([short, long], [5, 6], config, SETTINGS), runtime)
    torch.testing.assert_close(both, alone + other, rtol=1e-5, atol=1e-5)
    assert 8 <= experts < 24


def test_routing_is_what_decoding_does_with_the_same_block(
    config: ModelConfig, model: MoETransformer, runtime: Runtime
) -> None:
    """Prefill of the clean blocks, then the noisy block against their keys and values, as decoding does."""
    sample = _sample(17, 13, 2)
    batch = make_batch([sample, _sample(4, 30, 9)], [0, 1], config, SETTINGS)
    trained: list[RoutingPlan] = []
    with torch.no_grad():
        BatchLoss(model)(batch, replace(runtime, on_plan=lambda _, plan: trained.append(plan)))
    clean, noisy = torch.tensor(_text(sample)), torch.tensor(_noisy_text(batch.inputs.tokens_BS[0], sample))
    first, total = 17 // LENGTH, len(clean) // LENGTH
    blocks = torch.arange(len(clean)) // LENGTH
    for place in range(first, total):
        start, end = place * LENGTH, (place + 1) * LENGTH
        with torch.no_grad():
            causal = blocks[:start, None] >= blocks[None, :start]
            past = model(_inputs(clean[:start], 0, causal), runtime).key_values
            decoded: list[RoutingPlan] = []
            heard = replace(runtime, on_plan=lambda _, plan, decoded=decoded: decoded.append(plan))  # type: ignore[misc]
            model(_inputs(noisy[start:end], start, torch.ones(LENGTH, end, dtype=torch.bool)), heard, past)
        rows = slice((place - first) * LENGTH, (place - first + 1) * LENGTH)
        for training_plan, decoding_plan in zip(trained, decoded, strict=True):
            assert torch.equal(training_plan.expert_ids_TK[rows], decoding_plan.expert_ids_TK)
            torch.testing.assert_close(training_plan.weights_TK[rows], decoding_plan.weights_TK, rtol=1e-4, atol=1e-5)


def _inputs(tokens: torch.Tensor, start: int, allowed: torch.Tensor) -> ForwardInput:
    return ForwardInput(
        tokens_BS=tokens[None],
        positions_BS=torch.arange(start, start + len(tokens))[None],
        live_BS=torch.ones(1, len(tokens), dtype=torch.bool),
        mask_BSP=allowed[None],
        block_length=LENGTH,
    )
