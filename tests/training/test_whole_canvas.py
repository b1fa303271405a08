"""Training with full attention: the states that decoding shows, and an even load without a selection bias."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertshare.config import ModelConfig
from expertshare.decoding import DecodingOptions, generate
from expertshare.errors import ConfigError
from expertshare.lab.tasks.tokenizer import TaskProblems
from expertshare.models import MoETransformer, Runtime, initialise, load_model
from expertshare.routing import make_policy, parse_policy
from expertshare.training import batches as layout
from expertshare.training.batches import Sample, TrainingBatch, make_batch
from expertshare.training.config import TrainingConfig, reference_architecture
from expertshare.training.scratch import prepare, run, run_folder
from expertshare.training.trainer import BatchLoss, LoadBalance

NOISE = TrainingConfig(mask_ratio=(0.3, 0.8), full_mask_share=0.2, fill_weight=0.2)
EOS, MASK, PAD = 1, 0, 2


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return reference_architecture(
        family="llada_moe", vocab_size=64, mask_id=MASK, eos_id=EOS, pad_id=PAD, hidden=64, layers=2, expert_hidden=8
    )


def drawn(count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(1, 70, (count, 2), generator=generator).tolist()
    return [
        Sample(tuple(torch.randint(3, 64, (a,), generator=generator).tolist()), (*[7] * (b - 1), EOS)) for a, b in sizes
    ]


def made(config: ModelConfig, count: int = 60, seed: int = 0) -> TrainingBatch:
    return make_batch(drawn(count), range(seed, seed + count), config, NOISE)


def test_the_answer_is_masked_as_decoding_leaves_it(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the block that is learnt everything is decided, behind it everything is masked."""
    monkeypatch.setattr(layout, "LLADA_SHARE", 0.0)
    batch, seen = made(config), 0
    masked_BS, learnt_BS = batch.inputs.tokens_BS == MASK, batch.weights_BS > 0
    assert not (learnt_BS & ~masked_BS).any()
    assert not (masked_BS & ~batch.inputs.live_BS).any()
    for masked_S, learnt_S, live_S in zip(masked_BS, learnt_BS, batch.inputs.live_BS, strict=True):
        blocks = {int(place) // 32 for place in learnt_S.nonzero()}
        if not blocks:  # the draw spared every token of a short block
            continue
        (current,) = blocks
        assert not masked_S[: current * 32].any()
        assert masked_S[(current + 1) * 32 :].equal(live_S[(current + 1) * 32 :])
        seen += 1
    assert seen > 50


def test_llada_masks_the_whole_answer_at_one_rate(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "LLADA_SHARE", 1.0)
    batch = made(config)
    assert torch.equal(batch.inputs.tokens_BS == MASK, batch.weights_BS > 0)


def test_prompt_and_padding_stay_and_targets_are_the_text(config: ModelConfig) -> None:
    batch = made(config)
    live_BS, mask_BSP = batch.inputs.live_BS, batch.inputs.mask_BSP
    assert mask_BSP is not None
    assert torch.equal(mask_BSP[:, 0], live_BS)
    for row, sample in enumerate(drawn(60)):
        places = live_BS[row].nonzero().flatten()
        start, stop = int(places[0]), int(places[-1]) + 1
        assert live_BS[row, start:stop].all()
        assert torch.equal(batch.inputs.positions_BS[row, start:stop], torch.arange(stop - start))
        text = batch.targets_BS[row, start:stop].tolist()
        end = len(sample.prompt) + len(sample.answer)
        assert ((start + len(sample.prompt)) % 32, stop % 32) == (0, 0)
        assert tuple(text[:end]) == sample.prompt + sample.answer
        assert set(text[end:]) <= {EOS}
        prompt_S = batch.inputs.tokens_BS[row, start : start + len(sample.prompt)]
        assert prompt_S.tolist() == list(sample.prompt)


def test_a_neighbour_and_padding_change_no_loss(config: ModelConfig) -> None:
    model = MoETransformer(config)
    initialise(model, seed=2, std=0.2)
    runtime = Runtime(policy=parse_policy("des-vote:budget=16").bind(config.router))
    samples = drawn(6)
    both, _, _ = BatchLoss(model)(make_batch(samples, range(6), config, NOISE), runtime)
    alone = [BatchLoss(model)(make_batch([s], [n], config, NOISE), runtime)[0] for n, s in enumerate(samples)]
    torch.testing.assert_close(both, torch.stack(alone).sum(), rtol=1e-4, atol=1e-4)


def test_balance_loss_is_the_published_formula(config: ModelConfig) -> None:
    model = MoETransformer(config)
    initialise(model, seed=1, std=0.2)
    balance = LoadBalance(model, rate=0.0, weight=1.0)
    batch = made(config, count=5)
    logits: list[torch.Tensor] = []
    for layer in model.layers:
        layer.moe.register_forward_pre_hook(
            lambda moe, inputs: logits.append((inputs[0] @ moe.router.weight.T).detach())
        )
    output = model(batch.inputs, Runtime(policy=make_policy("vanilla").bind(config.router)))
    loss = balance.loss(output.routing.load_NE, batch.inputs.live_BS)
    expected = 0.0
    for layer_logits in logits:
        tokens = layer_logits.reshape(-1, 64)[batch.inputs.live_BS.flatten()]
        probability = tokens.softmax(dim=1)
        top = probability.topk(8, dim=1).indices
        for expert in range(64):
            expected += 64 * float((top == expert).sum() / top.numel()) * float(probability[:, expert].mean()) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert loss.requires_grad
    assert float(balance.loss(output.routing.load_NE, batch.inputs.live_BS)) == 0.0


def test_a_run_learns_and_exports_a_model_that_decodes(tmp_path: Path) -> None:
    settings = TrainingConfig(steps=12, samples_per_step=8, dtype="float32", warmup_steps=3, checkpoint_every=12)
    paths, problems = run_folder(tmp_path / "run"), TaskProblems(0)
    trainer = prepare(paths, settings, problems, family="llada_moe", hidden=64, layers=2, expert_hidden=8, resume=False)
    losses: list[float] = []
    folder = run(trainer, paths, problems, resume=False, on_step=lambda result: losses.append(result.loss))
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    loaded = load_model(folder)
    assert (loaded.config.attention, loaded.config.router.activation) == ("full", "softmax")
    assert loaded.config.num_dense_layers == 0
    options = DecodingOptions(gen_length=32, steps_per_block=4)
    runtime = Runtime(policy=parse_policy("des-vote:budget=16"))
    assert generate(loaded.model, runtime, options, [[5, 6, 7]]).rows[0].finish_reason in ("eos", "length")


def test_another_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="llada2_moe, llada_moe"):
        reference_architecture(family="mixtral", vocab_size=64, mask_id=0, eos_id=1, pad_id=2)
