"""The registry of cases: whose widths are measured. Weights are random; only shapes and routing matter for speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from expertshare.config import ModelConfig, RouterSpec
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


_LLADA2_ROUTER = RouterSpec(
    num_experts=256,
    top_k=8,
    activation="sigmoid",
    renormalise=True,
    scaling=2.5,
    num_groups=8,
    kept_groups=4,
    has_bias=True,
)

_MINI = ModelConfig(
    family="llada2_moe",
    vocab_size=157_184,
    hidden_size=2048,
    num_layers=20,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    rotary_dim=64,
    rope_theta=600_000.0,
    rms_norm_eps=1e-6,
    num_dense_layers=1,
    dense_hidden=5120,
    expert_hidden=512,
    shared_hidden=512,
    router=_LLADA2_ROUTER,
    attention="block_causal",
    block_length=32,
    max_positions=16_384,
    mask_id=156_895,
    eos_ids=(156_892,),
    pad_id=156_892,
)

_FLASH = replace(
    _MINI, hidden_size=4096, num_layers=32, num_heads=32, dense_hidden=9216, expert_hidden=1024, shared_hidden=1024
)

_LLADA_MOE = replace(
    _MINI,
    family="llada_moe",
    num_layers=16,
    num_kv_heads=16,
    rotary_dim=128,
    rope_theta=50_000.0,
    num_dense_layers=0,
    dense_hidden=0,
    expert_hidden=1024,
    shared_hidden=0,
    router=RouterSpec(num_experts=64, top_k=8, activation="softmax", renormalise=False),
    attention="full",
    max_positions=8192,
)

_SDAR = replace(
    _LLADA_MOE,
    family="sdar_moe",
    vocab_size=151_936,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    rope_theta=1_000_000.0,
    expert_hidden=768,
    router=RouterSpec(num_experts=128, top_k=8, activation="softmax", renormalise=True),
    attention="block_causal",
    max_positions=32_768,
    mask_id=151_669,
    eos_ids=(151_645,),
    pad_id=151_643,
)

_DIFFUSION_GEMMA = replace(
    _SDAR,
    family="diffusion_gemma",
    vocab_size=262_144,
    hidden_size=2816,
    num_layers=30,
    num_heads=16,
    num_kv_heads=8,
    head_dim=256,
    rotary_dim=256,
    expert_hidden=704,
    attention="full",
    block_length=256,
    mask_id=4,
    eos_ids=(1,),
    pad_id=0,
)

_TINY = replace(
    _MINI,
    vocab_size=256,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    dense_hidden=96,
    expert_hidden=32,
    shared_hidden=32,
    router=replace(_LLADA2_ROUTER, num_experts=32, top_k=4, num_groups=4, kept_groups=2),
    block_length=8,
    max_positions=512,
    mask_id=0,
    eos_ids=(1,),
    pad_id=2,
)

_BY_256 = (12, 16, 24, 32, 48, 70, 128)

CASES: dict[str, Case] = {
    "llada2.0-mini": Case(config=_MINI, peer="glm4_moe", tokens=32, unique=_BY_256, note="as released"),
    "llada2.0-flash": Case(config=_FLASH, peer="glm4_moe", tokens=32, unique=_BY_256, note="as released"),
    "llada-moe": Case(
        config=_LLADA_MOE,
        peer="qwen3_moe",
        tokens=32,
        unique=(8, 12, 16, 24, 32, 48, 64),
        note="sizes from public descriptions, vocabulary assumed to be that of LLaDA2",
    ),
    "sdar-30b-a3b": Case(
        config=_SDAR, peer="qwen3_moe", tokens=32, unique=(8, 16, 24, 32, 48, 70), note="at block 32, the b32 variant"
    ),
    "diffusiongemma": Case(
        config=_DIFFUSION_GEMMA,
        peer=None,
        tokens=256,
        unique=(16, 32, 64, 96, 128),
        note="expert widths of gemma-4-26B-A4B, SiLU instead of its tanh-GELU; expert layer only",
    ),
    "tiny": Case(config=_TINY, peer="glm4_moe", tokens=8, unique=(6, 12, 24), note="for tests; figures mean nothing"),
}
