"""What one denoising forward must cost at least: its operations one after the other, each at its own bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertshare.config import ModelConfig
from expertshare.lab.bench.bound import Work, expert_work
from expertshare.lab.bench.machine import Peaks


def forward_work(
    config: ModelConfig, *, tokens: int, seen: int, masked: int, unique_by_layer: Sequence[float], itemsize: int
) -> dict[str, list[Work]]:
    """Operations of a forward of one block by part, as `ms_by_part` names them.

    tokens: of the block; seen: cached positions and its own; masked: rows of the head. unique_by_layer: experts of each
    MoE layer. itemsize: bytes of a weight and of an activation. Norms, rotation and residuals are left out, and the
    embedding: thousandths of the rest.
    """

    def projection(num_rows: int, depth: int, rows: int = tokens) -> Work:
        moved = num_rows * depth + rows * (depth + num_rows)
        return Work(num_bytes=moved * itemsize, num_macs=rows * num_rows * depth)

    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    kept = 2 * config.num_kv_heads * config.head_dim  # features of a position's keys and values
    attention = [
        projection(width + kept, hidden),
        Work(num_bytes=seen * kept * itemsize, num_macs=2 * tokens * seen * width),
        projection(hidden, width),
    ]
    experts: list[Work] = []
    for unique in unique_by_layer:
        of_pairs = {"tokens": tokens, "hidden": hidden, "itemsize": itemsize}
        experts.append(
            expert_work(**of_pairs, top_k=config.router.top_k, unique=round(unique), inner=config.expert_hidden)
        )
        if config.shared_hidden:
            experts.append(expert_work(**of_pairs, top_k=1, unique=1, inner=config.shared_hidden))
    dense = expert_work(tokens=tokens, top_k=1, unique=1, hidden=hidden, inner=config.dense_hidden, itemsize=itemsize)
    return {
        "router": [projection(config.router.num_experts, hidden)] * config.num_moe_layers,
        "experts": experts,
        "attention": attention * config.num_layers,
        "head": [projection(config.vocab_size, hidden, masked)],
        "other": [dense] * config.num_dense_layers,
    }


def forward_bound_ms(work: Mapping[str, Sequence[Work]], peaks: Peaks) -> dict[str, float]:
    """Milliseconds by part below which nothing comes that runs these operations one after the other."""
    return {part: 1e3 * sum(one.bound_s(peaks) for one in ones) for part, ones in work.items()}
