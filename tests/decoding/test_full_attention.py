"""Full-attention decoding (LLaDA-MoE) against plain loops. For ties and noise see test_block_causal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expertshare.config import ModelConfig
from expertshare.decoding import BlockDecoder, DecodingOptions, generate
from expertshare.models.runtime import ForwardInput, Runtime
from expertshare.models.transformer import MoETransformer

MASK = 63
MakeModel = Callable[..., MoETransformer]
MakeRuntime = Callable[..., Runtime]


def prompt_of(length: int) -> list[int]:
    """Random text."""
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def canvas_logits(model: MoETransformer, runtime: Runtime, tokens: list[int], padding: int, size: int) -> Tensor:
    """Logits of the whole canvas behind `padding` dead positions; every position attends to every live
    one."""
    live = torch.tensor([[False] * padding + [True] * len(tokens)])
    length = live.shape[1]
    inputs = ForwardInput(
        tokens_BS=torch.tensor([[0] * padding + tokens]),
        positions_BS=torch.tensor([[0] * padding + list(range(len(tokens)))]),
        live_BS=live,
        mask_BSP=live.unsqueeze(1).expand(-1, length, -1),
        block_length=size,
        masked_BS=torch.tensor([[False] * padding + [token == MASK for token in tokens]]),
    )
    with torch.no_grad():
        return model.logits(model(inputs, runtime).hidden_BSD[0, padding:])


def decode_plainly(
    model: MoETransformer, runtime: Runtime, options: DecodingOptions, prompt: list[int], *, pad: bool
) -> tuple[list[int], float]:
    """One prompt at temperature 0; block after block from the prompt's end, position by position."""
    runtime = replace(runtime, policy=runtime.policy.bind(model.config.router))
    size, start = 8, len(prompt)
    padding = -start % size if pad else 0
    tokens, margin = prompt + [MASK] * options.gen_length, float("inf")
    steps = options.steps_per_block or size
    for first in range(start, start + options.gen_length, size):
        here = range(first, first + size)
        step = 0
        while any(tokens[p] == MASK for p in here):
            logits = canvas_logits(model, runtime, tokens, padding, size if pad else len(tokens))
            logits[:, MASK] = -float("inf")
            masked = [p for p in here if tokens[p] == MASK]
            best = logits.argmax(dim=-1)
            sure = logits.softmax(dim=-1).amax(dim=-1)
            two = logits[masked].topk(2).values
            margin = min(margin, float((two[:, 0] - two[:, 1]).min()))
            due = size // steps + (step < size % steps)
            write = sorted(masked, key=lambda p: (-float(sure[p]), p))[:due]
            if options.threshold is not None:
                above = [p for p in masked if sure[p] > options.threshold]
                write = above if len(above) >= due else write
            for p in write:
                tokens[p] = int(best[p])
            step += 1
    return tokens[start:], margin


@pytest.mark.parametrize("length", [5, 8, 11])
@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(gen_length=16, threshold=None, steps_per_block=3),
        DecodingOptions(gen_length=16, threshold=None),
        DecodingOptions(gen_length=16, threshold=0.3),
    ],
    ids=["three-steps", "one-by-one", "threshold"],
)
@pytest.mark.parametrize(
    ("policy", "pad"),
    [("vanilla", False), ("vanilla", True), ("des-vote:budget=6", True), ("des-vote:budget=6,voters=masked", True)],
)
def test_equals_the_plain_loop(
    full_config: ModelConfig,
    make_model: MakeModel,
    runtime: MakeRuntime,
    length: int,
    options: DecodingOptions,
    policy: str,
    pad: bool,
) -> None:
    """Under vanilla the plain loop has neither padding nor blocks of experts: alignment changes nothing."""
    model = make_model(replace(full_config, eos_ids=()))
    answer, margin = decode_plainly(model, runtime(policy), options, prompt_of(length), pad=pad)
    assert margin > 3e-5
    result = generate(model, runtime(policy), options, [prompt_of(length)])
    assert list(result.rows[0].token_ids) == answer
    assert result.rows[0].finish_reason == "length"
    assert result.cost.forwards == {"prefill": 0, "denoise": result.rows[0].steps, "commit": 0}


@pytest.mark.parametrize("policy", ["vanilla", "des-vote:budget=6", "block-top-p"])
@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(gen_length=16, threshold=0.3),
        DecodingOptions(gen_length=16, threshold=None, steps_per_block=2, remasking="random"),
        DecodingOptions(gen_length=16, threshold=None, steps_per_block=4, temperature=1.0),
    ],
    ids=["threshold", "random", "gumbel"],
)
def test_batch_equals_single(
    full_config: ModelConfig,
    make_model: MakeModel,
    runtime: MakeRuntime,
    policy: str,
    options: DecodingOptions,
) -> None:
    """Ragged prompts, rows that end at different times, one seed per row."""
    model = make_model(replace(full_config, eos_ids=tuple(range(50, 63))), seed=4)
    prompts, seeds = [prompt_of(length) for length in (2, 8, 13, 21)], [4, 5, 6, 7]
    together = generate(model, runtime(policy), options, prompts, seeds)
    for row, prompt, seed in zip(together.rows, prompts, seeds, strict=True):
        assert row == generate(model, runtime(policy), options, [prompt], [seed]).rows[0]


def test_rows_end_at_different_times(full_config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime) -> None:
    """All live groups are counted, prompt and later blocks included, and only of rows that still decode."""
    model = make_model(replace(full_config, eos_ids=tuple(range(50, 63))), seed=4)
    lengths = (2, 8, 13, 21)
    prompts = [prompt_of(length) for length in lengths]
    result = generate(model, runtime(), DecodingOptions(gen_length=16, threshold=0.3), prompts)
    assert len({row.steps for row in result.rows}) > 1
    for step in result.cost.steps:
        assert step.groups == sum(-(-lengths[turn.row] // 8) + 2 for turn in step.turns)
        positions = sum(lengths[turn.row] + 16 for turn in step.turns)
        assert step.pairs == (positions * 4,) * 3


@pytest.mark.parametrize(("steps", "masks"), [(2, [16, 12, 8, 4]), (8, list(range(16, 0, -1)))])
def test_random_remasking_writes_exactly_the_share(
    full_config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime, steps: int, masks: list[int]
) -> None:
    """n tokens per step, first block before second, places by the seed."""
    model = make_model(replace(full_config, eos_ids=()))
    options = DecodingOptions(gen_length=16, threshold=None, steps_per_block=steps, remasking="random")
    stream = BlockDecoder(model, runtime(), options).blocks([prompt_of(8)])
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].tokens_BS[0].tolist()))
    list(stream)
    assert [tokens.count(MASK) for tokens in seen] == masks
    assert all(MASK not in tokens[8:16] or tokens[16:].count(MASK) == 8 for tokens in seen)

    def places(seed: int) -> list[list[int]]:
        seen.clear()
        generate(model, runtime(), replace(options, seed=seed), [prompt_of(8)])
        return [[p for p, token in enumerate(tokens) if token == MASK] for tokens in seen]

    assert places(1) == places(1)
    assert places(1) != places(2)


def test_eos_stops_the_row(full_config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime) -> None:
    """An answer that ends in its first block leaves the others undecoded; the text is that of the full
    run."""
    model = make_model(replace(full_config, eos_ids=tuple(range(40, 63))), seed=4)
    options = DecodingOptions(gen_length=32, threshold=None)
    stopped = generate(model, runtime(), options, [prompt_of(5)]).rows[0]
    whole = generate(model, runtime(), replace(options, stop_at_eos=False), [prompt_of(5)]).rows[0]
    assert stopped.finish_reason == "eos"
    assert stopped.token_ids == whole.token_ids
    assert stopped.steps < whole.steps == 32


def test_padding_is_dead_and_positions_start_at_the_prompt(
    full_config: ModelConfig, make_model: MakeModel, runtime: MakeRuntime
) -> None:
    """Five prompt tokens behind three dead positions; a shorter row is also dead behind its answer."""
    model = make_model(replace(full_config, eos_ids=()))
    seen: list[ForwardInput] = []
    model.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    generate(model, runtime(), DecodingOptions(gen_length=8), [prompt_of(5), prompt_of(17)])
    first = seen[0]
    assert first.positions_BS[0, :16].tolist() == [0, 0, 0, *range(13)]
    assert first.live_BS[0].tolist() == [False] * 3 + [True] * 13 + [False] * 16
    assert first.positions_BS[1].tolist() == [0] * 7 + list(range(25))
    assert torch.equal(first.mask_BSP, first.live_BS.unsqueeze(1).expand(-1, 32, -1))
