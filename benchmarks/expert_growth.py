"""How the union of experts grows with the tokens of a block, and how many products a byte of weights then serves.

    python benchmarks/expert_growth.py models/reference --count 60 --blocks 200 --seed 2026 \
        --json benchmarks/results/expert-growth.json

Of half-masked answer blocks under vanilla routing: unique experts of the first t tokens, mean over blocks and layers.
`independent` is what tokens that choose alike and independently would use, E (1 - (1 - K / E)^t). Products per byte:
multiply-accumulates of the experts by the bytes of their weights, for the MoE layer and for a dense layer of the same
products per token. `exponent`: slope of log unique against log tokens, 1 is linear, 0 is flat.

The same blocks check that DES-Seq's coreset, computed for all groups at once, is the union of each token's few best
experts, found token by token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from noisy_blocks import Bans, chosen_blocks, forward, read_options

from expertshare.api import load
from expertshare.config import RouterSpec
from expertshare.measure.report import Report, capture_environment
from expertshare.routing import make_policy
from expertshare.types import RouterScores

TOKENS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32)


def unions(ids_LK: np.ndarray) -> list[int]:
    """Unique experts of the first t tokens, for every t of TOKENS."""
    return [len(np.unique(ids_LK[:tokens])) for tokens in TOKENS]


def differs_from_union(scores: RouterScores, spec: RouterSpec, experts_per_vote: int) -> tuple[int, int]:
    """Groups whose union is larger than the least coreset, and those among them whose coreset is another set."""
    policy = make_policy("des-seq", {"experts_per_vote": experts_per_vote}).bind(spec)
    member_GE = policy.select(scores, spec).member_GE
    checked = differing = 0
    for member_E, choice_LE in zip(member_GE, scores.choice_GLE, strict=True):
        union: set[int] = set()
        for choice_E in choice_LE.tolist():
            union |= set(sorted(range(len(choice_E)), key=lambda e, c=choice_E: (-c[e], e))[:experts_per_vote])
        if len(union) >= spec.min_coreset_size(policy.group_limit):
            checked += 1
            differing += set(torch.nonzero(member_E).flatten().tolist()) != union
    return checked, differing


def main() -> None:
    """Route, count, write."""
    given = read_options(__doc__ or "")
    loaded, environment = load(given.model, dtype="float32"), capture_environment()
    config, spec = loaded.config, loaded.config.router
    found, checks = [], []
    for block in chosen_blocks(loaded, given):
        layers = [Bans() for _ in range(config.num_moe_layers)]
        forward(loaded, block, layers, 1)
        for layer in layers:
            scores, plan = layer.plans[0]
            found.append(unions(plan.expert_ids_TK[-config.block_length :].numpy()))
            checks += [differs_from_union(scores, spec, number) for number in (2, 3)]
    Report(
        command="expert-growth",
        environment=environment,
        seeds={"prompts": given.seed, "masks": given.seed},
        config={"model": given.model, "dtype": "float32", "count": given.count, "blocks": given.blocks},
        results=results(np.array(found, dtype=float).mean(axis=0), len(found) // config.num_moe_layers, spec, checks),
    ).write(given.json)


def results(unique_T: np.ndarray, blocks: int, spec: RouterSpec, checks: list[tuple[int, int]]) -> dict[str, Any]:
    """Plain values; bytes are those of bfloat16 weights, 2 each."""
    tokens_T = np.array(TOKENS, dtype=float)
    chance = 1 - spec.top_k / spec.num_experts
    exponent, _ = np.polyfit(np.log(tokens_T), np.log(unique_T), 1)
    line = np.polyfit(tokens_T, unique_T, 1)
    residual = ((unique_T - np.polyval(line, tokens_T)) ** 2).sum() / ((unique_T - unique_T.mean()) ** 2).sum()
    points = [
        {
            "tokens": int(tokens),
            "unique_experts": float(unique),
            "independent": float(spec.num_experts * (1 - chance**tokens)),
            "macs_per_byte": float(tokens * spec.top_k / (2 * unique)),
            "dense_macs_per_byte": float(tokens / 2),
        }
        for tokens, unique in zip(tokens_T, unique_T, strict=True)
    ]
    print(*points, f"exponent {exponent:.3f}, linear R^2 {1 - residual:.3f}", sep="\n")
    return {
        "num_experts": spec.num_experts,
        "experts_per_token": spec.top_k,
        "blocks": blocks,
        "points": points,
        "exponent": float(exponent),
        "linear_r_squared": float(1 - residual),
        "des_seq_union": {"groups": sum(c for c, _ in checks), "differing": sum(d for _, d in checks)},
    }


if __name__ == "__main__":
    main()
