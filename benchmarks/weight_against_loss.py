"""Does the router's weight of an expert say what its loss would cost? Knocks out one expert at a time.

    python benchmarks/weight_against_loss.py models/reference --count 60 --blocks 200 --seed 2026 \
        --json benchmarks/results/weight-against-loss.json

For the first block of each right answer of the model itself, 30 to 80 % of the answer masked, every expert that the
block uses in a MoE layer is taken out of that layer for that block alone, in two ways. "replaced": its tokens take
their next expert, which is what a coreset does; "dropped": they run one expert less. Weights are normalised either
way.

Loss: mean cross-entropy over the masked positions of the answer. Weight: sum over the block's tokens of the weight
that the expert has under vanilla routing, as a share of the layer's sum; also the largest of these weights, and the
number of tokens that use it. Pearson's r over all (block, layer, expert), its interval by a bootstrap over blocks;
and over (layer, expert), with weight and loss added up over all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from noisy_blocks import Bans, NoisyBlock, chosen_blocks, forward, read_options
from scipy.stats import pearsonr, spearmanr

from expertshare.api import load
from expertshare.measure.report import Report, capture_environment
from expertshare.models import LoadedModel

RESAMPLES, SHOWN = 2000, 400
STATISTICS = ("sum", "max", "tokens")


def weights_by_expert(loaded: LoadedModel, block: NoisyBlock) -> np.ndarray:
    """Under vanilla routing, for the block in question: [layer, expert, statistic], shares of the layer's sum."""
    layers = [Bans() for _ in range(loaded.config.num_moe_layers)]
    forward(loaded, block, layers, 1)
    length, num_experts = loaded.config.block_length, loaded.config.router.num_experts
    found = np.zeros((len(layers), num_experts, len(STATISTICS)))
    for number, layer in enumerate(layers):
        _, plan = layer.plans[0]
        ids, weights = plan.expert_ids_TK[-length:].numpy(), plan.weights_TK[-length:].double().numpy()
        np.add.at(found[number, :, 0], ids, weights)
        np.maximum.at(found[number, :, 1], ids, weights)
        np.add.at(found[number, :, 2], ids, 1.0)
    return found / found.sum(axis=1, keepdims=True)


def loss_increases(loaded: LoadedModel, block: NoisyBlock, used_NE: np.ndarray, *, replace: bool) -> np.ndarray:
    """Loss without an expert minus loss with all of them, for every used one: in the order of np.argwhere."""
    banned = np.argwhere(used_NE)
    groups_per_row = len(block.tokens_S) // loaded.config.block_length
    copies = 1 + len(banned)
    masks = torch.zeros(len(used_NE), copies * groups_per_row, used_NE.shape[1], dtype=torch.bool)
    for row, (layer, expert) in enumerate(banned, 1):
        masks[layer, (row + 1) * groups_per_row - 1, expert] = True
    losses = forward(loaded, block, [Bans(banned_GE=mask, replace=replace) for mask in masks], copies).double().numpy()
    return losses[1:] - losses[0]


def interval(block_N: np.ndarray, x_N: np.ndarray, y_N: np.ndarray, seed: int) -> list[float]:
    """95 % of r over resamples of whole blocks, from each block's moments."""
    parts = [
        np.array([len(m), x_N[m].sum(), y_N[m].sum(), (x_N[m] ** 2).sum(), (y_N[m] ** 2).sum(), x_N[m] @ y_N[m]])
        for m in (np.flatnonzero(block_N == b) for b in np.unique(block_N))
    ]
    draws = np.random.default_rng(seed).integers(len(parts), size=(RESAMPLES, len(parts)))
    n, x, y, xx, yy, xy = np.stack(parts)[draws].sum(axis=1).T
    r = (xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n))
    return [float(v) for v in np.quantile(r, (0.025, 0.975))]


def by_expert(place_N2: np.ndarray, x_N: np.ndarray, y_N: np.ndarray) -> float:
    """r over (layer, expert), of the sums of both over all blocks."""
    _, number_N = np.unique(place_N2, axis=0, return_inverse=True)
    return float(pearsonr(np.bincount(number_N, x_N), np.bincount(number_N, y_N)).statistic)


def summary(rows: np.ndarray, names: Sequence[str], seed: int) -> dict[str, Any]:
    """rows: block, layer, expert, loss increase, and a column for each name."""
    block_N, layer_N, increase_N = rows[:, 0], rows[:, 1], rows[:, 3]
    found: dict[str, Any] = {"points": len(rows), "blocks": len(np.unique(block_N)), "weights": {}}
    for column, name in enumerate(names, 4):
        x_N = rows[:, column]
        found["weights"][name] = {
            "pearson_r": float(pearsonr(x_N, increase_N).statistic),
            "pearson_r_interval": interval(block_N, x_N, increase_N, seed),
            "spearman_r": float(spearmanr(x_N, increase_N).statistic),
            "pearson_r_by_expert": by_expert(rows[:, 1:3], x_N, increase_N),
            "pearson_r_by_layer": [
                float(pearsonr(x_N[layer_N == n], increase_N[layer_N == n]).statistic) for n in np.unique(layer_N)
            ],
        }
    shown = np.random.default_rng(seed).permutation(len(rows))[:SHOWN]
    found["sample"] = [[int(rows[i, 1]), round(float(rows[i, 4]), 5), round(float(rows[i, 3]), 5)] for i in shown]
    found["mean_increase"] = float(increase_N.mean())
    edges = np.quantile(rows[:, 4], np.linspace(0, 1, 11))
    tenth = np.clip(np.searchsorted(edges, rows[:, 4], side="right") - 1, 0, 9)
    found["tenths"] = [
        {"weight": float(rows[tenth == t, 4].mean()), "increase": float(increase_N[tenth == t].mean())}
        for t in range(10)
    ]
    return found


def main() -> None:
    """Knock out, correlate, write."""
    given = read_options(__doc__ or "")
    loaded, environment = load(given.model, dtype="float32"), capture_environment()
    rows: dict[str, list[list[float]]] = {"replaced": [], "dropped": []}
    for number, block in enumerate(chosen_blocks(loaded, given)):
        weights = weights_by_expert(loaded, block)
        used = weights[:, :, 0] > 0
        for way, found in rows.items():
            increases = loss_increases(loaded, block, used, replace=way == "replaced")
            found += [
                [number, layer, expert, increase, *weights[layer, expert]]
                for (layer, expert), increase in zip(np.argwhere(used), increases, strict=True)
            ]
    results = {way: summary(np.array(found), STATISTICS, given.seed) for way, found in rows.items()}
    Report(
        command="weight-against-loss",
        environment=environment,
        seeds={"prompts": given.seed, "masks": given.seed, "bootstrap": given.seed},
        config={"model": given.model, "dtype": "float32", "count": given.count, "blocks": given.blocks},
        results=results,
    ).write(given.json)
    named = [(f"{way}, {name}", v) for way, found in results.items() for name, v in found["weights"].items()]
    for name, value in named:
        low, high = value["pearson_r_interval"]
        print(f"{name}: r {value['pearson_r']:.3f} [{low:.3f}, {high:.3f}], Spearman's {value['spearman_r']:.3f}")


if __name__ == "__main__":
    main()
