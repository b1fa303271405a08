"""Cached decoding with real (tiny, random, float32) models against a decoder that caches nothing.

Cached and uncached forwards, and batches of different sizes, multiply matrices of different shapes, and
float32 results may then differ in the last bits. The models here are far from ties, and each comparison first
asserts that the two best logits of every decision are further apart than that noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import backend_named
from expertshare import native
from expertshare.config import ModelConfig
from expertshare.decoding import BlockDecoder, DecodingOptions, generate
from expertshare.decoding.forwards import BlockCausal, Forwards, block_causal_mask
from expertshare.decoding.row import Row, Window
from expertshare.models.runtime import ForwardInput, Runtime
from expertshare.models.transformer import MoETransformer

NOISE = 3e-5  # four times the largest difference seen between cached and uncached logits
POLICIES = [
    "vanilla",
    "des-vote:budget=8",
    "des-vote:budget=8,voters=masked",
    "des-seq",
    "block-top-p",
    "block-max:budget=6",
    "top-k-cap",
    "skip",
]
RULES = {
    "threshold": DecodingOptions(gen_length=19, threshold=0.6),
    "one-by-one": DecodingOptions(gen_length=19),
    "schedule": DecodingOptions(gen_length=16, threshold=None, steps_per_block=3),
    "editing": DecodingOptions(gen_length=16, threshold=0.5, editing_threshold=0.2, max_post_steps=4),
    "full-editing": DecodingOptions(gen_length=16, threshold=0.7, editing_threshold=0.0, max_post_steps=2),
    "sdar": DecodingOptions(gen_length=14, block_length=4, threshold=0.9),
    "minimal-top-k": DecodingOptions(gen_length=12, minimal_top_k=3, threshold=0.9),
}
MakeModel = Callable[..., MoETransformer]
MakeRuntime = Callable[..., Runtime]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random text."""
    generator = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(0, 60, (length,), generator=generator).tolist()


@dataclass
class Watched:
    """Forwards that remember the first row's block before every denoising step."""

    inner: Forwards
    before: list[list[int]] = field(default_factory=list)

    def prefill(self, rows: Sequence[Row]) -> None:
        self.inner.prefill(rows)

    def denoise(self, rows: Sequence[Row], window: Window) -> Tensor:
        self.before.append(window.tokens_RL[0].tolist())
        return self.inner.denoise(rows, window)

    def commit(self, rows: Sequence[Row]) -> None:
        self.inner.commit(rows)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", RULES)
def test_cached_equals_uncached_at_every_step(
    config: ModelConfig,
    make_model: MakeModel,
    runtime: MakeRuntime,
    uncached: Callable[..., Any],
    policy: str,
    rule: str,
) -> None:
    """Token for token, before every forward and in the answer; 13 prompt tokens: one full block and a
    part."""
    model, prompt = make_model(config, seed=2), prompt_of(13)
    plain = uncached(model, runtime(policy), RULES[rule], prompt)
    assert plain.margin > NOISE
    stream = BlockDecoder(model, runtime(policy), RULES[rule]).blocks([prompt])
    watched = Watched(stream.forwards)
    stream.forwards = watched
    answer = [token for block in stream for token in block.token_ids]
    assert watched.before == plain.before
    assert answer == plain.answer


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 24])
def test_prompt_lengths_around_block_borders(
    config: ModelConfig,
    make_model: MakeModel,
    runtime: MakeRuntime,
    uncached: Callable[..., Any],
    length: int,
) -> None:
    """No full prompt block, a partial one, none partial."""
    model, options = make_model(config, seed=1), DecodingOptions(gen_length=13, threshold=0.6)
    plain = uncached(model, runtime(), options, prompt_of(length))
    assert plain.margin > NOISE
    result = generate(model, runtime(), options, [prompt_of(length)])
    assert list(result.rows[0].token_ids) == plain.answer
    assert result.rows[0].finish_reason == ("length" if len(plain.answer) == 13 else "eos")


@pytest.mark.parametrize("rule", ["threshold", "full-editing"])
def test_cache_holds_keys_and_values_of_final_tokens(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime, rule: str
) -> None:
    """The commit forward: what is cached equals one fresh forward over the finished text, and not the last
    denoising step's view. With full editing the block stops on its budget of post steps, having just been
    edited."""
    model, prompt = make_model(replace(config, eos_ids=())), prompt_of(11)
    decoder = BlockDecoder(model, runtime("des-vote:budget=8"), RULES[rule])
    stream = decoder.blocks([prompt])
    steps = [block.steps for block in stream]
    finished = 24  # of 27 or 30 positions: all blocks but the last
    tokens_BS = stream.rows[0].tokens_C[:finished].unsqueeze(0)
    block_S = torch.arange(finished) // 8
    inputs = ForwardInput(
        tokens_BS=tokens_BS,
        positions_BS=torch.arange(finished).unsqueeze(0),
        live_BS=torch.ones_like(tokens_BS, dtype=torch.bool),
        mask_BSP=(block_S.unsqueeze(1) >= block_S).unsqueeze(0),
        block_length=8,
    )
    with torch.no_grad():
        fresh = model(inputs, decoder.runtime).key_values
    assert isinstance(stream.forwards, BlockCausal)
    for cached, expected in zip(stream.forwards.cache.layers, fresh, strict=True):
        assert torch.allclose(cached.keys_BHSD[:, :, :finished], expected.keys_BHSD, atol=1e-4)
        assert torch.allclose(cached.values_BHSD[:, :, :finished], expected.values_BHSD, atol=1e-4)
        assert cached.keys_BHSD.shape[2] == finished + 8  # allocated once, the last block included
    assert all(step >= 1 for step in steps)


@pytest.mark.parametrize("backend", ["torch", *(["cpu"] if native.available() else [])])
def test_block_causal_attention_is_a_plain_masked_softmax(
    config: ModelConfig, make_model: MakeModel, backend: str
) -> None:
    """One attention layer under the decoder's mask against a softmax over explicitly listed keys."""
    layers: Any = make_model(config).layers
    attention, oracle = layers[0].attention, backend_named("torch")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, 32, generator=generator)
    tables = (torch.ones(1, 1, 12, 4), torch.zeros(1, 1, 12, 4))
    live = torch.tensor([[True] * 8 + [False] * 4])
    with torch.no_grad():
        got, _ = attention(x, tables, block_causal_mask(live, 4), None, backend=backend_named(backend))
        q, k, v = attention.qkv(x)[0].split((32, 16, 16), dim=-1)
        for query in range(8):
            keys = range((query // 4 + 1) * 4)
            heads = []
            for head in range(4):
                qh = attention.q_norm(q[query, head * 8 : head * 8 + 8], oracle)
                at = slice(head // 2 * 8, head // 2 * 8 + 8)
                score = (
                    torch.stack([attention.k_norm(k[key, at], backend_named("torch")) @ qh for key in keys]) / 8**0.5
                )
                heads.append(score.softmax(dim=0) @ torch.stack([v[key, at] for key in keys]))
            assert torch.allclose(got[0, query], attention.out(torch.cat(heads)), atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", ["threshold", "schedule", "editing"])
def test_batch_equals_single(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime, policy: str, rule: str
) -> None:
    """Ragged prompts: tokens, reasons and steps of each row are those it has alone. Rows end at different
    times."""
    model = make_model(replace(config, eos_ids=tuple(range(48, 63))), seed=2)
    prompts = [prompt_of(length) for length in (3, 8, 13, 24, 6)]
    together = generate(model, runtime(policy), RULES[rule], prompts)
    for row, prompt in zip(together.rows, prompts, strict=True):
        alone = generate(model, runtime(policy), RULES[rule], [prompt])
        assert row == alone.rows[0]


@pytest.mark.parametrize("policy", ["vanilla", "des-vote:budget=8"])
def test_batch_equals_single_when_sampling(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime, policy: str
) -> None:
    """Each row draws from its own seed alone."""
    model = make_model(replace(config, eos_ids=tuple(range(48, 63))), seed=3)
    options = DecodingOptions(gen_length=20, threshold=0.5, temperature=1.3, top_k=40, top_p=0.95)
    prompts, seeds = [prompt_of(length) for length in (5, 12, 17, 5)], [7, 8, 9, 10]
    together = generate(model, runtime(policy), options, prompts, seeds)
    for row, prompt, seed in zip(together.rows, prompts, seeds, strict=True):
        assert row == generate(model, runtime(policy), options, [prompt], [seed]).rows[0]
        assert row == generate(model, runtime(policy), replace(options, seed=seed), [prompt]).rows[0]
    assert together.rows[0].token_ids != together.rows[3].token_ids  # same prompt, another seed


def test_rows_finish_separately_and_then_cost_nothing(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime
) -> None:
    """Every forward lists only rows that still have work, and a row's forwards are those that list it."""
    model = make_model(replace(config, eos_ids=tuple(range(48, 63))), seed=2)
    prompts = [prompt_of(length) for length in (3, 8, 13, 24)]
    result = generate(model, runtime(), RULES["one-by-one"], prompts)
    assert len({row.forwards for row in result.rows}) > 1
    for index, row in enumerate(result.rows):
        listed = [step for step in result.cost.steps if any(turn.row == index for turn in step.turns)]
        assert len(listed) == row.forwards
        assert sum(step.kind == "denoise" for step in listed) == row.steps
        assert sum(step.kind == "commit" for step in listed) == row.blocks - 1
        assert sum(step.kind == "prefill" for step in listed) == (len(prompts[index]) >= 8)
    last = result.cost.steps[-1]
    assert len(last.turns) < len(prompts)
    assert last.groups == len(last.turns)


def test_temperature_zero_is_deterministic(config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime) -> None:
    """Same answer twice, whatever the seed."""
    model, prompts = make_model(config), [prompt_of(9), prompt_of(4)]
    options = DecodingOptions(gen_length=16, threshold=0.6)
    first = generate(model, runtime(), options, prompts)
    assert first.rows == generate(model, runtime(), replace(options, seed=99), prompts).rows


def test_sampling_repeats_with_its_seed(config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime) -> None:
    """The seed decides, and another one decides otherwise."""
    model, options = make_model(config), DecodingOptions(gen_length=16, temperature=2.0)
    answers = [generate(model, runtime(), replace(options, seed=seed), [prompt_of(9)]).rows for seed in (1, 1, 2)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_blocks_arrive_one_by_one(config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime) -> None:
    """The first block is there before the second is decoded; blocks add up to the generation."""
    model = make_model(replace(config, eos_ids=()))
    options = DecodingOptions(gen_length=20)
    stream = BlockDecoder(model, runtime(), options).blocks([prompt_of(10)])
    first = next(stream)
    assert (first.row, first.block, first.finish_reason) == (0, 0, None)
    assert len(first.token_ids) == 6  # positions 10..15: the block also holds two prompt tokens
    assert stream.cost().forwards == {"prefill": 1, "denoise": first.steps, "commit": 1}
    assert stream.generation().rows[0].finish_reason is None
    rest = list(stream)
    assert [len(block.token_ids) for block in rest] == [8, 6]
    assert [block.finish_reason for block in rest] == [None, "length"]
    whole = generate(model, runtime(), options, [prompt_of(10)])
    assert stream.generation().rows == whole.rows
    assert whole.rows[0].token_ids == sum((block.token_ids for block in (first, *rest)), ())
    assert set(whole.seconds_by_part) == {"router", "experts", "attention", "head", "other"}
    assert sum(whole.seconds_by_part.values()) == pytest.approx(whole.elapsed_s)


@pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.unavailable_reason()}")
@pytest.mark.parametrize("rule", RULES)
def test_the_native_engine_decodes_the_same(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime, uncached: Callable[..., Any], rule: str
) -> None:
    """Dense layers, experts and head by our kernels: token for token the plain decoder in torch; and in a batch."""
    model, prompts = make_model(config, seed=2), [prompt_of(length) for length in (13, 3, 24)]
    by_kernel = replace(runtime("des-vote:budget=8"), backend=backend_named("cpu"))
    together = generate(model, by_kernel, RULES[rule], prompts)
    for row, prompt in zip(together.rows, prompts, strict=True):
        plain = uncached(model, runtime("des-vote:budget=8"), RULES[rule], prompt)
        assert plain.margin > NOISE
        assert list(row.token_ids) == plain.answer
        assert row == generate(model, by_kernel, RULES[rule], [prompt]).rows[0]


@pytest.mark.parametrize("backend", ["torch", *(["cpu"] if native.available() else [])])
@pytest.mark.parametrize("editing", [None, 0.4])
def test_the_head_runs_on_positions_that_may_change_and_no_others(
    config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime, backend: str, editing: float | None
) -> None:
    """As many rows of hidden states as there are masks (with editing: as there are positions behind the prompt), in
    denoising steps only."""
    model = make_model(replace(config, eos_ids=()))
    options = DecodingOptions(gen_length=12, editing_threshold=editing)
    stream = BlockDecoder(model, replace(runtime(), backend=backend_named(backend)), options).blocks(
        [prompt_of(13), prompt_of(3)]
    )
    asked: list[int] = []
    wanted: list[int] = []
    best_tokens, denoise = model.best_tokens, stream.forwards.denoise

    def spy(hidden_RD: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        asked.append(len(hidden_RD))
        return best_tokens(hidden_RD, *arguments, **options)

    def watch(rows: Any, window: Window) -> Tensor:
        wanted.append(int((window.masked_RL if editing is None else ~window.frozen_RL).sum()))
        return denoise(rows, window)

    model.best_tokens = spy  # type: ignore[method-assign]
    stream.forwards.denoise = watch  # type: ignore[method-assign]
    for _ in stream:
        pass
    forwards = stream.cost().forwards
    assert forwards["prefill"] == 1
    assert forwards["commit"] > 0
    assert len(asked) == forwards["denoise"]
    assert asked == wanted
    assert min(asked) < max(asked)
