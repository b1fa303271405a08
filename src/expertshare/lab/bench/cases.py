"""The registry of cases: whose widths are measured. Weights are random; only shapes and routing matter for speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from expertshare.config import ModelConfig
from expertshare.convert.sizes import SHAPES
from expertshare.errors import ConfigError, InputError, nearest

PeerClass = Literal["glm4_moe", "qwen3_moe"]


@dataclass(frozen=True, kw_only=True, slots=True)
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
_MEASURED: tuple[tuple[str, PeerClass | None, int, tuple[int, ...], str], ...] = (
    ("llada2.0-mini", "glm4_moe", 32, _BY_256, "as released"),
    ("llada2.0-flash", "glm4_moe", 32, _BY_256, "as released"),
    ("llada-moe", "qwen3_moe", 32, (8, 12, 16, 24, 32, 48, 64), _ASSUMED),
    ("sdar-30b-a3b", "qwen3_moe", 32, (8, 16, 24, 32, 48, 70), "at block 32, the b32 variant"),
    ("diffusiongemma", None, 256, (16, 32, 64, 96, 128), _GELU),
    ("tiny", "glm4_moe", 8, (6, 12, 24), "for tests; figures mean nothing"),
)

CASES: dict[str, Case] = {
    name: Case(config=SHAPES[name], peer=peer, tokens=tokens, unique=unique, note=note)
    for name, peer, tokens, unique, note in _MEASURED
}
