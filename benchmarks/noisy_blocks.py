"""Half-masked answer blocks behind clean text, and what routes them: shared by the measurements of single blocks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from unseen_prompts import unseen_prompts

from expertshare.config import ModelConfig, RouterSpec
from expertshare.decoding import DecodingOptions
from expertshare.evaluation.runner import Setup, answer_prompts, encode_prompts
from expertshare.evaluation.scoring import judge
from expertshare.kernels import TorchBackend
from expertshare.models import LoadedModel, Runtime
from expertshare.models.runtime import ForwardInput
from expertshare.routing import Layerwise, RoutingPolicy, everything, make_policy
from expertshare.routing.assign import weighted_plan
from expertshare.types import Coreset, RouterScores, RoutingPlan

VANILLA = make_policy("vanilla")


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisyBlock:
    """Clean blocks and then the block in question. tokens_S: int64, masks in the last block; clean_S: int64; loss_S:
    bool, the masked positions of the answer and its end."""

    tokens_S: Tensor
    clean_S: Tensor
    loss_S: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Bans(RoutingPolicy):
    """Vanilla routing, but for experts that single groups may not use. banned_GE: bool, None for no ban.

    replace: whether tokens take their next expert instead, or make do with the others. plans: where each forward's
    scores and its plan under vanilla are put, one pair per call.
    """

    name: ClassVar[str] = "bans"
    banned_GE: Tensor | None = None
    replace: bool = True
    plans: list[tuple[RouterScores, RoutingPlan]] = field(default_factory=list)

    def select(self, scores: RouterScores, spec: RouterSpec, previous: Coreset | None = None) -> Coreset:
        del previous
        full = everything(scores)
        self.plans.append((scores, VANILLA.assign(scores, full, spec)))
        if self.banned_GE is None or not self.replace:
            return full
        return Coreset(full.member_GE & ~self.banned_GE)

    def assign(
        self, scores: RouterScores, coreset: Coreset, spec: RouterSpec, expert_scale_E: Tensor | None = None
    ) -> RoutingPlan:
        plan = VANILLA.assign(scores, coreset, spec, expert_scale_E)
        if self.banned_GE is None or self.replace:
            return plan
        ids_TK = plan.expert_ids_TK
        tokens_per_group = len(ids_TK) // len(self.banned_GE)
        banned_TK = self.banned_GE.repeat_interleave(tokens_per_group, dim=0).gather(1, ids_TK.clamp_min(0))
        affinity_TK = scores.affinity_GLE.flatten(0, 1).gather(-1, ids_TK.clamp_min(0))
        return weighted_plan(ids_TK, affinity_TK, (ids_TK >= 0) & ~banned_TK, spec, expert_scale_E)


def read_options(about: str) -> argparse.Namespace:
    """The command line of a measurement of single blocks."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=60, help="prompts of each task; right answers are used")
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def chosen_blocks(loaded: LoadedModel, options: argparse.Namespace) -> Iterator[NoisyBlock]:
    """So many of the model's right answers, drawn by seed, each with its masks. A block whose answer got no mask is
    left out, so that there can be fewer than --blocks."""
    answers = right_answers(loaded, options.count, options.seed)
    order = np.random.default_rng(options.seed).permutation(len(answers))[: options.blocks]
    generator = torch.Generator().manual_seed(options.seed)
    return noisy_blocks([answers[i] for i in order], loaded.config, generator)


def right_answers(loaded: LoadedModel, count: int, seed: int) -> list[tuple[list[int], tuple[int, ...]]]:
    """Prompts of the test split (`count` of each task) as token ids, with the model's own answers where these are
    right, under vanilla routing."""
    records = unseen_prompts(count, seed)
    prompts = encode_prompts(loaded, [record.prompt for record in records], None)
    run = answer_prompts(loaded, prompts, VANILLA, DecodingOptions(gen_length=64), setup=Setup(batch_size=64))
    right = judge(records, [answer.text for answer in run.answers])
    return [(p, a.token_ids) for p, a, good in zip(prompts, run.answers, right, strict=True) if good]


def noisy_blocks(
    answers: Sequence[tuple[list[int], tuple[int, ...]]], config: ModelConfig, generator: torch.Generator
) -> Iterator[NoisyBlock]:
    """The first block of each answer, 30 to 80 % of its answer positions masked, as in training."""
    length, eos = config.block_length, config.eos_ids[0]
    for prompt, answer in answers:
        start = len(prompt) // length * length
        text = [*prompt, *answer, eos]
        size = start + length
        clean = torch.tensor((text + [eos] * size)[:size])
        place = torch.arange(size)
        share = 0.3 + 0.5 * torch.rand((), generator=generator)
        masked = (place >= len(prompt)) & (torch.rand(size, generator=generator) < share)
        loss = masked & (place < len(text))
        if loss.any():
            yield NoisyBlock(tokens_S=clean.masked_fill(masked, config.mask_id), clean_S=clean, loss_S=loss)


def forward(loaded: LoadedModel, block: NoisyBlock, policies: Sequence[Bans], copies: int) -> Tensor:
    """Losses of `copies` equal rows, float32 [copies]: mean cross-entropy over the block's masked answer positions.

    policies: one for each MoE layer; groups are counted row by row, the block in question is the last of its row.
    """
    size, length = len(block.tokens_S), loaded.config.block_length
    number_S = torch.arange(size) // length
    inputs = ForwardInput(
        tokens_BS=block.tokens_S.expand(copies, -1).contiguous(),
        positions_BS=torch.arange(size).expand(copies, -1).contiguous(),
        live_BS=torch.ones(copies, size, dtype=torch.bool),
        mask_BSP=(number_S[:, None] >= number_S[None, :]).expand(copies, -1, -1),
        block_length=length,
    )
    runtime = Runtime(policy=Layerwise(layers=tuple(policies)), backend=TorchBackend())
    with torch.no_grad():
        output = loaded.model(inputs, runtime)
        hidden_RCD = output.hidden_BSD[:, block.loss_S]
        logits_RCV = loaded.model.logits(hidden_RCD.flatten(0, 1), backend=TorchBackend()).float()
    targets_RC = block.clean_S[block.loss_S].repeat(copies)
    losses = torch.nn.functional.cross_entropy(logits_RCV, targets_RC, reduction="none")
    return losses.view(copies, -1).mean(dim=1)
