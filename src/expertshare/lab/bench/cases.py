"""The registry of cases: whose widths are measured. Weights are random; only shapes and routing matter for speed. And
what a layer and a forward of such widths must cost at least, and the line that measured latencies lie on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from expertshare.config import ModelConfig
from expertshare.convert.sizes import SHAPES
from expertshare.errors import ConfigError, InputError, nearest
from expertshare.lab.bench.machine import Peaks

PeerClass = Literal["glm4_moe", "qwen3_moe"]


@dataclass(frozen=True, slots=True)
class Case:
    """One model's widths. config: the full-size architecture. peer: the class of transformers that computes the same
    (None: only the expert layer is measured). tokens: per block. unique: numbers of unique experts measured by
    default. note: what differs from the released model.
    """

    config: ModelConfig
    peer: PeerClass | None
    tokens: int
    unique: tuple[int, ...]
    note: str

    def with_experts(self, num_experts: int | None) -> Case:
        """The same widths in a layer of another number of experts. Raises ConfigError where it cannot route."""
        if num_experts is None:
            return self
        return replace(self, config=replace(self.config, router=replace(self.config.router, num_experts=num_experts)))

    def stack(self, num_layers: int) -> ModelConfig:
        """The first `num_layers` layers of the model, leading dense ones included, with the full vocabulary."""
        if self.peer is None:
            raise InputError(f"{self.config.family}: only its expert layer can be measured, use `bench experts`")
        if num_layers <= self.config.num_dense_layers:
            raise InputError(
                f"expected more layers than this case's {self.config.num_dense_layers} dense ones, got {num_layers}"
            )
        return replace(self.config, num_layers=num_layers)


def find_case(name: str) -> Case:
    """The case called `name`; ConfigError suggests the nearest."""
    if name not in CASES:
        raise ConfigError(f"unknown case {name!r}. {nearest(name, CASES)}")
    return CASES[name]


_BY_256 = (12, 16, 24, 32, 48, 70, 128)
_ASSUMED = "sizes from public descriptions, vocabulary assumed to be that of LLaDA2"
_GELU = "expert widths of gemma-4-26B-A4B, SiLU instead of its tanh-GELU; expert layer only"
_MEASURED: dict[str, tuple[PeerClass | None, int, tuple[int, ...], str]] = {
    "llada2.0-mini": ("glm4_moe", 32, _BY_256, "as released"),
    "llada2.0-flash": ("glm4_moe", 32, _BY_256, "as released"),
    "llada-moe": ("qwen3_moe", 32, (8, 12, 16, 24, 32, 48, 64), _ASSUMED),
    "sdar-30b-a3b": ("qwen3_moe", 32, (8, 16, 24, 32, 48, 70), "at block 32, the b32 variant"),
    "diffusiongemma": (None, 256, (16, 32, 64, 96, 128), _GELU),
    "tiny": ("glm4_moe", 8, (6, 12, 24), "for tests; figures mean nothing"),
}
CASES = {name: Case(SHAPES[name], *measured) for name, measured in _MEASURED.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One call of an expert layer. num_bytes: weights of the unique experts, tokens read and written once. num_macs:
    multiply-accumulates of the three projections of every (token, expert) pair.
    """

    num_bytes: int
    num_macs: int

    def bound_s(self, peaks: Peaks) -> float:
        """Seconds below which no implementation that reads each weight once can come on this machine."""
        return max(self.num_bytes / peaks.bytes_per_s, self.num_macs / peaks.macs_per_s)


def expert_work(
    *, tokens: int, top_k: int, unique: int, hidden: int, inner: int, itemsize: int, expert_bytes: int | None = None
) -> Work:
    """Work of one layer; itemsize in bytes, of activations, and of weights unless expert_bytes says what one expert
    takes."""
    weights = unique * (3 * hidden * inner * itemsize if expert_bytes is None else expert_bytes)
    activations = 2 * tokens * hidden * itemsize
    return Work(num_bytes=weights + activations, num_macs=tokens * top_k * 3 * hidden * inner)


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


def fit_latency(
    unique: Sequence[int],
    pairs: Sequence[int],
    seconds: Sequence[float],
    *,
    bytes_per_expert: int,
    macs_per_pair: int,
) -> dict[str, Any] | None:
    """latency = b * unique + a * pairs by least squares. None for fewer than three points, or one number of experts.

    With what b and a would mean as a bandwidth and a rate (None where they are not positive). residuals_ms: measured
    minus fitted, in the order of the points. r_squared: share of the variance over the points that the line explains.
    Where all points have one number of pairs, a * pairs is simply the line's height at zero experts.
    """
    if len(seconds) < 3 or len(set(unique)) < 2:
        return None
    design = np.column_stack([np.asarray(unique, dtype=float), np.asarray(pairs, dtype=float)])
    measured = np.asarray(seconds, dtype=float)
    b_s, a_s = (float(found) for found in np.linalg.lstsq(design, measured, rcond=None)[0])
    residuals = measured - design @ np.array([b_s, a_s])
    variance = float(((measured - measured.mean()) ** 2).sum())
    return {
        "us_per_expert": 1e6 * b_s,
        "us_per_pair": 1e6 * a_s,
        "gb_per_s": bytes_per_expert / b_s / 1e9 if b_s > 0 else None,
        "gmac_per_s": macs_per_pair / a_s / 1e9 if a_s > 0 else None,
        "r_squared": 1.0 - float((residuals**2).sum()) / variance if variance > 0 else 1.0,
        "residuals_ms": [1e3 * float(value) for value in residuals],
    }
