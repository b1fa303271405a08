"""Tiny models, a model that predicts what a test scripts, and a decoder without a cache to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from expertshare.config import ModelConfig, RouterSpec
from expertshare.decoding import DecodingOptions
from expertshare.kernels import Backend
from expertshare.kernels.torch_backend import best_of_logits
from expertshare.models.runtime import (
    ForwardInput,
    ForwardOutput,
    LayerKeyValues,
    RoutingTrace,
    Runtime,
)
from expertshare.models.transformer import MoETransformer, initialise
from expertshare.routing import parse_policy
from tiny_models import tiny_config

MASK, EOS = 63, 62


@pytest.fixture
def config() -> ModelConfig:
    """LLaDA2 layout: dense first layer, sigmoid router with a bias and groups, a shared expert, block 8."""
    return tiny_config(
        vocab_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rotary_dim=4,
        mask_id=MASK,
        eos_ids=(EOS,),
        pad_id=0,
    )


@pytest.fixture
def full_config(config: ModelConfig) -> ModelConfig:
    """LLaDA-MoE layout: experts in every layer, softmax router, full attention."""
    router = RouterSpec(num_experts=16, top_k=4, activation="softmax", renormalise=False)
    return replace(
        config,
        family="llada_moe",
        attention="full",
        num_dense_layers=0,
        shared_hidden=0,
        num_kv_heads=4,
        router=router,
    )


@pytest.fixture
def make_model() -> Callable[..., MoETransformer]:
    """A random float32 model whose predictions are far apart: weights wide enough, router biases not zero."""

    def make(config: ModelConfig, seed: int = 0) -> MoETransformer:
        model = MoETransformer(config).eval()
        initialise(model, seed=seed, std=0.25)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            model.head.weight.mul_(2.0)
            for buffer in model.buffers():
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        return model

    return make


@pytest.fixture
def runtime() -> Callable[..., Runtime]:
    """A runtime by policy text."""

    def make(policy: str = "vanilla") -> Runtime:
        return Runtime(policy=parse_policy(policy))

    return make


Script = Callable[[int, int], dict[int, float]]


class ScriptedModel(MoETransformer):
    """Predicts what `script(position, forward)` says: probabilities by token, the rest evenly over the
    others.

    `forward` counts the model's forwards of any kind from 0. seen: the tokens of each; asked: the positions
    whose logits were wanted, in order.
    """

    def __init__(self, config: ModelConfig, script: Script) -> None:
        super().__init__(config)
        initialise(self, seed=0)
        self.script = script
        self.seen: list[list[int]] = []
        self.asked: list[list[int]] = []

    def forward(
        self, inputs: ForwardInput, _runtime: Runtime, _past: Sequence[LayerKeyValues] | None = None
    ) -> ForwardOutput:
        """Hidden states that carry the position and the number of the forward."""
        batch, length = inputs.tokens_BS.shape
        hidden = torch.zeros(batch, length, self.config.hidden_size)
        hidden[..., 0] = inputs.positions_BS
        hidden[..., 1] = len(self.seen)
        self.seen.append(inputs.tokens_BS.flatten().tolist())
        keys = torch.zeros(batch, self.config.num_kv_heads, length, self.config.head_dim)
        layers, groups = self.config.num_moe_layers, batch * length // inputs.block_length
        trace = RoutingTrace(
            torch.zeros(layers, self.config.router.num_experts, dtype=torch.int64),
            torch.zeros(layers, groups, dtype=torch.int64),
        )
        return ForwardOutput(hidden, (LayerKeyValues(keys, keys),) * self.config.num_layers, trace)

    def best_tokens(self, hidden_RD: Tensor, excluded: Sequence[int], *, backend: Backend) -> tuple[Tensor, Tensor]:
        """From the script, whatever the backend."""
        return best_of_logits(self.logits(hidden_RD), excluded)

    def logits(self, hidden_RD: Tensor, *, backend: Backend | None = None) -> Tensor:
        """The script, as log probabilities."""
        rows = []
        self.asked.append(hidden_RD[:, 0].long().tolist())
        for position, forward in hidden_RD[:, :2].long().tolist():
            wanted = self.script(position, forward)
            rest = (1.0 - sum(wanted.values())) / (self.config.vocab_size - len(wanted.keys() | {MASK}))
            row = torch.full((self.config.vocab_size,), math.log(rest) if rest > 0 else -1e4)
            row[MASK] = -1e4
            for token, probability in wanted.items():
                row[token] = math.log(probability)
            rows.append(row)
        return torch.stack(rows) if rows else torch.zeros(0, self.config.vocab_size)


@pytest.fixture
def scripted(config: ModelConfig) -> Callable[[Script], ScriptedModel]:
    """A scripted model of the block-causal layout."""

    def make(script: Script) -> ScriptedModel:
        return ScriptedModel(config, script)

    return make


@dataclass
class Uncached:
    """What the plain decoder did: the answer, and the block's tokens before every denoising forward."""

    answer: list[int]
    before: list[list[int]]
    margin: float


def decode_uncached(
    model: MoETransformer, runtime: Runtime, options: DecodingOptions, prompt: Sequence[int]
) -> Uncached:
    """Block diffusion by the book for one prompt at temperature 0: every step runs the whole prefix, with a
    mask of its own, and looks at positions one by one. Keeps the smallest gap between the two best logits
    that decided."""
    config = model.config
    runtime = replace(runtime, policy=runtime.policy.bind(config.router))
    size = options.block_length or config.block_length
    steps = min(options.steps_per_block or size, options.gen_length // options.minimal_top_k)
    start, end = len(prompt), len(prompt) + options.gen_length
    num_blocks = math.ceil(end / size)
    tokens = list(prompt) + [MASK] * (num_blocks * size - start)
    undecided = [position >= start for position in range(len(tokens))]
    before, margin = [], math.inf
    for block in range(start // size, num_blocks):
        here = range(max(block * size, start), (block + 1) * size)
        step = post_steps = 0
        while True:
            began_masked = {p for p in here if undecided[p]}
            if not began_masked:
                post_steps += 1
                if options.editing_threshold is None or post_steps > options.max_post_steps:
                    break
            before.append(tokens[block * size : (block + 1) * size])
            logits = _prefix_logits(model, runtime, tokens[: (block + 1) * size], undecided, size)
            logits[:, MASK] = -math.inf
            probabilities = logits.softmax(dim=-1)
            best = {p: int(logits[p].argmax()) for p in here}
            sure = {p: float(probabilities[p, best[p]]) for p in here}
            decisive = list(here) if options.editing_threshold is not None else sorted(began_masked)
            top_two = logits[decisive].topk(2).values
            margin = min(margin, float((top_two[:, 0] - top_two[:, 1]).min()))
            share = max(1, size // steps + (step < size % steps))
            if options.editing_threshold is not None and options.threshold is not None:
                share = 1
            ranked = sorted(began_masked, key=lambda p: (-sure[p], p))
            write = set(ranked[:share])
            if options.threshold is not None:
                above = {p for p in began_masked if sure[p] > options.threshold}
                write = above if len(above) >= share else write
            edits = set()
            if options.editing_threshold is not None:
                edits = {
                    p for p in set(here) - began_masked if best[p] != tokens[p] and sure[p] > options.editing_threshold
                }
            for p in write | edits:
                tokens[p], undecided[p] = best[p], False
            step += 1
            if not began_masked and not edits:
                break
            eos = [p for p in here if p < end and not undecided[p] and tokens[p] in config.eos_ids]
            if options.editing_threshold is None and eos and not any(undecided[p] for p in here if p < eos[0]):
                return Uncached(tokens[start : eos[0]], before, margin)
        eos = [p for p in here if p < end and tokens[p] in config.eos_ids]
        if eos:
            return Uncached(tokens[start : eos[0]], before, margin)
    return Uncached(tokens[start:end], before, margin)


def _prefix_logits(
    model: MoETransformer, runtime: Runtime, tokens: list[int], undecided: list[bool], size: int
) -> Tensor:
    length = len(tokens)
    mask = torch.zeros(1, length, length, dtype=torch.bool)
    for query in range(length):
        mask[0, query, : (query // size + 1) * size] = True
    inputs = ForwardInput(
        tokens_BS=torch.tensor([tokens]),
        positions_BS=torch.arange(length).unsqueeze(0),
        live_BS=torch.ones(1, length, dtype=torch.bool),
        mask_BSP=mask,
        block_length=size,
        masked_BS=torch.tensor([undecided[:length]]),
    )
    with torch.no_grad():
        return model.logits(model(inputs, runtime).hidden_BSD[0])


@pytest.fixture
def uncached() -> Callable[..., Uncached]:
    """The decoder without a cache."""
    return decode_uncached
